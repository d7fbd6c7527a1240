"""Sparse decoding gives, bit for bit, the frames that sequential decoding gives, and decodes fewer pictures."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clip_edits import append, drop_packets
from clip_files import ClipRecipe, read_numbers, write_clip
from clip_matrix import H264, MATRIX, MatrixClip, write, x264
from sequential_decode import Judged, judge

from omnigrpo.media.decode import SamplingConfig
from omnigrpo.media.sampling import Colour
from omnigrpo.schema import Clip, ClipStatus, DecodedBatch, DecodedClip

Decode = Callable[..., DecodedBatch]

WINDOWS = ((None, None), (0.13, 0.39), (0.43, None), (None, 0.21), (0.81, None))
"""Parts of the clip's duration."""


def _frames(clip: DecodedClip) -> torch.Tensor:
    assert clip.frames_FHWC is not None, clip.error
    return clip.frames_FHWC


def _decode_one(decode: Decode, clip: Clip, num_frames: int, colour: Colour = "tag") -> DecodedClip:
    sampling = SamplingConfig(num_frames=num_frames, min_frames=1, colour=colour)
    return decode([clip], [("video",)], sampling).clips[0]


def _windows(path: Path, judged: Judged) -> list[Clip]:
    duration = float(judged.seconds[-1])
    return [
        Clip(
            path=path,
            start_seconds=None if start is None else start * duration,
            end_seconds=None if end is None else end * duration,
        )
        for start, end in WINDOWS
    ]


@pytest.mark.parametrize("clip", MATRIX, ids=lambda clip: clip.name)
def test_the_frames_of_sequential_decoding(decode: Decode, tmp_path: Path, clip: MatrixClip):
    path = write(clip, tmp_path)
    judged = judge(path)
    if clip.numbers is not None:
        assert read_numbers(torch.stack(judged.images)) == list(clip.numbers)
    for num_frames in (1, 8, 32):
        ours = _decode_one(decode, Clip(path=path), num_frames)
        assert torch.equal(_frames(ours), judged.pick(num_frames)), num_frames
        assert num_frames != 1 or (ours.num_pictures < len(judged.images)) == clip.is_sparse
    for window in _windows(path, judged):
        ours = _decode_one(decode, window, 3)
        assert torch.equal(_frames(ours), judged.pick(3, window.start_seconds, window.end_seconds)), window


@pytest.mark.parametrize("name", ["h264_709.mp4", "h264_full_range.mp4", "h264_444.mp4", "h264_10_bit.mkv"])
def test_the_matrix_of_dali_where_it_is_asked_for(decode: Decode, tmp_path: Path, name: str):
    path = write(next(clip for clip in H264 if clip.name == name), tmp_path)
    ours = _frames(_decode_one(decode, Clip(path=path), 8, "bt601"))
    assert torch.equal(ours, judge(path, "bt601").pick(8))
    assert torch.equal(ours, judge(path).pick(8)) == (name != "h264_709.mp4")


def test_the_matrix_is_as_large_as_promised():
    assert len({clip.name for clip in MATRIX}) == len(MATRIX) >= 40
    codecs = {clip.recipe.codec for clip in MATRIX}
    assert codecs >= {
        "libx264",
        "libx265",
        "libvpx",
        "libvpx-vp9",
        "libsvtav1",
        "mpeg4",
        "mpeg2video",
        "mjpeg",
    }
    assert {Path(clip.name).suffix for clip in MATRIX} >= {".mp4", ".mov", ".mkv", ".webm", ".ts", ".avi"}


@pytest.mark.parametrize(("group", "share"), [(250, 0.6), (30, 0.4)])
def test_eight_frames_of_ten_seconds_cost_few_pictures(
    decode: Decode, tmp_path: Path, group: int, share: float
):
    options = {"preset": "veryfast", "crf": "12", "g": str(group), "bf": "3"}
    recipe = ClipRecipe(num_frames=300, rate=30, options=options, tone_hertz=None)
    path = write_clip(tmp_path / "clip.mp4", recipe)
    ours = _decode_one(decode, Clip(path=path), 8)
    assert 8 <= ours.num_pictures <= share * 300
    assert torch.equal(_frames(ours), judge(path).pick(8))


def test_pictures_of_two_sizes_are_refused(decode: Decode, tmp_path: Path):
    path, other = (
        write_clip(tmp_path / f"{width}.ts", ClipRecipe(width=width, tone_hertz=None)) for width in (96, 128)
    )
    path.write_bytes(path.read_bytes() + other.read_bytes())
    assert len({image.shape for image in judge(path).images}) == 2
    for num_frames in (2, 8, 32):
        ours = _decode_one(decode, Clip(path=path), num_frames)
        assert ours.status is ClipStatus.RESOLUTION_CHANGE


def test_what_cannot_be_decoded_twice_is_refused(decode: Decode, tmp_path: Path):
    """Pictures that must be counted first, behind a description that flushing the decoder does not bring back."""
    path = write_clip(tmp_path / "clip.mp4", x264("keyint=15:bframes=0:ref=1", tone_hertz=None))
    second = x264("keyint=15:bframes=0:cabac=0", tone_hertz=None)
    append(second, is_described=True, num_lost=7)(path)
    ours = _decode_one(decode, Clip(path=path), 8)
    assert ours.status is ClipStatus.UNSUPPORTED_CODEC
    assert ours.error is not None
    assert "its codec's description changes on the way" in ours.error


def test_a_recording_that_starts_in_the_middle_starts_at_its_first_whole_picture(
    decode: Decode, tmp_path: Path
):
    path = write_clip(tmp_path / "clip.ts", x264("keyint=15:bframes=0", tone_hertz=None))
    drop_packets(7)(path)
    assert read_numbers(_frames(_decode_one(decode, Clip(path=path), 45))) == list(range(15, 60))


def test_encoding_av1_leaves_this_thread_as_it_was(tmp_path: Path):
    before = os.sched_getscheduler(0)
    options = {"preset": "12"}
    write_clip(tmp_path / "av1.mkv", ClipRecipe(codec="libsvtav1", options=options, num_frames=3))
    assert os.sched_getscheduler(0) == before
