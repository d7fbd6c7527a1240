"""Decoding one clip on the CPU with PyAV.

PyAV's logging stays off: with it on, a damaged file and a multi-threaded decoder wait for each other forever.
"""

import os
from collections.abc import Sequence
from io import BufferedReader

from torch import Tensor

from omnigrpo.media.container_check import hash_open_clip
from omnigrpo.media.pyav_audio import decode_waveform
from omnigrpo.media.pyav_frames import decode_frames
from omnigrpo.media.pyav_tracks import ClipError, open_tracks
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, ClipStatus, DecodedClip, Modality


def decode_clip(clip: Clip, wanted: Sequence[Modality], sampling: SamplingConfig) -> DecodedClip:
    """Decode what is wanted of one clip; bad input becomes a status and a sentence, never an exception."""
    frames, waveform, digest = None, None, None
    status, error_text = ClipStatus.OK, None
    try:
        with clip.path.open("rb") as file:
            digest = hash_open_clip(file, clip)
            frames, waveform = _decode_file(file, clip, wanted, sampling)
    except ClipError as error:
        status, error_text = error.status, f"{clip.path} {error}"
    except FileNotFoundError:
        status, error_text = (
            ClipStatus.MISSING,
            f"{clip.path} does not exist; check the path in the data file",
        )
    except OSError as error:
        status, error_text = ClipStatus.UNREADABLE, f"{clip.path} cannot be read: {error.strerror or error}"
    return DecodedClip(
        clip=clip,
        status=status,
        error=error_text,
        frames_FHWC=frames,
        waveform=waveform,
        sample_rate_hz=sampling.sample_rate_hz,
        content_hash=digest,
    )


def _decode_file(
    file: BufferedReader, clip: Clip, wanted: Sequence[Modality], sampling: SamplingConfig
) -> tuple[Tensor | None, Tensor | None]:
    if os.fstat(file.fileno()).st_size == 0:
        raise ClipError(ClipStatus.UNREADABLE, "is empty (zero bytes)")
    with open_tracks(file, clip) as tracks:
        frames, waveform = None, None
        if "video" in wanted:
            if tracks.video is None or not tracks.video.packets:
                raise ClipError(ClipStatus.NO_VIDEO, "has no video stream, but its prompt asks for video")
            frames = decode_frames(tracks.video, tracks.window, sampling)
        if "audio" in wanted:
            if tracks.audio is None or not tracks.audio.packets:
                raise ClipError(ClipStatus.NO_AUDIO, "has no audio stream, but its prompt asks for audio")
            waveform = decode_waveform(tracks.audio, tracks.window, sampling.sample_rate_hz)
        return frames, waveform
