"""Exact uniform frames of a video track: counted from its packets, decoded up to the last one wanted."""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from omnigrpo.media.pyav_tracks import ClipError, Track, Window
from omnigrpo.media.sampling import SamplingConfig, uniform_frame_indices
from omnigrpo.schema import ClipStatus


class _OutOfStepError(Exception):
    """The decoder's frames are not the shown packets one for one, so time stamps cannot choose frames."""


def decode_frames(track: Track[VideoStream], window: Window, sampling: SamplingConfig) -> Tensor:
    """Return uint8 RGB ``[sampling.num_frames, height, width, 3]``, turned upright as the file's rotation says.

    Colour follows the stream's own tag (BT.601 without one) with swscale's default chroma filter.

    Raises:
        ClipError: NO_VIDEO without a frame in the window, TOO_SHORT with fewer than ``sampling.min_frames``,
            CORRUPT when a frame up to the last wanted one is damaged or the resolution changes.
    """
    track.stream.codec_context.thread_type = "NONE"
    try:
        try:
            chosen = _by_time_stamp(track, window, sampling)
        except _OutOfStepError:
            chosen = _by_counting(track, window, sampling)
    except FFmpegError as error:
        raise ClipError(ClipStatus.CORRUPT, f"is corrupt: {error.strerror} while decoding video") from error
    return torch.from_numpy(np.stack(chosen))


def _by_time_stamp(track: Track[VideoStream], window: Window, sampling: SamplingConfig) -> list[np.ndarray]:
    """Choose from the packets' time stamps, then decode once from the keyframe before the first choice."""
    shown = [packet.pts for packet in track.packets if not packet.is_discard]
    stamps = sorted(pts for pts in shown if pts is not None)
    if len(set(stamps)) != len(shown):
        raise _OutOfStepError
    wanted = _choose([pts for pts in stamps if pts * track.time_base in window], window, sampling)
    packets, first_pts = _from_keyframe(track.packets, wanted[0])
    expected = iter(stamps[stamps.index(first_pts) :] if first_pts is not None else stamps)
    images: dict[int, np.ndarray] = {}
    for frame in _decode(track.stream, packets):
        if first_pts is not None and frame.pts is not None and frame.pts < first_pts:
            continue
        if frame.pts is None or frame.pts != next(expected, None):
            raise _OutOfStepError
        if frame.pts in wanted:
            images[frame.pts] = _rgb(frame)
        if frame.pts == wanted[-1]:
            return [images[pts] for pts in wanted]
    raise _OutOfStepError


def _by_counting(track: Track[VideoStream], window: Window, sampling: SamplingConfig) -> list[np.ndarray]:
    """Decode everything to count the frames in the window, then again to take the chosen ones.

    For AVI, raw streams and others whose packets lack time stamps, repeat them, or outnumber the frames.
    """
    stamps = [frame.pts for frame in _decode(track.stream, track.packets)]
    seconds = _frame_seconds(track, window, stamps)
    wanted = _choose([ordinal for ordinal, at in enumerate(seconds) if at in window], window, sampling)
    images: dict[int, np.ndarray] = {}
    for ordinal, frame in enumerate(_decode(track.stream, track.packets)):
        if ordinal in wanted:
            images[ordinal] = _rgb(frame)
        if ordinal == wanted[-1]:
            break
    return [images[ordinal] for ordinal in wanted]


def _frame_seconds(
    track: Track[VideoStream], window: Window, stamps: Sequence[int | None]
) -> Sequence[float | Fraction]:
    """Container time of each decoded frame: its stamp when all ascend, else its place at a constant rate."""
    present = [stamp for stamp in stamps if stamp is not None]
    if len(present) == len(stamps) and all(a < b for a, b in pairwise(present)):
        return [stamp * track.time_base for stamp in present]
    rate = track.stream.average_rate or track.stream.guessed_rate or Fraction(25)
    return [window.origin_seconds + float(ordinal / rate) for ordinal in range(len(stamps))]


def _choose(candidates: Sequence[int], window: Window, sampling: SamplingConfig) -> list[int]:
    count = len(candidates)
    if not candidates:
        raise ClipError(ClipStatus.NO_VIDEO, f"has no video frame in {window}")
    if count < sampling.min_frames:
        frames, repeated = ("frame", "the frame") if count == 1 else ("frames", "frames")
        whole = window.start_seconds is None and window.end_seconds is None
        raise ClipError(
            ClipStatus.TOO_SHORT,
            f"has {count} video {frames}{'' if whole else f' in {window}'}, media.min_frames asks for at least "
            f"{sampling.min_frames}: set it to {count} to repeat {repeated}, as the reference does",
        )
    return [candidates[index] for index in uniform_frame_indices(count, sampling.num_frames)]


def _from_keyframe(packets: list[Packet], pts: int) -> tuple[list[Packet], int | None]:
    """Return the packets from the last keyframe at or before ``pts`` and its time stamp; all when none is."""
    starts = [
        at
        for at, packet in enumerate(packets)
        if packet.is_keyframe and not packet.is_discard and packet.pts is not None and packet.pts <= pts
    ]
    return (packets[starts[-1] :], packets[starts[-1]].pts) if starts else (packets, None)


def _decode(stream: VideoStream, packets: Sequence[Packet]) -> Iterator[VideoFrame]:
    """Decode from a clean decoder and check each frame."""
    stream.codec_context.flush_buffers()
    size: tuple[int, int] | None = None
    for packet in (*packets, None):
        for frame in stream.decode(packet):
            if frame.is_corrupt:
                raise ClipError(ClipStatus.CORRUPT, f"is corrupt: the picture at {frame.time} s is damaged")
            if size is not None and size != (frame.width, frame.height):
                raise ClipError(
                    ClipStatus.CORRUPT,
                    f"is unusable: its resolution changes from {size[0]}x{size[1]} to "
                    f"{frame.width}x{frame.height} at {frame.time} s; re-encode it at one size",
                )
            size = (frame.width, frame.height)
            yield frame


def _rgb(frame: VideoFrame) -> np.ndarray:
    """RGB ``[height, width, 3]``, upright; the rotation is a counter-clockwise angle, quarter turns only."""
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))
