"""`omnigrpo attribute` as a user meets it: real clips, the untrained tiny model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def attribute(job, data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    paths = ["--model", str(job.base), "--data", str(data), "--output", str(output)]
    return subprocess.run(
        [sys.executable, "-m", "omnigrpo", "attribute", *paths, "--set=rollout.max_new_tokens=6", *more],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def dataset(job, tmp_path_factory) -> Path:
    """The held-out clips, one that is missing among them."""
    directory = tmp_path_factory.mktemp("data")
    items = json.loads((job.data / "heldout.json").read_text())
    for item in items:
        item["video"] = str(job.data / item["video"])
    items.insert(3, items[0] | {"video": "nowhere.mp4"})
    (directory / "clips.json").write_text(json.dumps(items))
    return directory / "clips.json"


@pytest.mark.parametrize("baseline", ["swap", "remove"])
def test_tables_and_pictures_are_written(job, dataset, tmp_path, baseline) -> None:
    done = attribute(job, dataset, tmp_path / "out", "--baseline", baseline)
    assert done.returncode == 0, done.stderr
    assert f"7 clips, 1 dropped, baseline {baseline}; per clip 4.0 prefixes prefilled" in done.stdout
    report = json.loads((tmp_path / "out" / "attribution.json").read_text())
    assert [clip["prompt_id"] for clip in report["clips"]] == [f"{n:06d}" for n in (0, 1, 2, 4, 5, 6, 7)]
    assert [(d["prompt_id"], d["status"]) for d in report["dropped"]] == [("000003", "missing")]
    assert report["clips_decoded"] == 8
    assert report["rollout"]["prefixes_prefilled"] == 28
    assert report["scoring"]["prefixes"] == (28 if baseline == "swap" else 42)
    for clip in report["clips"]:
        assert clip["donor"] not in (clip["prompt_id"], "000003")
        values, each = clip["values"]["gold_logprob"], clip["shapley"]["gold_logprob"]
        assert math.isclose(each["video"] + each["audio"], values["both"] - values["neither"], abs_tol=1e-9)
    markdown = (tmp_path / "out" / "attribution.md").read_text()
    assert "Shapley values" in markdown
    for name in ("values.png", "attention.png", "shapley.png"):
        assert f"({name})" in markdown
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"))
        assert pixels.shape[0] > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_clips_are_limited_by_the_seed(job, dataset, tmp_path) -> None:
    chosen = []
    for seed in ("1", "1", "2"):
        done = attribute(job, dataset, tmp_path / "out", "--limit", "4", "--seed", seed)
        assert done.returncode == 0, done.stderr
        clips = json.loads((tmp_path / "out" / "attribution.json").read_text())["clips"]
        chosen.append([(clip["prompt_id"], clip["donor"]) for clip in clips])
    assert chosen[0] == chosen[1] != chosen[2]


@pytest.mark.parametrize(
    ("items", "more", "message"),
    [
        (slice(0, 8), ["--baseline", "mute"], "the baseline must be remove or swap, got 'mute'"),
        (slice(0, 8), ["--visual-term", "a*b"], "a term must be a word"),
        (slice(0, 8), ["--unfounded-below", "-1"], "unfounded_below must be at least 0"),
        (slice(2, 4), [], "needs two that can be used, but"),
        (slice(0, 0), [], "must be a non-empty JSON list"),
        (None, [], "prompt '000001' asks for audio: leave it out"),
    ],
    ids=["baseline", "term", "threshold", "one clip", "no clip", "audio only"],
)
def test_mistakes_are_answered_in_one_message(job, dataset, tmp_path, items, more, message) -> None:
    given = json.loads(dataset.read_text())[items or slice(0, 3)]
    if items is None:
        human = given[1]["conversations"][0]
        human["value"] = human["value"].replace("<video>\n", "")
    (tmp_path / "mine.json").write_text(json.dumps(given))
    done = attribute(job, tmp_path / "mine.json", tmp_path / "out", *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
