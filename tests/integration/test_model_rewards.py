"""Rewards that read the model, in a run of `omnigrpo train` with the native engine."""

import math
import os
import subprocess
import sys

from omnigrpo.metrics import REWARD_COMPONENT_PREFIX, read_jsonl, read_metrics


def test_two_steps_with_a_grounded_reward(job, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from omnigrpo.reward.context import ModalityChange\n"
        "def needs_audio(group, context):\n"
        "    (drops,) = context.drops(ModalityChange(modality='audio', baseline='swap'))\n"
        "    return [sum(drop) for drop in drops]\n"
    )
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
