"""Rewards that read the model, in a run of `omnigrpo train` with the native engine."""

import math
import os
import subprocess
import sys

from omnigrpo.config import load_config
from omnigrpo.metrics import REWARD_COMPONENT_PREFIX, read_jsonl, read_metrics
from omnigrpo.run import run_grpo

NEEDS_AUDIO = """
from omnigrpo.reward.context import ModalityChange

def needs_audio(group, context):
    (drops,) = context.drops(ModalityChange(modality='audio', baseline='swap'))
    return [sum(drop) for drop in drops]
"""


def test_two_steps_with_a_grounded_reward(job, tmp_path):
    (tmp_path / "mine.py").write_text(NEEDS_AUDIO)
    terms = (
        "reward.terms=[{name='accuracy'}, {name='grounded', weight=0.2}, {name='audio_aware'}, "
        "{name='length_range', options={low=1, high=4, slope=8}}, {name='mine.py:needs_audio'}]"
    )
    settings = [f"--set={s}" for s in job.settings(tmp_path / "run", "run.steps=2", terms)]
    done = subprocess.run(
        [sys.executable, "-m", "omnigrpo", "train", *settings],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    steps = read_metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert math.isfinite(step[f"{REWARD_COMPONENT_PREFIX}needs_audio"])
        assert 0 <= step[f"{REWARD_COMPONENT_PREFIX}grounded"] <= 1
        assert step[f"{REWARD_COMPONENT_PREFIX}length_range"] > 0
    records = list(read_jsonl(tmp_path / "run" / "rollouts.jsonl"))
    assert len({value for record in records for value in record["components"]["needs_audio"]}) > 2


def test_a_resumed_run_swaps_the_same_clips(job, tmp_path):
    """What stands in for a modality depends on the step's prompts alone."""
    (tmp_path / "mine.py").write_text(NEEDS_AUDIO)
    more = ["run.save_every=1", "optimizer.schedule='constant'"]
    more.append(f"reward.terms=[{{name='{tmp_path}/mine.py:needs_audio'}}, {{name='grounded'}}]")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_grpo(load_config(None, job.settings(straight, "run.steps=2", *more)))
    run_grpo(load_config(None, job.settings(resumed, "run.steps=1", *more)))
    run_grpo(load_config(None, job.settings(resumed, "run.steps=2", *more)), resume=True)
    ours, theirs = (
        [step[f"{REWARD_COMPONENT_PREFIX}needs_audio"] for step in read_metrics(run)]
        for run in (resumed, straight)
    )
    assert ours == theirs
    assert len(ours) == 2
