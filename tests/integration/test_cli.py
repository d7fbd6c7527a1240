"""The command line as a user meets it, in processes of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omnigrpo.metrics import read_jsonl, read_metrics


def omnigrpo(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "omnigrpo", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=cwd,
        env=environment,
    )


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, timeout=60, check=True)
    return time.perf_counter() - started


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def settings(job, output: Path, *more: str) -> list[str]:
    return [f"--set={s}" for s in job.settings(output, "run.steps=1", *more)]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; import omnigrpo.cli; "
        "print([m for m in ('torch', 'transformers', 'av', 'numpy', 'matplotlib', 'pydantic') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert loaded.stdout.strip() == "[]"


def test_help_lists_the_commands_at_once():
    """The requirement is under a second on an idle machine; the limit leaves room for a busy one."""
    interpreter = min(seconds([sys.executable, "-c", "pass"]) for _ in range(3))
    answered = min(seconds([sys.executable, "-m", "omnigrpo", "--help"]) for _ in range(3))
    print(f"omnigrpo --help: {answered:.2f} s, of which the bare interpreter {interpreter:.2f} s")
    assert answered - interpreter < 3
    shown = omnigrpo("--help")
    assert shown.returncode == 0
    for command in ("demo", "generate-data", "sft", "train", "eval", "probe", "report", "info"):
        assert command in shown.stdout


def test_info_names_versions_device_and_kernels():
    shown = omnigrpo("info")
    assert shown.returncode == 0, shown.stderr
    for word in ("torch", "Devices", "linear_logprob", "shared_prefix_attention"):
        assert word in shown.stdout


def test_own_clips_train_and_bad_ones_are_reported(job, tmp_path):
    """A JSON of one's own with good clips, a missing one and a broken one: the step goes on with the good ones."""
    clips = sorted((job.data / "clips" / "rl").glob("*.mp4"))[:2]
    (tmp_path / "broken.mp4").write_bytes(clips[0].read_bytes()[:300])
    names = [*(os.path.relpath(clip, tmp_path) for clip in clips), "missing.mp4", "broken.mp4"]
    items = [
        {
            "video": name,
            "conversations": [
                {"from": "human", "value": "<video>\n<audio>\nWhich emotion is it?"},
                {"from": "gpt", "value": "happy"},
            ],
        }
        for name in names
    ]
    (tmp_path / "mine.json").write_text(json.dumps(items))
    done = omnigrpo(
        "train",
        *settings(job, tmp_path / "run"),
        *("--data", "mine.json", "--output", "mine", "--steps", "2"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    steps = read_metrics(tmp_path / "mine")
    assert [s["prompts/dropped"] for s in steps] == [2.0, 2.0]
    assert "4 prompts were dropped" in done.stderr
    assert [s["samples"] for s in steps] == [6.0, 6.0]
    dropped = {record["prompt_id"]: record for record in read_jsonl(tmp_path / "mine" / "dropped.jsonl")}
    assert dropped["000002"]["status"] == "missing"
    assert "missing.mp4" in dropped["000002"]["error"]
    assert dropped["000003"]["status"] in ("unreadable", "truncated", "corrupt")
    assert "broken.mp4" in dropped["000003"]["error"]
    assert (tmp_path / "mine" / "model" / "model.safetensors").is_file()


def test_a_run_without_any_usable_clip_says_so(job, tmp_path):
    item = {
        "video": "nothing.mp4",
        "conversations": [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "sad"}],
    }
    (tmp_path / "mine.json").write_text(json.dumps([item]))
    done = omnigrpo("train", *settings(job, tmp_path / "run"), "--data", str(tmp_path / "mine.json"))
    assert done.returncode == 2
    assert "could not use a single clip" in done.stderr
    assert "nothing.mp4 does not exist" in done.stderr
    assert not (tmp_path / "run" / "model").exists()
    (step,) = read_metrics(tmp_path / "run")
    assert step["prompts/dropped"] == 4.0
    assert step["samples"] == 0.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "nowhere.json"], "nowhere.json does not exist"),
        (
            ["--model", "nowhere"],
            "nowhere/config.json does not exist: give a checkpoint directory with config.json and model.safetensors",
        ),
        (["--set", "trainer.promts_per_step=2"], "did you mean trainer.prompts_per_step?"),
        (["--set", "rollout.samples=many"], "rollout.samples: Input should be a valid integer, got 'many'"),
        (["--set", "rollout.samples=1"], "rollout.samples must be at least 2"),
        (["--set", "reward.terms=[{name='acuracy'}]"], "unknown reward 'acuracy': did you mean 'accuracy'?"),
        (["--set", "reward.terms=[{name='no.py:reward'}]"], "no.py does not exist"),
        (["--set", "trainer.budget_rows=60"], "trainer.budget_rows is 60"),
        (
            ["--set", "optimizer.learning_rate=nan"],
            "optimizer.learning_rate must be a finite number, got nan",
        ),
        (["--config", "nowhere.toml"], "nowhere.toml does not exist"),
        (["--resume"], "nothing to resume"),
        pytest.param(["--set", "model.device=cuda"], "no CUDA device", marks=without_gpu),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_answered_in_one_message(job, tmp_path, more, message):
    done = omnigrpo("train", *settings(job, tmp_path / "run"), *more, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_reward_that_raises_names_the_completion(job, tmp_path):
    (tmp_path / "mine.py").write_text("def bad(group):\n    raise KeyError('no such label')\n")
    done = omnigrpo(
        "train", *settings(job, tmp_path / "run", "reward.terms=[{name='mine.py:bad'}]"), cwd=tmp_path
    )
    assert done.returncode == 2
    assert "reward 'bad', prompt" in done.stderr
    assert "no such label" in done.stderr
    assert "Completion 1 of 3" in done.stderr


def test_evaluation_writes_a_report_per_split(job, tmp_path):
    done = omnigrpo(
        "eval",
        *(
            "--model",
            str(job.base),
            "--data",
            str(job.data / "heldout.json"),
            "--data",
            str(job.data / "ood.json"),
        ),
        *("--output", str(tmp_path), "--set", "rollout.max_new_tokens=4"),
    )
    assert done.returncode == 0, done.stderr
    assert "WAR" in done.stdout
    assert {path.name for path in tmp_path.glob("*.json")} == {"eval_heldout.json", "eval_ood.json"}
    for split in ("heldout", "ood"):
        assert json.loads((tmp_path / f"eval_{split}.json").read_text())["split"] == split
        assert f"{split}: " in done.stdout


def test_report_of_no_run(tmp_path):
    done = omnigrpo("report", str(tmp_path))
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
    assert "metrics.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
