"""What a file holds, what a run would take from it, and whether it can use it."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.video.stream import VideoStream
from torch import Tensor

from omnigrpo.media.clip_error import ClipError, Deadline, timeout_error
from omnigrpo.media.decode_pyav import open_clip, open_file
from omnigrpo.media.frame_plan import FrameChoice
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.tracks import audio_stream, open_container, video_stream
from omnigrpo.media.watched_threads import run_watched
from omnigrpo.schema import Clip, ClipStatus, Modality

R = TypeVar("R")

_UNKNOWN = "unknown"
"""Name of a codec that FFmpeg does not decode."""
_SHORTER = {"matroska": "mkv", "mpegts": "ts", "mpeg": "mpg"}
"""The usual extension, where FFmpeg's name of a format is another."""
_SAME_RATE = 0.02
"""How far the headers' rate may be from the counted one, as a share."""
_MICROSECONDS = 1_000_000
"""Per second; FFmpeg's unit of a container's duration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoFacts:
    """A video stream, as its file's headers describe it."""

    codec: str
    width: int
    """Of the stored pictures, before they are turned upright."""
    height: int
    frames_per_second: float | None
    """The average: counted where all was read, else what the headers say; None where neither tells."""
    num_frames: int | None
    """Counted where the whole file was read, else what its header says; None where neither tells."""
    rotation_degrees: int | None
    """Clockwise turn that sets the pictures upright; None when none was decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioFacts:
    """An audio stream, as its file's headers describe it."""

    codec: str
    sample_rate_hz: int
    num_channels: int
    layout: str
    """FFmpeg's name, e.g. ``stereo``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipProbe:
    """What a file holds and what becomes of it."""

    clip: Clip
    status: ClipStatus
    """What decoding ended in."""
    reason: str | None
    """Why the clip cannot be used: a sentence whose subject is the path; None when it can."""
    container: str | None = None
    """e.g. ``mp4``; None when the file is not media."""
    duration_seconds: float | None = None
    """Of the whole file."""
    video: VideoFacts | None = None
    audio: AudioFacts | None = None
    frames: FrameChoice | None = None
    """Which frames would be taken."""
    num_decoded: int | None = None
    """Pictures that were decoded for them."""
    is_sparse: bool = False
    """Whether pictures that no frame needs are skipped; else all are decoded, to be counted."""
    sound_seconds: float | None = None
    """Length of the waveform of the window."""

    @property
    def is_usable(self) -> bool:
        """Whether a run would use the clip."""
        return self.status is ClipStatus.OK


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbedClip:
    """A probe, and what was decoded for it."""

    probe: ClipProbe
    frames_FHWC: Tensor | None = None
    """uint8 RGB ``[F, height, width, 3]``."""
    waveform: Tensor | None = None
    """float32 mono, at the rate of the sampling."""


def probe_each(
    clips: Sequence[Clip],
    needed: Sequence[Modality],
    sampling: SamplingConfig,
    then: Callable[[ProbedClip], R],
    *,
    num_workers: int,
    timeout_seconds: float,
) -> list[R]:
    """Decode clips in threads, exactly as a run would, and return ``then`` of each, in order.

    Args:
        clips: what to look at.
        needed: the modalities that every clip must have; the others are described, but not decoded.
        sampling: which frames.
        then: called in the thread that decoded the clip, so that full-size frames need not be kept.
        num_workers: threads.
        timeout_seconds: per clip.
    """

    given_up: set[int] = set()

    def one(index: int) -> R:
        probed = probe_clip(clips[index], needed, sampling, Deadline.after(timeout_seconds))
        if index in given_up:
            raise timeout_error(timeout_seconds)  # Its result is there already, and ``then`` was called.
        return then(probed)

    def give_up(index: int) -> R:
        given_up.add(index)
        return then(ProbedClip(probe=_failed(clips[index], timeout_error(timeout_seconds))))

    return run_watched(
        [partial(one, index) for index in range(len(clips))],
        num_threads=num_workers,
        timeout_seconds=timeout_seconds,
        on_timeout=give_up,
    )


def probe_clip(
    clip: Clip, needed: Sequence[Modality], sampling: SamplingConfig, deadline: Deadline
) -> ProbedClip:
    """Describe one clip and decode what is needed of it; bad input becomes a status, never an exception.

    A clip without one of the needed streams cannot be used; the other one is decoded nevertheless, to be looked at.
    """
    try:
        with open_file(clip.path) as file:
            described = _described(file, clip, deadline)
    except ClipError as error:
        return ProbedClip(probe=_failed(clip, error))
    try:
        return _decoded(described, needed, sampling, deadline)
    except ClipError as error:
        failed = replace(described, status=error.status, reason=_reason(error, described))
    if failed.status in (ClipStatus.NO_VIDEO, ClipStatus.NO_AUDIO):
        lacking = "video" if failed.status is ClipStatus.NO_VIDEO else "audio"
        others: list[Modality] = [modality for modality in needed if modality != lacking]
        with suppress(ClipError):
            other = _decoded(described, others, sampling, deadline)
            return replace(other, probe=replace(other.probe, status=failed.status, reason=failed.reason))
    return ProbedClip(probe=failed)


def _described(file: BufferedReader, clip: Clip, deadline: Deadline) -> ClipProbe:
    """What the headers say, of damaged files too."""
    empty = ClipProbe(clip=clip, status=ClipStatus.OK, reason=None)
    try:
        container = open_container(file, deadline)
    except FFmpegError:  # Decoding meets the same error, and says what it means.
        return empty
    with container:
        duration = (container.duration or 0) / _MICROSECONDS
        video, audio = video_stream(container), audio_stream(container)
        return replace(
            empty,
            container=_container_name(container, clip.path),
            duration_seconds=duration if duration > 0 else None,
            video=None if video is None else _video_facts(video),
            audio=None if audio is None else _audio_facts(audio),
        )


def _container_name(container: InputContainer, path: Path) -> str:
    """One of the names that FFmpeg gives a family of formats: the file's extension, where that is one."""
    names = [_SHORTER.get(name, name) for name in container.format.name.split(",")]
    suffix = path.suffix[1:].lower()
    if suffix in names:
        return suffix
    return "mp4" if "mp4" in names else names[0]


def _video_facts(stream: VideoStream) -> VideoFacts:
    codec = stream.codec_context
    rate = stream.average_rate or stream.guessed_rate
    return VideoFacts(
        codec=codec.codec.canonical_name if codec else _UNKNOWN,
        width=codec.width if codec else 0,
        height=codec.height if codec else 0,
        frames_per_second=float(rate) if rate else None,
        num_frames=stream.frames if stream.frames > 0 else None,
        rotation_degrees=None,
    )


def _audio_facts(stream: AudioStream) -> AudioFacts:
    codec = stream.codec_context
    return AudioFacts(
        codec=codec.codec.canonical_name if codec else _UNKNOWN,
        sample_rate_hz=codec.sample_rate if codec else 0,
        num_channels=codec.channels if codec else 0,
        layout=codec.layout.name if codec else _UNKNOWN,
    )


def _decoded(
    described: ClipProbe, wanted: Sequence[Modality], sampling: SamplingConfig, deadline: Deadline
) -> ProbedClip:
    """The clip once it is decoded; raises ClipError."""
    clip = described.clip
    with open_clip(clip, wanted, sampling, deadline) as opened:
        probe, frames_FHWC = described, None
        if opened.frames is not None:
            pictures = opened.frames.decode()
            frames_FHWC, choice = pictures.frames_FHWC, opened.frames.choice()
            assert choice is not None, "decoding counts the pictures"
            video = described.video
            if video is not None:
                video = replace(video, rotation_degrees=opened.frames.rotation_degrees)
                if clip.end_seconds is None:  # Then all packets were read.
                    video = _counted(video, choice)
            probe = replace(
                probe,
                video=video,
                frames=choice,
                num_decoded=pictures.num_decoded,
                is_sparse=opened.frames.is_sparse,
            )
        if opened.waveform is not None:
            probe = replace(probe, sound_seconds=len(opened.waveform) / sampling.sample_rate_hz)
        return ProbedClip(probe=probe, frames_FHWC=frames_FHWC, waveform=opened.waveform)


def _counted(video: VideoFacts, choice: FrameChoice) -> VideoFacts:
    """With the number of pictures, and the rate where the headers' is another: they guess it, or tell the first one."""
    rate, told = video.frames_per_second, video.frames_per_second
    if choice.num_pictures > 1 and choice.last_seconds > 0:
        rate = (choice.num_pictures - 1) / choice.last_seconds
    is_told = rate is not None and told is not None and abs(rate - told) <= _SAME_RATE * told
    return replace(video, num_frames=choice.num_pictures, frames_per_second=told if is_told else rate)


def _failed(clip: Clip, error: ClipError) -> ClipProbe:
    if error.status is ClipStatus.UNREADABLE and os.path.isdir(clip.path):  # noqa: PTH112 (does not raise)
        return ClipProbe(clip=clip, status=error.status, reason="is a directory without media files")
    return ClipProbe(clip=clip, status=error.status, reason=str(error))


def _reason(error: ClipError, described: ClipProbe) -> str:
    """The error's own words, but for a stream that is not there: no prompt asked for it here."""
    if error.status is ClipStatus.NO_VIDEO and described.video is None:
        return "has no video stream"
    if error.status is ClipStatus.NO_AUDIO and described.audio is None:
        return "has no audio stream"
    return str(error)
