"""The waveform of an audio track, mono, resampled, and aligned with the video."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.error import FFmpegError
from torch import Tensor

from omnigrpo.media.clip_error import ClipError, Deadline
from omnigrpo.media.tracks import Track, Window
from omnigrpo.schema import ClipStatus

_MAX_SILENCE_SECONDS = 3600.0
"""Longest silence put in front of a late sound and into its gaps; beyond it the time stamps are broken."""
_JUMP_SECONDS = 0.1
"""Time stamps that are further off than this from the samples before are a gap, or an overlap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """Sound without a gap."""

    start_seconds: float
    """Container time of the first sample."""
    samples: Tensor
    """float32 mono at the wanted rate."""


def decode_waveform(
    track: Track[AudioStream], window: Window, sample_rate_hz: int, deadline: Deadline
) -> Tensor:
    """Return float32 mono samples of the window; sample 0 is the window's start.

    Sound lies where its time stamps say: silence fills what comes before it and its gaps, and what begins before
    the window is cut off. Mono is swresample's: floating-point stereo gives 0.707 (L + R), as in the reference's
    decord reader.

    Raises:
        ClipError: NO_AUDIO without a sample in the window, CORRUPT when a packet cannot be decoded, TIMEOUT.
    """
    try:
        stretches = [resampled(frames, at, sample_rate_hz) for at, frames in _stretches(track, deadline)]
    except (FFmpegError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ClipError(ClipStatus.CORRUPT, f"is corrupt: {reason} while decoding audio") from error
    return place(stretches, window, sample_rate_hz)


def place(stretches: Sequence[Stretch], window: Window, sample_rate_hz: int) -> Tensor:
    """Lay stretches of sound on the window's time line; raises as ``decode_waveform``."""
    begin_seconds = window.origin_seconds + (window.start_seconds or 0.0)
    placed = [(round((s.start_seconds - begin_seconds) * sample_rate_hz), s.samples) for s in stretches]
    length = max((at + len(samples) for at, samples in placed), default=0)
    if window.end_seconds is not None:
        seconds = window.end_seconds - (window.start_seconds or 0.0)
        length = min(length, round(seconds * sample_rate_hz))
    silent_seconds = (length - sum(len(samples) for _, samples in placed)) / sample_rate_hz
    if silent_seconds > _MAX_SILENCE_SECONDS:
        raise ClipError(ClipStatus.CORRUPT, f"is corrupt: its sound has gaps of {silent_seconds:.0f} s")
    waveform, is_heard = torch.zeros(max(length, 0)), False
    for at, samples in placed:
        inside = samples[max(-at, 0) : max(length - at, 0)]
        waveform[max(at, 0) : max(at, 0) + len(inside)] = inside
        is_heard = is_heard or len(inside) > 0
    if not is_heard:
        raise ClipError(ClipStatus.NO_AUDIO, f"has no sound in {window}")
    return waveform


def _stretches(track: Track[AudioStream], deadline: Deadline) -> Iterator[tuple[float, Sequence[AudioFrame]]]:
    """Decode all packets; yields (container time, blocks of one format without a gap between them)."""
    frames: list[AudioFrame] = []
    start_seconds = end_seconds = 0.0
    for frame in _decoded(track, deadline):
        at = frame.time
        if not frames:
            start_seconds = end_seconds = (track.start_seconds or 0.0) if at is None else at
        elif _format(frame) != _format(frames[0]) or (
            at is not None and abs(at - end_seconds) > _JUMP_SECONDS
        ):
            yield start_seconds, frames
            frames, start_seconds = [], end_seconds if at is None else at
            end_seconds = start_seconds
        frames.append(frame)
        end_seconds += frame.samples / frame.sample_rate
    if frames:
        yield start_seconds, frames


def _decoded(track: Track[AudioStream], deadline: Deadline) -> Iterator[AudioFrame]:
    for packet in (*track.packets, None):
        deadline.check()
        yield from track.stream.decode(packet)


def _format(frame: AudioFrame) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def resampled(frames: Sequence[AudioFrame], start_seconds: float, sample_rate_hz: int) -> Stretch:
    """Resample one stretch as a whole: a call per decoded block would cost more than the resampling."""
    whole = _joined(frames)
    whole.sample_rate = frames[0].sample_rate
    resampler = AudioResampler(format="flt", layout="mono", rate=sample_rate_hz)
    blocks = [block.to_ndarray()[0] for part in (whole, None) for block in resampler.resample(part)]
    samples = torch.from_numpy(np.concatenate(blocks)) if blocks else torch.empty(0)
    return Stretch(start_seconds=start_seconds, samples=samples)


def _joined(frames: Sequence[AudioFrame]) -> AudioFrame:
    """One frame of all samples.

    Planar floating-point stereo is mixed here, as swresample does but before it resamples: half the work, equal to
    3e-7. The mix goes straight into the frame that is resampled: further copies would cost more than the sums.
    """
    kind, layout, _ = _format(frames[0])
    if (kind, layout) == ("fltp", "stereo"):
        whole = AudioFrame(format="fltp", layout="mono", samples=sum(frame.samples for frame in frames))
        mono = np.frombuffer(memoryview(whole.planes[0]), np.float32, whole.samples)
        start = 0
        for frame in frames:
            left, right = (
                np.frombuffer(memoryview(plane), np.float32, frame.samples) for plane in frame.planes
            )
            part = mono[start : start + frame.samples]
            np.add(left, right, out=part)
            part *= np.float32(math.sqrt(0.5))
            start += frame.samples
        return whole
    decoded: list[np.ndarray] = [frame.to_ndarray() for frame in frames]
    return AudioFrame.from_ndarray(np.concatenate(decoded, axis=1), format=kind, layout=layout)
