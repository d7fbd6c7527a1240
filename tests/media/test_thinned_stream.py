"""A thinned stream, decoded from its first picture to its last, holds the frames that the whole clip gives."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import av
import pytest
import torch
from clip_edits import append_packets
from clip_files import ClipRecipe, write_clip
from clip_matrix import MATRIX, MatrixClip, write
from sequential_decode import Judged, judge

from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.decode_pyav import open_clip
from omnigrpo.media.frames_pyav import FrameDecoder
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.thinned_stream import NotThinnableError, ThinnedStream, thin
from omnigrpo.schema import Clip

WINDOWS = ((None, None), (0.13, 0.39), (0.43, None), (None, 0.21), (0.81, None))
"""Parts of the clip's duration."""
OTHER_CODECS = ("av1", "mpeg4", "mpeg2", "mpeg1", "wmv2", "flv1", "prores")
PROGRESSIVE = [clip for clip in MATRIX if "interlaced" not in clip.name]
CHANGING = ("h264_two_descriptions.mp4", "h264_new_parameters.mp4")


@contextmanager
def _opened(clip: Clip, num_frames: int) -> Iterator[FrameDecoder]:
    sampling = SamplingConfig(num_frames=num_frames, min_frames=1)
    with open_clip(clip, ("video",), sampling, Deadline.after(60)) as opened:
        assert opened.frames is not None
        yield opened.frames


def _thinned(clip: Clip, num_frames: int) -> ThinnedStream | None:
    """None where pictures must be counted."""
    with _opened(clip, num_frames) as frames:
        return None if frames.plan is None else thin(frames)


def _decoded(thinned: ThinnedStream, directory: Path) -> Judged:
    path = directory / "thinned"
    path.write_bytes(thinned.content)
    return judge(path)


def _assert_well_formed(thinned: ThinnedStream):
    """One picture after the other without a gap, none decoded after it is shown."""
    with av.open(BytesIO(thinned.content), "r") as container:
        packets = [packet for packet in container.demux() if packet.size]
    stamps = [(packet.pts, packet.dts) for packet in packets]
    assert len(packets) == thinned.num_packets > max(thinned.frames)
    assert all(a[1] is not None and b[1] is not None and a[1] < b[1] for a, b in pairwise(stamps))
    assert all(pts is not None and dts is not None and dts <= pts for pts, dts in stamps)
    shown = sorted(pts for pts, _ in stamps if pts is not None)
    assert len({b - a for a, b in pairwise(shown)}) <= 1


@pytest.mark.parametrize("clip", PROGRESSIVE, ids=lambda clip: clip.name)
def test_the_frames_of_the_whole_clip(tmp_path: Path, clip: MatrixClip):
    path = write(clip, tmp_path)
    judged = judge(path)
    duration = float(judged.seconds[-1])
    for start, end in WINDOWS:
        window = tuple(None if part is None else part * duration for part in (start, end))
        for num_frames in (1, 8, 32) if start is end is None else (3,):
            asked = Clip(path=path, start_seconds=window[0], end_seconds=window[1])
            if clip.name.startswith(OTHER_CODECS) and clip.is_sparse:
                with pytest.raises(NotThinnableError, match="is coded as"):
                    _thinned(asked, num_frames)
                continue
            if clip.name in CHANGING and end is None:
                with pytest.raises(NotThinnableError, match="describes its codec anew"):
                    _thinned(asked, num_frames)
                continue
            thinned = _thinned(asked, num_frames)
            assert (thinned is None) == (not clip.is_sparse)
            if thinned is None:
                continue
            _assert_well_formed(thinned)
            ours = _decoded(thinned, tmp_path)
            assert len(ours.images) == thinned.num_packets
            frames = torch.stack([ours.images[at] for at in thinned.frames])
            assert torch.equal(frames, judged.pick(num_frames, *window)), (start, end, num_frames)


@pytest.mark.parametrize(("group", "share"), [(250, 0.6), (30, 0.4)])
def test_eight_frames_of_ten_seconds_need_few_packets(tmp_path: Path, group: int, share: float):
    options = {"preset": "veryfast", "crf": "12", "g": str(group), "bf": "3"}
    recipe = ClipRecipe(num_frames=300, rate=30, options=options, tone_hertz=None)
    path = write_clip(tmp_path / "clip.mp4", recipe)
    thinned = _thinned(Clip(path=path), 8)
    assert thinned is not None
    assert 8 <= thinned.num_packets <= share * 300
    assert len(thinned.content) <= 0.75 * path.stat().st_size


def test_a_run_in_an_open_group_begins_at_its_idr_picture(tmp_path: Path):
    """H.264 numbers its pictures from there; of HEVC the open group itself is enough."""
    end = {}
    for name in ("h264_open_gop.mkv", "hevc_open_gop.mp4"):
        path = write(next(clip for clip in MATRIX if clip.name == name), tmp_path)
        thinned = _thinned(Clip(path=path, start_seconds=2.0), 1)
        assert thinned is not None
        end[name] = thinned.num_packets
    assert end["hevc_open_gop.mp4"] <= 15
    assert 25 <= end["h264_open_gop.mkv"] <= 60


def test_the_packets_of_the_clip_stay_as_they_are(tmp_path: Path):
    path = write(next(clip for clip in MATRIX if clip.name == "hevc_open_gop.mp4"), tmp_path)
    with _opened(Clip(path=path), 8) as frames:
        before = [(bytes(packet), packet.pts, packet.dts) for packet in frames.track.packets]
        expected = frames.decode().frames_FHWC
        thin(frames)
        assert [(bytes(packet), packet.pts, packet.dts) for packet in frames.track.packets] == before
        assert torch.equal(frames.decode().frames_FHWC, expected)


@pytest.mark.parametrize("name", ["vp8.webm", "vp9.webm", "mjpeg.mov"])
@pytest.mark.parametrize("width", [64, 128])
def test_pictures_of_another_size_than_the_header_says_are_refused(tmp_path: Path, name: str, width: int):
    """DALI's buffers are as large as the header says: what does not fit would be written beyond them."""
    recipe = next(clip for clip in MATRIX if clip.name == name).recipe
    path, other = (
        write_clip(tmp_path / f"{number}.{name}", replace(recipe, width=size, tone_hertz=None))
        for number, size in enumerate((96, width))
    )
    append_packets(path, other)
    for num_frames in (2, 8):
        with _opened(Clip(path=path), num_frames) as frames:
            frames.look()
            with pytest.raises(NotThinnableError, match="several sizes"):
                thin(frames)


def test_pictures_that_must_be_counted_are_refused(tmp_path: Path):
    path = write(next(clip for clip in MATRIX if clip.name == "h264.avi"), tmp_path)
    with _opened(Clip(path=path), 8) as frames, pytest.raises(NotThinnableError, match="must be counted"):
        thin(frames)
