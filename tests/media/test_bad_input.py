"""Every bad input gets a status and a sentence with the file and the reason; the batch goes on."""

import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from av.logging import get_level
from av.stream import Disposition

from omnigrpo.media.decode import SamplingConfig, decode
from omnigrpo.schema import Clip, ClipStatus, DecodedClip

BOTH = ("video", "audio")
FASTSTART = {"movflags": "faststart"}

ClipFile = Callable[..., Path]


def _decode_one(path: Path, wanted=BOTH, min_frames: int = 2, /, **window: float) -> DecodedClip:
    sampling = SamplingConfig(min_frames=min_frames)
    return decode([Clip(path=path, **window)], [wanted], sampling).clips[0]


def _assert_dropped(clip: DecodedClip, status: ClipStatus, *words: str):
    assert clip.status is status, clip.error
    assert clip.frames_FHWC is None
    assert clip.waveform is None
    assert clip.error is not None
    assert str(clip.clip.path) in clip.error
    for word in words:
        assert word in clip.error


def _cut(path: Path, share: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_missing(tmp_path: Path):
    clip = _decode_one(tmp_path / "nowhere.mp4")
    _assert_dropped(clip, ClipStatus.MISSING, "does not exist")
    assert clip.content_hash is None


def test_zero_bytes(tmp_path: Path):
    path = tmp_path / "empty.mp4"
    path.touch()
    _assert_dropped(_decode_one(path), ClipStatus.UNREADABLE, "zero bytes")


def test_a_directory(tmp_path: Path):
    _assert_dropped(_decode_one(tmp_path), ClipStatus.UNREADABLE, "cannot be read")


@pytest.mark.parametrize("content", [b"this is no video\n" * 100, bytes(range(256)) * 40, b"\0" * 5000])
def test_not_media(tmp_path: Path, content: bytes):
    path = tmp_path / "text.mp4"
    path.write_bytes(content)
    _assert_dropped(_decode_one(path), ClipStatus.UNREADABLE, "not a readable media file")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_truncated_with_the_index_in_front_gives_the_counts(clip_file: ClipFile, share: float):
    path = _cut(clip_file(container_options=FASTSTART), share)
    _assert_dropped(_decode_one(path), ClipStatus.TRUNCATED, "truncated", "of 50 video packets are there")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_with_the_index_behind(clip_file: ClipFile, share: float):
    _assert_dropped(_decode_one(_cut(clip_file(), share)), ClipStatus.TRUNCATED, "mdat box ends at byte")


def test_a_writer_that_was_killed(clip_file: ClipFile):
    path = clip_file()
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov") - 4])
    _assert_dropped(_decode_one(path), ClipStatus.TRUNCATED, "no moov box")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
@pytest.mark.parametrize(
    ("name", "part"), [("clip.mkv", "segment ends at byte"), ("clip.avi", "RIFF chunk ends at byte")]
)
def test_truncated_files_that_ffmpeg_reads_without_complaint(
    clip_file: ClipFile, name: str, part: str, share: float
):
    path = clip_file(name, audio_codec="mp3")
    assert _decode_one(path).status is ClipStatus.OK
    _assert_dropped(_decode_one(_cut(path, share)), ClipStatus.TRUNCATED, part)


def test_random_damage_never_raises(clip_file: ClipFile, tmp_path: Path):
    """Cuts, flipped bits and noise in five containers: each file is usable or has a reason."""
    random = np.random.default_rng(0)
    names = {"a.mp4": {}, "b.mp4": {"container_options": FASTSTART}, "c.mkv": {}, "d.ts": {}, "e.avi": {}}
    paths = []
    for name, changes in names.items():
        whole = clip_file(name, num_frames=20, tone_seconds=0.8, audio_codec="mp3", **changes).read_bytes()
        for turn in range(12):
            content = bytearray(whole)
            at = int(random.integers(len(content)))
            if turn % 3 == 0:
                del content[at:]
            elif turn % 3 == 1:
                content[at] ^= 1 << int(random.integers(8))
            else:
                content[at : at + 200] = random.bytes(200)
            paths.append(tmp_path / f"{turn}_{name}")
            paths[-1].write_bytes(content)
    batch = decode(
        [Clip(path=path) for path in paths], [BOTH] * len(paths), SamplingConfig(), num_workers=2
    ).clips
    for clip in batch:
        complete = clip.frames_FHWC is not None and clip.waveform is not None
        assert complete == (clip.status is ClipStatus.OK) == (clip.error is None)
    unusable = {clip.clip.path.name for clip in batch if clip.error is not None}
    assert unusable >= {
        f"{turn}_{name}" for name in names for turn in range(0, 12, 3) if not name.endswith("ts")
    }


@pytest.mark.parametrize("wanted", [("video",), ("audio",), BOTH])
def test_damaged_payload(clip_file: ClipFile, wanted):
    path = clip_file(num_frames=100, tone_seconds=4.0, container_options=FASTSTART)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 100
    noise = np.random.default_rng(0).integers(0, 256, len(content) - start, dtype=np.uint8)
    content[start:] = noise.tobytes()
    path.write_bytes(content)
    _assert_dropped(_decode_one(path, wanted), ClipStatus.CORRUPT, "is corrupt")


def test_no_video_stream(clip_file: ClipFile):
    path = clip_file("sound.m4a", num_frames=0)
    _assert_dropped(_decode_one(path), ClipStatus.NO_VIDEO, "no video stream")
    assert _decode_one(path, ("audio",)).status is ClipStatus.OK


def test_no_audio_stream(clip_file: ClipFile):
    path = clip_file(tone_hertz=None)
    _assert_dropped(_decode_one(path), ClipStatus.NO_AUDIO, "no audio stream")
    assert _decode_one(path, ("video",)).status is ClipStatus.OK


def test_cover_art_is_no_video(tmp_path: Path):
    path = tmp_path / "song.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "rgb24"
        cover.disposition = Disposition.attached_pic
        container.mux(
            cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24"))
        )
        container.mux(cover.encode(None))
    _assert_dropped(_decode_one(path, ("video",)), ClipStatus.NO_VIDEO, "no video stream")


def test_a_window_that_ends_before_the_sound_starts_is_not_silence(clip_file: ClipFile):
    path = clip_file(audio_delay_seconds=1.0)
    window = {"start_seconds": 0.1, "end_seconds": 0.9}
    _assert_dropped(_decode_one(path, **window), ClipStatus.NO_AUDIO, "has no sound in the window")
    assert _decode_one(path, ("video",), **window).status is ClipStatus.OK


def test_a_resolution_that_changes(clip_file: ClipFile):
    small = clip_file("small.ts", tone_hertz=None)
    large = clip_file("large.ts", tone_hertz=None, width=128, height=96)
    small.write_bytes(small.read_bytes() + large.read_bytes())
    _assert_dropped(_decode_one(small, ("video",)), ClipStatus.RESOLUTION_CHANGE, "96x64", "128x96")


@pytest.mark.parametrize(("start", "end"), [(5.0, 6.0), (1.0, 1.0), (1.5, 0.5)])
def test_a_window_without_content(clip_file: ClipFile, start: float, end: float):
    path = clip_file()
    window = {"start_seconds": start, "end_seconds": end}
    _assert_dropped(
        _decode_one(path, **window), ClipStatus.NO_VIDEO, f"the window from {start:g} s to {end:g} s"
    )
    _assert_dropped(
        _decode_one(path, ("audio",), **window), ClipStatus.NO_AUDIO, "has no sound in the window"
    )


@pytest.mark.parametrize("name", ["one.mp4", "one.avi"])
def test_one_frame_is_too_short_for_a_video(clip_file: ClipFile, name: str):
    path = clip_file(name, num_frames=1, tone_seconds=0.1, audio_codec="mp3")
    clip = _decode_one(path)
    _assert_dropped(clip, ClipStatus.TOO_SHORT)
    assert clip.error == (
        f"{path} has 1 video frame, media.min_frames asks for at least 2: set it to 1 to repeat the frame, "
        "as the reference does"
    )
    assert _decode_one(path, ("audio",)).status is ClipStatus.OK


def test_the_frames_of_the_window_are_the_ones_that_count(clip_file: ClipFile):
    path = clip_file()
    window = {"start_seconds": 1.0, "end_seconds": 1.12}
    dropped = _decode_one(path, ("video",), 4, **window)
    _assert_dropped(
        dropped, ClipStatus.TOO_SHORT, "has 3 video frames in the window from 1 s to 1.12 s", "at least 4",
        "set it to 3",
    )  # fmt: skip
    assert _decode_one(path, ("video",), 3, **window).status is ClipStatus.OK


def test_one_bad_clip_does_not_disturb_its_batch(clip_file: ClipFile, tmp_path: Path):
    good, cut = clip_file("good.mp4"), _cut(clip_file("cut.mp4", container_options=FASTSTART), 0.5)
    paths = [good, cut, good, tmp_path / "nowhere.mp4", good]
    batch = decode([Clip(path=path) for path in paths], [BOTH] * 5, SamplingConfig(), num_workers=3).clips
    assert [clip.status for clip in batch] == ["ok", "truncated", "ok", "missing", "ok"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_bad_files_leave_no_file_open(clip_file: ClipFile, tmp_path: Path):
    cut = _cut(clip_file("cut.mp4", container_options=FASTSTART), 0.5)
    headless = _cut(clip_file("headless.mp4"), 0.5)
    clips = [Clip(path=path) for path in (cut, headless, clip_file("good.mp4"))] * 10
    decode(clips, [BOTH] * len(clips), SamplingConfig(), num_workers=2)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    decode(clips, [BOTH] * len(clips), SamplingConfig(), num_workers=2)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_logging_of_the_decoder_stays_off(clip_file: ClipFile):
    """With it on, a damaged file and a multi-threaded decoder can wait for each other forever."""
    _decode_one(clip_file())
    assert get_level() is None
