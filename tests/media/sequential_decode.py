"""The judge: all pictures of a file, decoded one after the other and converted by swscale alone.

Of 8-bit 4:2:0 pictures of even sizes swscale gets a copy that says nothing of where chroma samples lie: the engine and
DALI take them to lie in the middle of four luma samples, whatever the stream says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from torch import Tensor

FLAGS = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """All pictures of a file, decoded one after the other."""

    images: tuple[Tensor, ...]
    """uint8 RGB ``[height, width, 3]``, upright."""
    seconds: tuple[Fraction, ...]
    """When each is shown, after the first one that is stored."""

    def pick(self, num_frames: int, start: float | None = None, end: float | None = None) -> Tensor:
        """The middles of equal segments of what is shown in a window."""
        inside = [
            image
            for image, at in zip(self.images, self.seconds, strict=True)
            if (start is None or at >= start) and (end is None or at < end)
        ]
        step = (len(inside) - 1) / num_frames
        return torch.stack([inside[round((i + 0.5) * step + 1e-6)] for i in range(num_frames)])


def judge(path: Path, colour: str = "tag") -> Judged:
    """Decode a file from its first packet to its last, in one thread."""
    source = Colorspace.ITU601 if colour == "bt601" else None
    reformatter = VideoReformatter()
    images: list[Tensor] = []
    stamps: list[int | None] = []
    starts: list[int] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        for packet in container.demux(stream):
            if packet.pts is not None and not packet.is_discard:
                starts.append(packet.pts)
            for frame in stream.decode(packet):
                rgb = reformatter.reformat(
                    without_siting(frame), format="rgb24", src_colorspace=source, interpolation=FLAGS
                )
                image_HWC = np.rot90(rgb.to_ndarray(), k=round(frame.rotation / 90))
                images.append(torch.from_numpy(image_HWC.copy()))
                stamps.append(frame.pts)
        rate, time_base = stream.average_rate or Fraction(25), stream.time_base or Fraction(1)
    return Judged(images=tuple(images), seconds=_seconds(stamps, min(starts, default=0), rate, time_base))


def without_siting(frame: VideoFrame) -> VideoFrame:
    """A copy without the place of chroma samples, where the engine ignores it; else the frame."""
    is_even = frame.width % 2 == 0 and frame.height % 2 == 0
    if frame.format.name not in ("yuv420p", "yuvj420p") or not is_even:
        return frame
    bare = VideoFrame.from_ndarray(frame.to_ndarray(), format=frame.format.name)
    bare.colorspace, bare.color_range = frame.colorspace, frame.color_range
    return bare


def _seconds(
    stamps: Sequence[int | None], start: int, rate: Fraction, time_base: Fraction
) -> tuple[Fraction, ...]:
    """By the stamps where they ascend, else by the rate."""
    present = [stamp for stamp in stamps if stamp is not None]
    if len(present) == len(stamps) and all(a < b for a, b in pairwise(present)):
        return tuple((stamp - start) * time_base for stamp in present)
    return tuple(ordinal / rate for ordinal in range(len(stamps)))
