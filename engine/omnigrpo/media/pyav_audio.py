"""The waveform of an audio track, mono, resampled, and aligned with the video."""

from collections.abc import Iterator

import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.error import FFmpegError
from torch import Tensor

from omnigrpo.media.pyav_tracks import ClipError, Track, Window
from omnigrpo.schema import ClipStatus

_MAX_DELAY_SECONDS = 3600.0
"""Longest silence put in front of a late sound; beyond it the time stamps are broken."""


def decode_waveform(track: Track[AudioStream], window: Window, sample_rate_hz: int) -> Tensor:
    """Return float32 mono samples of the window; sample 0 is the window's start.

    Sound that begins after the window's start is preceded by that much silence, sound before it is cut off.
    Mono is swresample's: floating-point stereo gives 0.707 (L + R), as in the reference's decord reader.

    Raises:
        ClipError: NO_AUDIO without a sample in the window, CORRUPT when a packet cannot be decoded.
    """
    blocks: list[np.ndarray] = []
    start_seconds: float | None = None
    try:
        for frame in _resampled(track, sample_rate_hz):
            if start_seconds is None:
                start_seconds = track.start_seconds if frame.time is None else frame.time
            blocks.append(frame.to_ndarray()[0])
    except (FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(ClipStatus.CORRUPT, f"is corrupt: {reason} while decoding audio") from error
    samples = torch.from_numpy(np.concatenate(blocks)) if blocks else torch.empty(0)
    begin_seconds = window.origin_seconds + (window.start_seconds or 0.0)
    delay_seconds = (start_seconds or 0.0) - begin_seconds
    if delay_seconds > _MAX_DELAY_SECONDS:
        raise ClipError(ClipStatus.CORRUPT, f"is corrupt: its sound starts {delay_seconds:.0f} s late")
    delay = round(delay_seconds * sample_rate_hz)
    aligned = _shift(samples, delay)
    if window.end_seconds is not None:
        length = round((window.end_seconds - (window.start_seconds or 0.0)) * sample_rate_hz)
        aligned = aligned[: max(length, 0)]
    if aligned.numel() <= max(delay, 0):
        raise ClipError(ClipStatus.NO_AUDIO, f"has no sound in {window}")
    return aligned.contiguous()


def _resampled(track: Track[AudioStream], sample_rate_hz: int) -> Iterator[AudioFrame]:
    """Decode all packets and resample them as one stream."""
    resampler = AudioResampler(format="flt", layout="mono", rate=sample_rate_hz)
    for packet in (*track.packets, None):
        for frame in track.stream.decode(packet):
            yield from resampler.resample(frame)
    yield from resampler.resample(None)


def _shift(samples: Tensor, num_samples: int) -> Tensor:
    """Delay by adding silence, or advance by cutting."""
    if num_samples < 0:
        return samples[-num_samples:]
    return torch.cat([samples.new_zeros(num_samples), samples]) if samples.numel() else samples
