"""Kills a process that fills the feature cache, again and again, and checks what is left after each kill.

Run as a script: ``kill_puts.py calls|times DIRECTORY``. It imports torch once and forks, so a kill costs
milliseconds.
"""

import fcntl
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from omnigrpo.media.feature_cache import FeatureCache, feature_key
from omnigrpo.schema import ClipFeatures

BUDGET_BYTES = 96 * 1024
"""Eight shards of three entries each."""
NUM_BEFORE = 20
NUM_PUT = 8
WRITES = ("pwrite", "write")
OTHER_CALLS = ("open", "close", "ftruncate", "unlink", "replace", "scandir")


def key(number: int) -> str:
    return feature_key(str(number), "recipe")


def features(number: int) -> ClipFeatures:
    generator = torch.Generator().manual_seed(number)
    return ClipFeatures(
        vision_FND=torch.randn(4, 9, 16, generator=generator).to(torch.bfloat16),
        audio_AD=torch.randn(20, 32, generator=generator).to(torch.bfloat16),
    )


def same(left: ClipFeatures, right: ClipFeatures) -> bool:
    """Whether both hold the same bits in both modalities."""
    pairs = ((left.vision_FND, right.vision_FND), (left.audio_AD, right.audio_AD))
    return all(a is not None and b is not None and a.dtype == b.dtype and a.equal(b) for a, b in pairs)


def is_whole(found: ClipFeatures | None, number: int) -> bool:
    """False when it is absent; an entry that is neither fails."""
    if found is None:
        return False
    assert same(found, features(number))
    return True


def open_cache(directory: Path) -> FeatureCache:
    return FeatureCache(directory, 0, BUDGET_BYTES)


def check(directory: Path, announced: set[int], attempted: set[int]) -> None:
    """What the next run would find: what was put, whole; what was being put, whole or not at all."""
    cache = open_cache(directory)
    present = {number for number in sorted(attempted) if is_whole(cache.get(key(number)), number)}
    assert announced <= present, sorted(announced - present)
    assert cache.stats.damaged == 0
    cache.put(key(10**6), features(10**6))
    assert is_whole(cache.get(key(10**6)), 10**6)
    assert cache.disk_bytes <= BUDGET_BYTES
    cache.close()
    shards, journals = ({path.stem for path in directory.glob(f"*{s}")} for s in (".safetensors", ".journal"))
    assert journals <= shards
    again = open_cache(directory)
    assert {number for number in present if is_whole(again.get(key(number)), number)} >= announced


def fork(child: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    child()  # an exception ends this copy of the script with a traceback and status 1
    os._exit(0)


def kill_at_call(count: int, how: str) -> None:
    """Send this process SIGKILL at its ``count``-th call that touches the disk: before it, after it, or half way."""
    calls = 0

    def wrapped(original: Callable, is_write: bool) -> Callable:
        def call(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == count and how == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if calls == count and how == "half" and is_write:
                handle, content, *rest = arguments
                original(handle, content[: len(content) // 2], *rest)
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **named)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in (*WRITES, *OTHER_CALLS):
        setattr(os, name, wrapped(getattr(os, name), name in WRITES))
    fcntl.flock = wrapped(fcntl.flock, False)


def put_all(
    directory: Path, numbers: range, report: int, announce: Callable[[int, bytes], int] = os.write
) -> None:
    """Put entries, and say before and after each which one it is."""
    cache = open_cache(directory)
    for number in numbers:
        announce(report, b"a%d\n" % number)
        cache.put(key(number), features(number))
        announce(report, b"p%d\n" % number)


def read_report(handle: int) -> tuple[set[int], set[int]]:
    """What was put, and what was begun."""
    with os.fdopen(handle) as report:
        lines = report.read().split()
    return {int(line[1:]) for line in lines if line[0] == "p"}, {int(line[1:]) for line in lines}


def kill_at_every_call(directory: Path) -> None:
    """A process that goes on with a shard, fills more, and evicts others, is killed around each of its calls."""
    before = directory / "before"
    cache = open_cache(before)
    for number in range(NUM_BEFORE):
        cache.put(key(number), features(number))
    assert cache.stats.shard_evictions == 0
    cache.close()
    kills = 0
    for how in ("before", "half", "after"):
        count, killed = 0, True
        while killed:
            count += 1
            shutil.rmtree(directory / "cache", ignore_errors=True)
            shutil.copytree(before, directory / "cache")
            read_end, write_end = os.pipe()

            def child(count: int = count, how: str = how, write_end: int = write_end) -> None:
                kill_at_call(count, how)
                put_all(directory / "cache", range(NUM_BEFORE, NUM_BEFORE + NUM_PUT), write_end)

            _, status = os.waitpid(fork(child), 0)
            os.close(write_end)
            announced, attempted = read_report(read_end)
            killed = os.WIFSIGNALED(status)
            assert killed or os.waitstatus_to_exitcode(status) == 0, status
            # The last entries of before are the last to be evicted.
            last = set(range(NUM_BEFORE - 3, NUM_BEFORE))
            check(directory / "cache", announced | last, attempted | set(range(NUM_BEFORE)))
            kills += killed
    print(f"survived {kills} kills")
    assert kills > 3 * NUM_PUT


def kill_at_random_times(directory: Path, rounds: int = 60) -> None:
    """Processes that fill the cache without pause are killed; all that they said they had put must be there."""
    random.seed(0)
    first, unfinished = 0, 0
    for _ in range(rounds):
        read_end, write_end = os.pipe()

        def child(first: int = first, write_end: int = write_end) -> None:
            put_all(directory / "cache", range(first, first + 100_000), write_end)

        pid = fork(child)
        os.close(write_end)
        time.sleep(random.uniform(0.005, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        announced, attempted = read_report(read_end)
        unfinished += announced != attempted
        kept = set(sorted(announced)[-9:])  # The budget holds so many for sure.
        check(directory / "cache", kept, attempted)
        first = max(attempted, default=first) + 1
    print(f"survived {rounds} kills, {unfinished} of them during a put, {first} puts")
    assert unfinished > rounds // 4


def every_shard_is_a_safetensors_file(directory: Path) -> None:
    """What a kill left is mended by whoever goes on with the shard."""
    for path in directory.glob("cache/*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["format"] == "omnigrpo-features-2"


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"calls": kill_at_every_call, "times": kill_at_random_times}[sys.argv[1]](Path(sys.argv[2]))
    every_shard_is_a_safetensors_file(Path(sys.argv[2]))
