"""bench_media: a smoke run, and that its readers give the same frames and sound."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnigrpo.media.sampling import uniform_frame_indices

SMALL = {"width": 64, "height": 48, "num_frames": 30}


@pytest.fixture
def bench(bench_module):
    return bench_module("bench_media")


@pytest.fixture
def work(bench_module):
    return bench_module("media_work")


@pytest.fixture
def peers(bench_module):
    return bench_module("media_peers")


@pytest.fixture
def clip(work, tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    work.write_clips({path: work.ClipSpec(gop=10, **SMALL)})
    return path


@pytest.mark.slow
def test_smoke(run, tmp_path: Path):
    report = run("--clips", str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} - {"report.json"} == {
        "smoke-gop30.mp4",
        "smoke-gop250.mp4",
        "smoke-vp9.webm",
    }
    names: dict[str, list[str]] = {}
    for row in report["rows"]:
        names.setdefault(row["section"].split(":")[0], []).append(row["name"])
    cases = ("GOP 250, k=8", "GOP 30, k=8", "GOP 250, k=32", "GOP 30, k=32")
    for case in cases:
        assert names[case][0] == "ours"
        assert "sequential PyAV" in names[case]
    parts = ["hash", "demux", "plan", "sound", "pictures", "pixels and log-mel"]
    assert names["parts of one clip, GOP 250, k=8"] == names["parts of one clip, GOP 30, k=8"] == parts
    assert names["threads, 8 clips, k=8"] == ["two threads", "one thread", "two processes"]
    checks = {check["name"]: check for check in report["checks"]}
    for case in cases:
        assert checks[f"{case}: bytes that differ from sequential decoding"]["value"] == 0
        assert checks[f"{case}: |waveform - sequential|"]["ok"]
        assert checks[f"{case}: samples that one waveform lacks"]["ok"]
    assert checks["|log-mel by DALI - by torch|"]["ok"]
    assert checks["smoke-vp9.webm: decoded by DALI"]["value"] == 1
    assert checks["smoke-vp9.webm: |DALI - PyAV| of 255"]["value"] == 0
    assert checks["clips decoded to fill the cache"]["value"] == 4
    assert checks["clips decoded by a step over cached clips"]["value"] == 0
    assert checks["one thread's time / two threads'"]["target"] == ">= 1.8"


def test_targets_are_those_of_the_issue(bench):
    assert bench.CASES == {(250, 8): 1.5, (30, 8): 1.35, (250, 32): 1.35, (30, 32): 1.35}


def test_a_wrong_frame_fails_the_check(bench, peers, clip: Path):
    decoded, sequential = bench.ours(clip, 4), peers.sequential_pyav()(clip, 4)
    assert all(check.ok for check in bench.equality_checks("case", decoded, sequential))
    decoded.frames_FHWC[1, 2, 3, 0] ^= 1
    sequential.waveform[7] += 1
    cut = replace(sequential, waveform=sequential.waveform[:-100])
    assert [check.ok for check in bench.equality_checks("case", decoded, cut)] == [False, False, False]


def test_readers_take_the_same_frames(bench, peers, clip: Path):
    ours, sequential = bench.ours(clip, 5), peers.sequential_pyav()(clip, 5)
    assert ours.frames_FHWC.shape == sequential.frames_FHWC.shape == (5, 48, 64, 3)
    assert (ours.frames_FHWC.int() - sequential.frames_FHWC.int()).abs().float().mean() < 6
    everything = peers.sequential_frames(clip, SMALL["num_frames"], peers.exact_rgb)
    assert torch.equal(everything[list(uniform_frame_indices(30, 5))], ours.frames_FHWC)
    for name, make in peers.READERS.items():
        try:
            read = make()
        except ImportError:
            continue
        media = read(clip, 5)
        assert media.frames_FHWC.shape == (5, 48, 64, 3), name
        assert abs(len(media.waveform) - 16_000) < 2048, name


def test_specs_of_other_pictures_are_refused(work, tmp_path: Path):
    specs = {
        tmp_path / "a.mp4": work.ClipSpec(**SMALL),
        tmp_path / "b.mp4": work.ClipSpec(**SMALL | {"width": 32}),
    }
    with pytest.raises(ValueError, match="the same pictures"):
        work.write_clips(specs)


def test_a_directory_that_is_not_there_is_refused(bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        bench.main(["--smoke", "--clips", str(tmp_path / "none")])
    assert "create it first" in capsys.readouterr().err
