"""`omnigrpo encode`: a filled cache, gone on with after a kill, that a run then reads without decoding."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from omnigrpo.config import ConfigError, load_config
from omnigrpo.data.dataset import DatasetError
from omnigrpo.encode_dataset import encode_dataset
from omnigrpo.media.feature_cache import FeatureCache
from omnigrpo.metrics import Metric, read_metrics
from omnigrpo.run import run_grpo, run_sft
from omnigrpo.schema import ClipFeatures, ClipStatus


def command(job, *more: str, data: Path | None = None) -> list[str]:
    dataset = data if data is not None else job.data / "rl.json"
    return [sys.executable, "-m", "omnigrpo", "encode", str(dataset), "--model", str(job.base), *more]


def encode(job, *more: str, data: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        command(job, *more, data=data), capture_output=True, text=True, timeout=300, env=environment
    )


def config(job, directory: Path, *more: str, dataset: str = "rl"):
    settings = [
        f"model.path='{job.base}'",
        f"data.train='{job.data}/{dataset}.json'",
        "run.output=none",
        "run.threads=1",
        f"media.cache_directory='{directory}'",
        *more,
    ]
    return load_config(None, settings)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_run_over_an_encoded_dataset_decodes_nothing(job, tmp_path, depth):
    done = encode(job, "--cache", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "14 clips: 14 encoded, 0 cached, 0 unusable" in done.stdout
    assert "clips/s" in done.stdout
    settings = job.settings(
        tmp_path / "run",
        "run.steps=4",
        f"media.cache_directory='{tmp_path / 'cache'}'",
        f"media.prefetch_depth={depth}",
    )
    run_grpo(load_config(None, settings))
    steps = read_metrics(tmp_path / "run")
    assert [step[Metric.MEDIA_DECODED] for step in steps] == [0, 0, 0, 0]
    assert [step[Metric.CACHE_MISSES] for step in steps] == [0, 0, 0, 0]
    hits = [step[Metric.CACHE_MEMORY_HITS] + step[Metric.CACHE_DISK_HITS] for step in steps]
    assert hits == [4, 4, 4, 4]
    assert steps[0][Metric.CACHE_DISK_HITS] == 4
    assert "seconds/decode" not in steps[0]
    assert "seconds/overlapped/decode" not in steps[0]


def test_a_run_without_a_cache_decodes_each_clip_once(job, tmp_path):
    more = ("run.steps=4", f"data.train='{job.data}/cold_start.json'", "trainer.prompts_per_step=7")
    run_sft(load_config(None, job.settings(tmp_path / "run", *more)))
    steps = read_metrics(tmp_path / "run")
    assert [step[Metric.MEDIA_DECODED] for step in steps] == [7, 0, 0, 0]
    assert all(step[Metric.PREFETCH_DEPTH] <= 2 for step in steps)
    assert steps[0][Metric.PREFETCH_STALLS] == 1


def test_what_is_cached_is_skipped(job, tmp_path):
    first = encode_dataset(config(job, tmp_path))
    again = encode_dataset(config(job, tmp_path))
    assert (first.encoded, first.cached, first.done) == (14, 0, 14)
    assert (again.encoded, again.cached, again.done) == (0, 14, 14)
    assert again.lines() == ["14 clips: 0 encoded, 14 cached, 0 unusable"]


def test_a_damaged_entry_is_encoded_again(job, tmp_path):
    encode_dataset(config(job, tmp_path))
    shard = next(tmp_path.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1
    shard.write_bytes(content)
    again = encode_dataset(config(job, tmp_path))
    assert (again.encoded, again.cached) == (1, 13)


def test_a_killed_encode_goes_on_where_it_stopped(job, tmp_path):
    """SIGKILL once some entries are there; what was there is not encoded again, and nothing is missing."""
    small_batches = ("--set", "media.num_workers=1", "--cache", str(tmp_path))
    process = subprocess.Popen(command(job, *small_batches), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    lines = 0
    while lines < 3:
        assert process.poll() is None, "the encode ended before it was killed"
        assert time.monotonic() < deadline, "the encode fills nothing"
        lines = sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*.journal"))
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = sum(path.read_bytes().count(b"\n") for path in tmp_path.glob("*.journal"))
    assert 3 <= before < 14, "the kill came too late to test anything"
    resumed = encode(job, *small_batches)
    assert resumed.returncode == 0, resumed.stderr
    assert f"14 clips: {14 - before} encoded, {before} cached, 0 unusable" in resumed.stdout
    assert len(list(tmp_path.glob("*.safetensors"))) == 1, "the shard was gone on with"


@pytest.fixture
def mixed(job, tmp_path) -> Path:
    """Three good clips, one of them twice, one that is missing, two that are broken, a text without media."""
    shutil.copytree(job.data / "clips" / "heldout", tmp_path / "mixed" / "clips" / "heldout")
    items = json.loads((job.data / "heldout.json").read_text())[:3]
    for item in items:
        item.pop("id", None)
    for name, content in (("empty.mp4", b""), ("text.mp4", b"no clip" * 100)):
        (tmp_path / "mixed" / name).write_bytes(content)
    broken = [items[0] | {"video": name} for name in ("missing.mp4", "empty.mp4", "text.mp4")]
    path = tmp_path / "mixed" / "mixed.json"
    path.write_text(json.dumps([*items, items[0], *broken]))
    return path


def test_unusable_clips_are_named_by_status(job, mixed, tmp_path):
    for encoded, cached in ((3, 0), (0, 3)):
        done = encode(job, "--cache", str(tmp_path / "cache"), data=mixed)
        assert done.returncode == 0, done.stderr
        assert f"6 clips: {encoded} encoded, {cached} cached, 3 unusable" in done.stdout
        assert "1 missing:" in done.stdout
        assert "missing.mp4 does not exist" in done.stdout
        assert "2 unreadable:" in done.stdout
        assert "empty.mp4 is empty" in done.stdout
        assert "Traceback" not in done.stderr


def test_only_the_first_reasons_are_listed(job, tmp_path):
    item = {"conversations": [{"from": "human", "value": "<video>\nWhich?"}, {"from": "gpt", "value": "sad"}]}
    path = tmp_path / "gone.json"
    path.write_text(json.dumps([item | {"video": f"{number}.mp4"} for number in range(9)]))
    summary = encode_dataset(config(job, tmp_path / "cache", f"data.train='{path}'"))
    assert summary.unusable == {ClipStatus.MISSING: 9}
    assert len(summary.reasons[ClipStatus.MISSING]) == 3
    assert summary.lines()[-1].strip() == "and 6 more"


def test_a_budget_that_cannot_hold_the_dataset_is_refused_before_any_work(job, tmp_path):
    with pytest.raises(ConfigError, match=r"features of 14 clips take \d+ MiB, but .* is 1: raise it to \d+"):
        encode_dataset(config(job, tmp_path, "media.cache_disk_budget_mib=1"))
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_budget_that_others_use_up_is_an_error(job, tmp_path):
    """Another process is writing a shard that takes nearly all of it: that one cannot be evicted."""
    other = FeatureCache(tmp_path, 0, 2**21)
    other.put("abc", ClipFeatures(vision_FND=torch.zeros(1, 380, 1024), audio_AD=None))
    with pytest.raises(ConfigError, match=r"\d+ of 14 clips' features found no room in .* 2 MiB"):
        encode_dataset(config(job, tmp_path, "media.cache_disk_budget_mib=2"))
    other.close()
    assert encode_dataset(config(job, tmp_path, "media.cache_disk_budget_mib=2")).done == 14


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give --cache DIRECTORY, or set media.cache_directory"),
        (["--cache", "cache", "--set", "media.prefetch=1"], "did you mean media.prefetch_depth?"),
    ],
)
def test_mistakes_are_answered_in_one_message(job, more, message):
    done = encode(job, *more)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_dataset_that_does_not_exist_is_named(job, tmp_path):
    with pytest.raises(DatasetError, match=r"none\.json does not exist"):
        encode_dataset(config(job, tmp_path, f"data.train='{tmp_path}/none.json'"))
