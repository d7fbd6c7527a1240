"""Demuxing: a clip's compressed video and audio packets, its timeline, and whether the file is whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from io import BufferedReader
from typing import Generic, TypeVar

import av
from av.audio.stream import AudioStream
from av.container import InputContainer
from av.error import FFmpegError
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from omnigrpo.media.clip_error import ClipError, Deadline
from omnigrpo.media.container_check import has_stream_table, hole, shortfall
from omnigrpo.schema import Clip, ClipStatus

StreamT = TypeVar("StreamT", VideoStream, AudioStream)

_IO_BUFFER_BYTES = 1 << 18
_WITHOUT_DISPLAY_TIMES = frozenset(("avi", "h264", "hevc", "m4v", "mpegvideo", "obu", "mjpeg"))
"""FFmpeg's names of formats whose time stamps it makes up."""
MAX_PIXELS = 1 << 26
"""Largest picture that is decoded, 8192 x 8192: a damaged header may claim sizes that no memory holds."""
_ALONE = {"protocol_whitelist": "none"}
"""A list or a session description that looks like a clip may open no other file, and no socket."""
_HEADERS_ONLY = {"skip_frame": "all", "probesize": "32", "fpsprobesize": "0"}
"""Opens a file without decoding its first pictures to learn what its headers say: 1 ms instead of 19 for 720p."""
_WITH_PICTURES = {"max_pixels": str(MAX_PIXELS)}
"""Opens a file whose headers do not tell, by decoding its first pictures."""
_BEYOND_WINDOW_SECONDS = 10.0
"""How far behind the end of a window packets are still read: those that are decoded late are stored early."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Track(Generic[StreamT]):
    """One stream and all its packets, still compressed, in decoding order."""

    stream: StreamT
    packets: list[Packet]
    has_display_times: bool
    """Whether the container says when a picture is shown; AVI and raw streams know their order of decoding only."""

    @property
    def time_base(self) -> Fraction:
        """Seconds per unit of a time stamp."""
        return self.stream.time_base or Fraction(1, 1_000_000)

    @property
    def start_seconds(self) -> float | None:
        """When the first picture or sound that is shown starts; None when no packet tells."""
        stamps = [packet.pts for packet in self.packets if packet.pts is not None and not packet.is_discard]
        return float(min(stamps) * self.time_base) if stamps else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The part of the file that the clip means, in seconds after the origin."""

    origin_seconds: float
    """Container time of the first video frame; of the first sound in a file without video."""
    start_seconds: float | None
    end_seconds: float | None

    def __contains__(self, container_seconds: float | Fraction) -> bool:
        after_origin = container_seconds - self.origin_seconds
        if self.start_seconds is not None and after_origin < self.start_seconds:
            return False
        return self.end_seconds is None or after_origin < self.end_seconds

    def __str__(self) -> str:
        end = "the end" if self.end_seconds is None else f"{self.end_seconds:g} s"
        return f"the window from {self.start_seconds or 0:g} s to {end}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracks:
    """The demuxed clip; a track is None when the file has no such stream."""

    video: Track[VideoStream] | None
    audio: Track[AudioStream] | None
    window: Window


def open_container(file: BufferedReader, deadline: Deadline) -> InputContainer:
    """Open a file for demuxing without decoding more than it takes to tell its streams; raises FFmpegError."""
    seconds = deadline.timeout_seconds
    return av.open(
        file,
        mode="r",
        options=_ALONE | (_HEADERS_ONLY if has_stream_table(file) else _WITH_PICTURES),
        buffer_size=_IO_BUFFER_BYTES,
        metadata_errors="replace",
        timeout=(seconds, seconds),
    )


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that is no cover picture."""
    videos = (s for s in container.streams.video if not s.disposition & Disposition.attached_pic)
    return next(videos, None)


def audio_stream(container: InputContainer) -> AudioStream | None:
    """The first audio stream."""
    return next(iter(container.streams.audio), None)


@contextmanager
def open_tracks(file: BufferedReader, clip: Clip, deadline: Deadline) -> Iterator[Tracks]:
    """Demux an open file; the tracks can be decoded while the context is open.

    Raises:
        ClipError: UNREADABLE when it is not media, TRUNCATED or CORRUPT when part of it is missing, TIMEOUT.
    """
    missing = shortfall(file)
    misfit = hole(file) if missing is None else None
    try:
        container = open_container(file, deadline)
    except FFmpegError as error:
        if missing is not None:
            raise ClipError(ClipStatus.TRUNCATED, f"is truncated: {missing}") from error
        raise ClipError(
            ClipStatus.UNREADABLE, f"is not a readable media file: {_words(error)}; check it with a player"
        ) from error
    with container:
        video, audio, failure = _demux(container, clip, deadline)
        if missing is not None or failure is not None:
            raise _incomplete(video or audio, missing, failure)
        if misfit is not None:
            raise ClipError(ClipStatus.CORRUPT, f"is corrupt: {misfit}")
        yield Tracks(video=video, audio=audio, window=_window(clip, video, audio))


def _demux(
    container: InputContainer, clip: Clip, deadline: Deadline
) -> tuple[Track[VideoStream] | None, Track[AudioStream] | None, FFmpegError | None]:
    """Read the packets of the first real video stream and the first audio stream, until a failure."""
    pictures, sound = video_stream(container), audio_stream(container)
    timed = container.format.name not in _WITHOUT_DISPLAY_TIMES
    video = Track(stream=pictures, packets=[], has_display_times=timed) if pictures else None
    audio = Track(stream=sound, packets=[], has_display_times=timed) if sound else None
    tracks = {track.stream.index: track for track in (video, audio) if track is not None}
    if not tracks:
        return None, None, None
    unfinished = set(tracks)
    try:
        for packet in container.demux([track.stream for track in tracks.values()]):
            deadline.check()
            if packet.size > 0:
                tracks[packet.stream_index].packets.append(packet)
                if _is_beyond(packet, clip, tracks[packet.stream_index]):
                    unfinished.discard(packet.stream_index)
            if not unfinished:
                break
    except FFmpegError as error:
        return video, audio, error
    except (
        IndexError
    ):  # All is read, but PyAV cannot flush streams that show up after the header, as in FLV and MPEG.
        pass
    return video, audio, None


def _is_beyond(packet: Packet, clip: Clip, track: Track[VideoStream] | Track[AudioStream]) -> bool:
    """Whether no packet from here on can belong to the clip's window."""
    first = track.packets[0].dts
    if clip.end_seconds is None or packet.dts is None or first is None:
        return False
    return float((packet.dts - first) * track.time_base) > clip.end_seconds + _BEYOND_WINDOW_SECONDS


def _incomplete(
    track: Track[VideoStream] | Track[AudioStream] | None,
    missing: str | None,
    failure: FFmpegError | None,
) -> ClipError:
    """The error of a file whose packets end too soon."""
    why = missing or _words(failure)
    if track is None:
        return ClipError(ClipStatus.TRUNCATED, f"is truncated: {why}")
    present, declared = len(track.packets), track.stream.frames
    if declared > present or missing is not None:
        counts = f"{present} of {declared or 'an unknown number of'} {track.stream.type} packets are there"
        return ClipError(ClipStatus.TRUNCATED, f"is truncated: {counts}; {why}")
    return ClipError(ClipStatus.CORRUPT, f"is corrupt: reading stopped after {present} packets; {why}")


def _window(clip: Clip, video: Track[VideoStream] | None, audio: Track[AudioStream] | None) -> Window:
    starts = [track.start_seconds for track in (video, audio) if track is not None]
    origin = next((start for start in starts if start is not None), 0.0)
    return Window(origin_seconds=origin, start_seconds=clip.start_seconds, end_seconds=clip.end_seconds)


def _words(error: FFmpegError | None) -> str:
    """FFmpeg's own words for what went wrong."""
    return "" if error is None else (error.strerror or type(error).__name__)
