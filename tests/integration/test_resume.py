"""A killed run that is resumed ends as the run that was left alone, bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from omnigrpo.config import ConfigError, load_config
from omnigrpo.metrics import read_metrics
from omnigrpo.run import run_grpo
from omnigrpo.runtime.checkpoint import load_state

SIX_STEPS = ("run.steps=6", "run.save_every=3")


def command(kind: str, settings: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "omnigrpo", kind, *[f"--set={s}" for s in settings], *more]


def run(kind: str, settings: list[str], *more: str) -> None:
    done = subprocess.run(command(kind, settings, *more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def stop_at_step(kind: str, settings: list[str], output: Path, step: int, how: signal.Signals) -> int:
    """Start a run and send it ``how`` once it has logged ``step``; returns its exit status."""
    process = subprocess.Popen(
        command(kind, settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 300
    while len(read_metrics(output / "metrics.jsonl")) < step:
        assert process.poll() is None, f"the run ended with status {process.returncode}"
        assert time.monotonic() < deadline, "the run logs no steps"
        time.sleep(0.005)
    os.kill(process.pid, how)
    return process.wait(timeout=60)


def scalars(output: Path) -> list[dict]:
    """What each step computed; not how long it took, nor where its clips came from."""
    steps = read_metrics(output)
    return [
        {k: v for k, v in s.items() if not re.search("second|^prefetch/|^cache/|^media/", k)} for s in steps
    ]


def leaves(tree: Any, where: str = "") -> dict[str, Any]:
    """The tensors and values of a nested state by their path."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {where: tree}
    return {path: leaf for key, value in items for path, leaf in leaves(value, f"{where}/{key}").items()}


def assert_same_end(left: Path, right: Path) -> None:
    """Weights, the final checkpoint's optimizer, and every logged scalar."""
    weights = [load_file(output / "model" / "model.safetensors") for output in (left, right)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name]), name
    saved = [load_state(output / "checkpoints" / "step-000006") for output in (left, right)]
    states = [leaves({"optimizer": state["optimizer"], "step": state["step"]}) for state in saved]
    assert states[0].keys() == states[1].keys()
    assert any("exp_avg" in path for path in states[0])
    for path, leaf in states[0].items():
        same = leaf.equal(states[1][path]) if isinstance(leaf, torch.Tensor) else leaf == states[1][path]
        assert same, path
    assert scalars(left) == scalars(right)
    assert [step["step"] for step in scalars(right)] == [1, 2, 3, 4, 5, 6]


CASES = [
    ("train", ("media.prefetch_depth=0",)),
    ("train", ("run.threads=2", "media.prefetch_depth=2", "trainer.iterations=2")),
    ("sft", ("optimizer.schedule='cosine'",)),
]


@pytest.mark.parametrize(("kind", "more"), CASES, ids=["grpo", "grpo threads prefetch", "sft"])
def test_kill_and_resume_equal_a_straight_run_bit_for_bit(job, tmp_path, kind, more):
    data = (f"data.train='{job.data}/cold_start.json'",) if kind == "sft" else ()
    straight = job.settings(tmp_path / "straight", *SIX_STEPS, *data, *more)
    run(kind, straight)
    start = load_file(job.base / "model.safetensors")
    trained = load_file(tmp_path / "straight" / "model" / "model.safetensors")
    assert any(not trained[name].equal(start[name]) for name in start), "training changed nothing"

    killed = job.settings(tmp_path / "killed", *SIX_STEPS, *data, *more)
    assert stop_at_step(kind, killed, tmp_path / "killed", 4, signal.SIGKILL) == -signal.SIGKILL
    assert 4 <= len(read_metrics(tmp_path / "killed")) < 6, "the kill came too late to test anything"
    assert not (tmp_path / "killed" / "model").exists()
    run(kind, killed, "--resume")
    assert_same_end(tmp_path / "straight", tmp_path / "killed")


def test_an_interrupt_saves_the_last_step_and_resumes_from_it(job, tmp_path):
    straight = job.settings(tmp_path / "straight", "run.steps=6", "run.save_every=6")
    run("train", straight)
    interrupted = job.settings(tmp_path / "interrupted", "run.steps=6", "run.save_every=6")
    assert stop_at_step("train", interrupted, tmp_path / "interrupted", 2, signal.SIGINT) != 0
    (saved,) = (tmp_path / "interrupted" / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) in (2, 3, 4)
    assert load_state(saved)["step"] == len(read_metrics(tmp_path / "interrupted"))
    run("train", interrupted, "--resume")
    assert_same_end(tmp_path / "straight", tmp_path / "interrupted")


def test_a_run_directory_is_not_overwritten(job, tmp_path):
    settings = job.settings(tmp_path / "run", "run.steps=1")
    run_grpo(load_config(None, settings))
    with pytest.raises(ConfigError, match="already holds a run: add --resume"):
        run_grpo(load_config(None, settings))


def test_a_run_is_not_resumed_as_another_one(job, tmp_path):
    """Other settings are refused by name; more steps of the same run are not."""
    settings = job.settings(tmp_path / "run", "run.steps=1")
    run_grpo(load_config(None, settings))
    with pytest.raises(ConfigError, match=r"rollout\.samples was 3, is 4"):
        run_grpo(load_config(None, [*settings, "rollout.samples=4"]), resume=True)
    run_grpo(load_config(None, [*settings, "run.steps=2"]), resume=True)
    assert [step["step"] for step in read_metrics(tmp_path / "run")] == [1, 2]


def test_nothing_to_resume(job, tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_grpo(load_config(None, job.settings(tmp_path / "run")), resume=True)


def test_a_run_killed_before_its_first_checkpoint_starts_over(job, tmp_path):
    settings = job.settings(tmp_path / "run", "run.steps=3", "run.save_every=3")
    stop_at_step("train", settings, tmp_path / "run", 1, signal.SIGKILL)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*")), (
        "the kill came too late to test anything"
    )
    run("train", settings, "--resume")
    assert [s["step"] for s in read_metrics(tmp_path / "run")] == [1, 2, 3]
