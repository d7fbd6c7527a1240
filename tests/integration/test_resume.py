import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from omnigrpo.config import ConfigError, load_config
from omnigrpo.metrics import read_metrics
from omnigrpo.run import run_grpo


def command(settings: list[str], *more: str) -> list[str]:
    return [sys.executable, "-m", "omnigrpo", "train", *[f"--set={s}" for s in settings], *more]


def run(settings: list[str], *more: str) -> None:
    done = subprocess.run(command(settings, *more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def run_until_step(settings: list[str], metrics_path, step: int) -> None:
    """Start a run and kill it, without warning, once it has logged ``step``."""
    process = subprocess.Popen(
        command(settings), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 300
    while not metrics_path.exists() or len(read_metrics(metrics_path)) < step:
        assert process.poll() is None, f"the run ended with status {process.returncode}"
        assert time.monotonic() < deadline, "the run logs no steps"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_kill_and_resume_equal_a_straight_run_bit_for_bit(job, tmp_path):
    straight = job.settings(tmp_path / "straight", "run.steps=6", "run.save_every=3")
    run(straight)

    killed = job.settings(tmp_path / "killed", "run.steps=6", "run.save_every=3")
    run_until_step(killed, tmp_path / "killed" / "metrics.jsonl", step=4)
    assert len(read_metrics(tmp_path / "killed")) < 6, "the kill came too late to test anything"
    run(killed, "--resume")

    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "killed")]
    start = load_file(job.base / "model.safetensors")
    assert any(not weights[0][name].equal(start[name]) for name in start), "training changed nothing"
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name]), name

    def scalars(name):
        steps = read_metrics(tmp_path / name)
        return [{k: v for k, v in s.items() if "seconds" not in k and "per_second" not in k} for s in steps]

    assert scalars("straight") == scalars("killed")
    assert [s["step"] for s in scalars("killed")] == [1, 2, 3, 4, 5, 6]


def test_a_run_directory_is_not_overwritten(job, tmp_path):
    settings = job.settings(tmp_path / "run", "run.steps=1")
    run_grpo(load_config(None, settings))
    with pytest.raises(ConfigError, match="already holds a run: add --resume"):
        run_grpo(load_config(None, settings))


def test_nothing_to_resume(job, tmp_path):
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_grpo(load_config(None, job.settings(tmp_path / "run")), resume=True)


def test_a_run_killed_before_its_first_checkpoint_starts_over(job, tmp_path):
    settings = job.settings(tmp_path / "run", "run.steps=3", "run.save_every=3")
    run_until_step(settings, tmp_path / "run" / "metrics.jsonl", step=1)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*")), (
        "the kill came too late to test anything"
    )
    run(settings, "--resume")
    assert [s["step"] for s in read_metrics(tmp_path / "run")] == [1, 2, 3]
