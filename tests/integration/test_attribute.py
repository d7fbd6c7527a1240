"""`omnigrpo attribute` as a user meets it: real clips, the untrained tiny model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from omnigrpo.attribute import AttributionReport, attribute_dataset
from omnigrpo.attribution.config import AttributionConfig, attribution_config
from omnigrpo.config import load_config


def by_command(job, data: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    paths = ["--model", str(job.base), "--data", str(data), "--output", str(output)]
    return subprocess.run(
        [sys.executable, "-m", "omnigrpo", "attribute", *paths, "--set=rollout.max_new_tokens=6", *more],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"COLUMNS": "120"},
    )


def attribute(job, data: Path, output: Path, *, limit: int | None = None, **config) -> AttributionReport:
    settings = job.settings(output, f"data.train='{data}'", "rollout.max_new_tokens=6")
    return attribute_dataset(
        load_config(None, settings), AttributionConfig(**config), output=output, limit=limit
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
    headline = f"7 clips, 1 dropped, baseline {baseline}; per clip 4.0 prefixes prefilled"
    if baseline == "swap":
        done = by_command(job, dataset, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert headline in done.stdout
        assert "Shapley values" in done.stdout
    else:
        assert headline in attribute(job, dataset, tmp_path / "out", baseline=baseline).headline()
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
    assert headline in markdown
    for name in ("values.png", "attention.png", "shapley.png"):
        assert f"({name})" in markdown
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"))
        assert pixels.shape[0] > 400
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_clips_are_limited_by_the_seed(job, dataset, tmp_path) -> None:
    first, again, other = (
        [(clip.prompt_id, clip.donor) for clip in attribute(job, dataset, tmp_path, limit=4, seed=seed).clips]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_no_clip_is_left_without_a_donor(job, dataset, tmp_path, monkeypatch) -> None:
    """Pools of two, one of which loses a clip."""
    monkeypatch.setattr("omnigrpo.attribute.CLIPS_PER_POOL", 2)
    clips = attribute(job, dataset, tmp_path).clips
    assert len(clips) == 7
    assert all(clip.donor != clip.prompt_id for clip in clips)


def test_a_filled_cache_is_read_instead_of_clips(job, dataset, tmp_path) -> None:
    cache = f"media.cache_directory='{tmp_path / 'cache'}'"
    settings = load_config(
        None, job.settings(tmp_path, f"data.train='{dataset}'", "rollout.max_new_tokens=2", cache)
    )
    reports = [attribute_dataset(settings, AttributionConfig(), output=tmp_path / "out") for _ in range(2)]
    assert [report.clips_decoded for report in reports] == [8, 1]
    assert reports[0].clips == reports[1].clips


def test_a_mistake_is_one_message(job, dataset, tmp_path) -> None:
    done = by_command(job, dataset, tmp_path / "out", "--baseline", "mute")
    assert done.returncode == 2
    assert "the baseline must be remove or swap, got 'mute'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (slice(2, 4), r"needs two that can be used, but .*nowhere\.mp4 does not exist"),
        (slice(0, 0), "must be a non-empty JSON list"),
        (None, "prompt '000001' asks for audio: leave it out"),
    ],
    ids=["one clip", "no clip", "audio only"],
)
def test_unusable_data_sets_are_refused(job, dataset, tmp_path, items, message) -> None:
    given = json.loads(dataset.read_text())[items or slice(0, 3)]
    if items is None:
        human = given[1]["conversations"][0]
        human["value"] = human["value"].replace("<video>\n", "")
    (tmp_path / "mine.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=message):
        attribute(job, tmp_path / "mine.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_of_the_command_are_checked() -> None:
    options: dict[str, Any] = {"seed": 0, "unfounded_below": 0.1, "visual_terms": (), "vocal_terms": ()}
    assert (
        "dimple*"
        in attribution_config("remove", **options | dict[str, Any](visual_terms=["dimple*"])).lexicon.video
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"vocal_terms": ["a*b"]}, "a term must be a word"),
        ({"unfounded_below": -1.0}, "unfounded_below must be at least 0"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            attribution_config("swap", **options | wrong)
