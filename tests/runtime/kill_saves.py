"""Kills a process that saves checkpoints, again and again, and checks what is left after each kill.

Run as a script: ``kill_saves.py calls|times DIRECTORY``. It imports torch once and forks, so a kill costs
milliseconds.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from omnigrpo.runtime.checkpoint import (
    CheckpointWriter,
    latest_checkpoint,
    load_state,
    model_directory,
    step_of,
    verify_checkpoint,
)


def save(writer: CheckpointWriter, step: int) -> None:
    def write_model(directory: Path) -> None:
        (directory / "config.json").write_text(str(step), encoding="utf-8")
        (directory / "weights.bin").write_bytes(step.to_bytes(4) * 20_000)

    writer.save(step, write_model, {"step": step, "moments": torch.full((5000,), float(step))})


def check(directory: Path, saved: set[int], attempted: set[int]) -> int:
    """What a resuming run would do; returns the step that it would resume from."""
    checkpoint = latest_checkpoint(directory)
    assert checkpoint is not None, sorted(path.name for path in directory.iterdir())
    step = step_of(checkpoint)
    assert step in saved | attempted
    state = load_state(checkpoint)
    assert state["step"] == step
    assert torch.equal(state["moments"], torch.full((5000,), float(step)))
    assert (model_directory(checkpoint) / "weights.bin").read_bytes() == step.to_bytes(4) * 20_000
    names = {path.name for path in directory.iterdir()}
    for name in names:
        if name.startswith("step-") and "." not in name:
            verify_checkpoint(directory / name)  # under its own name a checkpoint is complete
    writer = CheckpointWriter(directory, keep_last=2)  # what the next start does
    left = {path.name for path in directory.iterdir()}
    assert all(name == "latest" or "." not in name for name in left), left
    assert {name for name in names if "." not in name} <= left
    assert latest_checkpoint(directory) == checkpoint
    save(writer, step + 1)
    assert latest_checkpoint(directory) == directory / f"step-{step + 1:06d}"
    return step


def fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    child()  # an exception ends this copy of the script with a traceback and status 1
    os._exit(0)


def kill_at_call(count: int, after: bool) -> None:
    """SIGKILL this process before, or after, its ``count``-th call that changes the disk."""
    calls = 0

    def wrapped(original: Callable) -> Callable:
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            mine = calls
            if mine == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if mine == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "open"):
        setattr(os, name, wrapped(getattr(os, name)))


def kill_at_every_call(directory: Path) -> None:
    """Kill before and after each call of a first save that replaces a step and prunes another."""
    kills = 0
    for replaced_step in (6, 3):  # 6 is new, 3 replaces the latest
        for after in (False, True):
            count = 0
            while True:
                count += 1
                shutil.rmtree(directory, ignore_errors=True)
                writer = CheckpointWriter(directory, keep_last=2)
                for step in (1, 2, 3):
                    save(writer, step)

                def child(count: int = count, after: bool = after, step: int = replaced_step) -> None:
                    writer = CheckpointWriter(directory, keep_last=2)
                    kill_at_call(count, after)
                    save(writer, step)

                _, status = os.waitpid(fork(child), 0)
                assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
                # 3 was saved before, so nothing older than it may be what is resumed.
                check(directory, saved={3}, attempted={replaced_step})
                if not os.WIFSIGNALED(status):
                    break
                kills += 1
    print(f"survived {kills} kills")


def kill_at_random_times(directory: Path, rounds: int = 60) -> None:
    """Kill a process that saves without pause; what it said it had saved must be there."""
    random.seed(0)
    resumed, during_save = 0, 0
    save(CheckpointWriter(directory, keep_last=2), 0)
    for _ in range(rounds):
        read_end, write_end = os.pipe()

        def child(first: int = resumed + 1, write_end: int = write_end) -> None:
            writer = CheckpointWriter(directory, keep_last=2)
            for step in range(first, first + 100_000):
                os.write(write_end, b"a%d\n" % step)
                save(writer, step)
                os.write(write_end, b"s%d\n" % step)

        pid = fork(child)
        os.close(write_end)
        time.sleep(random.uniform(0.005, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(read_end) as report:
            lines = report.read().split()
        saved = {int(line[1:]) for line in lines if line[0] == "s"} or {resumed}
        attempted = {int(line[1:]) for line in lines if line[0] == "a"}
        during_save += any(".tmp-" in path.name for path in directory.iterdir())
        resumed = check(directory, saved={max(saved)}, attempted={max(attempted | saved)}) + 1
    print(f"survived {rounds} kills, {during_save} of them during a save")
    assert during_save > rounds // 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"calls": kill_at_every_call, "times": kill_at_random_times}[sys.argv[1]](Path(sys.argv[2]))
