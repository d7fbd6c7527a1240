"""One clip from its file to sound and compressed pictures, and its result.

PyAV's logging stays off: with it on, a damaged file and a multi-threaded decoder wait for each other forever.
"""

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from torch import Tensor

from omnigrpo.media.clip_error import ClipError, Deadline
from omnigrpo.media.container_check import hash_open_clip
from omnigrpo.media.frames_pyav import FrameDecoder, Pictures
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.sound import decode_waveform
from omnigrpo.media.tracks import Track, Window, open_tracks
from omnigrpo.schema import Clip, ClipStatus, DecodedClip, Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenedClip:
    """A clip whose sound is decoded and whose pictures are still compressed; its file is open."""

    content_hash: str
    waveform: Tensor | None
    """float32 mono; None when audio was not asked for."""
    frames: FrameDecoder | None
    """None when video was not asked for."""


DecodeSound = Callable[[BufferedReader, Track[AudioStream], Window, int, Deadline], Tensor]
"""From an open file and its audio track to float32 mono samples of a window at a rate, as ``decode_waveform``."""


def decode_sound(
    file: BufferedReader, track: Track[AudioStream], window: Window, sample_rate_hz: int, deadline: Deadline
) -> Tensor:
    """Decode the track with FFmpeg."""
    return decode_waveform(track, window, sample_rate_hz, deadline)


@contextmanager
def open_clip(
    clip: Clip,
    wanted: Sequence[Modality],
    sampling: SamplingConfig,
    deadline: Deadline,
    decode_sound: DecodeSound = decode_sound,
) -> Iterator[OpenedClip]:
    """Demux a clip, decode its sound, and make its pictures ready; raises ClipError."""
    with open_file(clip.path) as file:
        digest = hash_open_clip(file, clip, deadline)
        with open_tracks(file, clip, deadline) as tracks:
            frames, waveform = None, None
            if "video" in wanted:
                if tracks.video is None or not tracks.video.packets:
                    raise ClipError(ClipStatus.NO_VIDEO, "has no video stream, but its prompt asks for video")
                _check_codec(tracks.video)
                frames = FrameDecoder(tracks.video, tracks.window, sampling, deadline)
            if "audio" in wanted:
                if tracks.audio is None or not tracks.audio.packets:
                    raise ClipError(ClipStatus.NO_AUDIO, "has no audio stream, but its prompt asks for audio")
                _check_codec(tracks.audio)
                waveform = decode_sound(file, tracks.audio, tracks.window, sampling.sample_rate_hz, deadline)
            yield OpenedClip(content_hash=digest, waveform=waveform, frames=frames)


def _check_codec(track: Track[VideoStream] | Track[AudioStream]) -> None:
    """Raise ClipError when FFmpeg has no decoder for the track: PyAV then gives no context, whatever its types say."""
    if not track.stream.codec_context:
        raise ClipError(
            ClipStatus.UNSUPPORTED_CODEC,
            f"has {track.stream.type} of a codec without a decoder; re-encode it, as H.264 and AAC for example",
        )


def decoded_clip(
    clip: Clip, opened: OpenedClip, pictures: Pictures | None, sampling: SamplingConfig
) -> DecodedClip:
    """The result of a clip that can be used."""
    return DecodedClip(
        clip=clip,
        status=ClipStatus.OK,
        error=None,
        frames_FHWC=None if pictures is None else pictures.frames_FHWC,
        waveform=opened.waveform,
        sample_rate_hz=sampling.sample_rate_hz,
        content_hash=opened.content_hash,
        decoder=None if pictures is None else pictures.decoder,
        num_pictures=0 if pictures is None else pictures.num_decoded,
    )


def failed_clip(clip: Clip, error: ClipError, sampling: SamplingConfig) -> DecodedClip:
    """The result of a clip that cannot be used."""
    return DecodedClip(
        clip=clip,
        status=error.status,
        error=f"{clip.path} {error}",
        frames_FHWC=None,
        waveform=None,
        sample_rate_hz=sampling.sample_rate_hz,
        content_hash=None,
        decoder=None,
        num_pictures=0,
    )


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file that is not empty, without waiting (as a pipe would make one wait)."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ClipError(ClipStatus.MISSING, "does not exist; check the path in the data file") from error
    except (OSError, ValueError) as error:
        raise ClipError(ClipStatus.UNREADABLE, f"cannot be read: {_reason(error)}") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise ClipError(ClipStatus.UNREADABLE, "cannot be read: it is no regular file")
    with os.fdopen(handle, "rb") as file:
        if status.st_size == 0:
            raise ClipError(ClipStatus.UNREADABLE, "is empty (zero bytes)")
        try:
            yield file
        except OSError as error:  # Of the file itself, or of a demuxer that wants to go where there is none.
            raise ClipError(ClipStatus.UNREADABLE, f"cannot be read: {_reason(error)}") from error


def _reason(error: OSError | ValueError) -> str:
    return getattr(error, "strerror", None) or str(error)
