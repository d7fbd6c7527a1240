"""A probe says what a file holds, what decoding takes of it, and ends in the status that decoding ends in."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_files import broken_files
from clip_matrix import H264, OLDER, VP_AND_AV1, MatrixClip, write
from mp4_boxes import set_rotation
from sequential_decode import judge

from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.decode import decode
from omnigrpo.media.probe import AudioFacts, ProbedClip, VideoFacts, probe_clip, probe_each
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, ClipStatus, Modality

BOTH: tuple[Modality, ...] = ("video", "audio")
EIGHT_OF_50 = (3, 9, 15, 21, 28, 34, 40, 46)
SAMPLING = SamplingConfig()

ClipFile = Callable[..., Path]


def _probe(path: Path, needed=BOTH, sampling: SamplingConfig = SAMPLING, **window: float) -> ProbedClip:
    return probe_clip(Clip(path=path, **window), needed, sampling, Deadline.after(60.0))


def test_everything_about_an_h264_clip(clip_file: ClipFile):
    path = clip_file()
    probed = _probe(path)
    probe = probed.probe
    assert (probe.status, probe.reason, probe.is_usable) == (ClipStatus.OK, None, True)
    assert probe.container == "mp4"
    assert probe.duration_seconds == pytest.approx(2.0, abs=0.03)
    assert probe.video == VideoFacts(
        codec="h264", width=96, height=64, frames_per_second=25.0, num_frames=50, rotation_degrees=0
    )
    assert probe.audio == AudioFacts(codec="aac", sample_rate_hz=44_100, num_channels=2, layout="stereo")
    assert probe.frames is not None
    assert probe.frames.indices == EIGHT_OF_50
    assert probe.frames.seconds == tuple(index / 25 for index in EIGHT_OF_50)
    assert (probe.frames.last_seconds, probe.frames.num_pictures) == (49 / 25, 50)
    ours = decode([Clip(path=path)], [BOTH], SAMPLING).clips[0]
    assert probed.frames_FHWC is not None
    assert probed.waveform is not None
    assert ours.frames_FHWC is not None
    assert ours.waveform is not None
    assert torch.equal(probed.frames_FHWC, ours.frames_FHWC)
    assert torch.equal(probed.waveform, ours.waveform)
    assert probe.num_decoded == ours.num_pictures < 50
    assert probe.is_sparse
    assert probe.sound_seconds == len(probed.waveform) / 16_000


@pytest.mark.parametrize(
    ("name", "changes", "container", "video", "audio"),
    [
        ("a.mov", {"rate": 30, "audio_rate": 48_000}, "mov", "h264", "aac"),
        ("a.mkv", {}, "mkv", "h264", "aac"),
        ("a.ts", {"codec": "mpeg2video", "options": {}, "audio_codec": "mp2"}, "ts", "mpeg2video", "mp2"),
        ("a.avi", {"codec": "mpeg4", "options": {}, "audio_codec": "mp3"}, "avi", "mpeg4", "mp3"),
        ("a.mpg", {"codec": "mpeg1video", "options": {}, "audio_codec": "mp2"}, "mpg", "mpeg1video", "mp2"),
        ("a.webm", {"codec": "libvpx", "options": {"b:v": "1M"}, "audio_codec": "libopus", "audio_rate": 48_000},
         "webm", "vp8", "opus"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("a.") else "",
)  # fmt: skip
def test_containers_and_codecs_by_their_usual_names(
    clip_file: ClipFile, name: str, changes: dict, container: str, video: str, audio: str
):
    probe = _probe(clip_file(name, **changes)).probe
    assert probe.reason is None
    assert probe.container == container
    assert probe.video is not None
    assert probe.audio is not None
    assert (probe.video.codec, probe.audio.codec) == (video, audio)
    assert probe.video.frames_per_second == pytest.approx(changes.get("rate", 25))
    assert probe.video.num_frames == 50
    assert probe.audio.sample_rate_hz == changes.get("audio_rate", 44_100)
    assert probe.is_sparse == (container != "avi")


def test_the_content_names_the_container_where_the_extension_lies(clip_file: ClipFile):
    path = clip_file("a.mkv")
    for name, container in (("a.mp4", "mkv"), ("a", "mkv"), ("a.webm", "webm")):
        assert _probe(path.rename(path.with_name(name))).probe.container == container
        path = path.with_name(name)


SOME = tuple(
    clip
    for clip in (*H264, *OLDER, *VP_AND_AV1)
    if clip.recipe.codec in ("libx264", "mpeg2video", "libvpx-vp9")
)


@pytest.mark.parametrize("clip", SOME, ids=lambda clip: clip.name)
def test_indices_and_times_are_those_of_sequential_decoding(tmp_path: Path, clip: MatrixClip):
    path = write(clip, tmp_path)
    judged = judge(path)
    pictures = torch.stack(judged.images).float()
    window = {
        "start_seconds": 0.37 * float(judged.seconds[-1]),
        "end_seconds": 0.81 * float(judged.seconds[-1]),
    }
    for part in ({}, window):
        probed = _probe(path, ("video",), SamplingConfig(num_frames=5, min_frames=1), **part)
        choice = probed.probe.frames
        assert choice is not None, probed.probe.reason
        assert probed.frames_FHWC is not None
        for frame_HWC, index in zip(probed.frames_FHWC, choice.indices, strict=True):
            errors = (pictures - frame_HWC.float()).abs().mean(dim=(1, 2, 3))
            assert errors[index] == errors.min()
        assert choice.seconds == pytest.approx([float(judged.seconds[i]) for i in choice.indices], abs=1e-5)
        inside = [
            float(at)
            for at in judged.seconds
            if not part or part["start_seconds"] <= at < part["end_seconds"]
        ]
        assert choice.last_seconds == pytest.approx(inside[-1], abs=1e-5)
        if not part:
            assert choice.num_pictures == len(judged.images)
            assert probed.probe.is_sparse == clip.is_sparse


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_the_average_rate_of_a_variable_one(clip_file: ClipFile, name: str):
    path = clip_file(name, stamps=[20 * i + 3 * i * i for i in range(50)])
    probe = _probe(path).probe
    assert probe.video is not None
    assert probe.video.frames_per_second == pytest.approx(49 / (20 * 49 + 3 * 49 * 49) * 1000, rel=0.021)
    assert probe.frames is not None
    assert probe.frames.seconds == pytest.approx([(20 * i + 3 * i * i) / 1000 for i in EIGHT_OF_50], abs=1e-3)


def test_a_window(clip_file: ClipFile):
    probe = _probe(clip_file("a.mkv"), start_seconds=0.6, end_seconds=1.4).probe
    assert probe.frames is not None
    assert probe.frames.indices == tuple(15 + i for i in (1, 4, 6, 8, 11, 13, 15, 18))
    assert probe.frames.seconds == pytest.approx([i / 25 for i in probe.frames.indices])
    assert probe.sound_seconds == 0.8
    assert probe.duration_seconds == pytest.approx(2.0, abs=0.03)
    assert probe.video is not None
    assert (
        probe.video.num_frames is None
    )  # Matroska's headers do not say, and not all packets may have been read.


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_rotation(clip_file: ClipFile, degrees: int):
    probed = _probe(set_rotation(clip_file(), degrees))
    assert probed.probe.video is not None
    assert probed.probe.video.rotation_degrees == degrees
    assert (probed.probe.video.width, probed.probe.video.height) == (96, 64)
    assert probed.frames_FHWC is not None
    assert probed.frames_FHWC.shape[1:3] == ((64, 96) if degrees == 180 else (96, 64))


def test_sound_alone_is_described_and_decoded_but_not_usable(clip_file: ClipFile):
    path = clip_file("sound.m4a", num_frames=0)
    probed = _probe(path)
    assert (probed.probe.status, probed.probe.reason) == (ClipStatus.NO_VIDEO, "has no video stream")
    assert probed.probe.container == "m4a"
    assert probed.probe.video is None
    assert probed.probe.frames is None
    assert probed.waveform is not None
    assert probed.probe.sound_seconds == pytest.approx(2.0, abs=0.05)
    assert _probe(path, ("audio",)).probe.is_usable


def test_pictures_alone_are_described_and_decoded_but_not_usable(clip_file: ClipFile):
    path = clip_file(tone_hertz=None)
    probed = _probe(path)
    assert (probed.probe.status, probed.probe.reason) == (ClipStatus.NO_AUDIO, "has no audio stream")
    assert probed.probe.frames is not None
    assert probed.probe.frames.indices == EIGHT_OF_50
    assert probed.frames_FHWC is not None
    assert probed.waveform is None
    assert _probe(path, ("video",)).probe.is_usable


def test_what_is_not_needed_is_described_but_not_decoded(clip_file: ClipFile):
    probed = _probe(clip_file(), ("audio",))
    assert probed.probe.is_usable
    assert probed.probe.video is not None
    assert probed.probe.video.rotation_degrees is None
    assert probed.probe.frames is None
    assert probed.frames_FHWC is None


def test_headers_of_a_truncated_file_are_told(clip_file: ClipFile):
    path = clip_file(container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-9000])
    probe = _probe(path).probe
    assert probe.status is ClipStatus.TRUNCATED
    assert probe.video is not None
    assert (probe.video.codec, probe.video.num_frames) == ("h264", 50)
    assert probe.audio is not None
    assert probe.frames is None
    assert probe.num_decoded is None


def test_every_broken_file_ends_as_in_decoding(tmp_path: Path):
    files = [file for file in broken_files() if file.wanted == BOTH]
    clips = [Clip(path=tmp_path / file.name) for file in files]
    for file, clip in zip(files, clips, strict=True):
        clip.path.write_bytes(file.content())
    clips += [Clip(path=tmp_path), Clip(path=tmp_path / "nowhere.mp4")]
    probed = probe_each(clips, BOTH, SAMPLING, lambda p: p, num_workers=2, timeout_seconds=60.0)
    decoded = decode(clips, [BOTH] * len(clips), SAMPLING, num_workers=2).clips
    assert [p.probe.clip for p in probed] == clips
    for ours, other in zip(probed, decoded, strict=True):
        assert ours.probe.status is other.status, other.error
        assert (ours.probe.reason is None) == (other.error is None)
        assert (ours.frames_FHWC is None) == (
            other.frames_FHWC is None
        ) or ours.probe.status is ClipStatus.NO_AUDIO
        if ours.frames_FHWC is not None and other.frames_FHWC is not None:
            assert torch.equal(ours.frames_FHWC, other.frames_FHWC)
            assert ours.probe.num_decoded == other.num_pictures
        if ours.probe.video is not None and ours.probe.audio is not None:
            assert other.error in (None, f"{other.clip.path} {ours.probe.reason}")
    assert len({p.probe.status for p in probed}) >= 6


def test_a_directory_says_that_it_holds_nothing(tmp_path: Path):
    probe = _probe(tmp_path).probe
    assert (probe.status, probe.reason) == (ClipStatus.UNREADABLE, "is a directory without media files")


def test_a_clip_that_takes_too_long(clip_file: ClipFile):
    clips = [Clip(path=clip_file("a.mp4")), Clip(path=clip_file("b.mp4"))]
    probes = probe_each(clips, BOTH, SAMPLING, lambda p: p.probe, num_workers=1, timeout_seconds=1e-6)
    assert [probe.status for probe in probes] == [ClipStatus.TIMEOUT] * 2
    assert all(probe.reason is not None and "was not decoded within" in probe.reason for probe in probes)
