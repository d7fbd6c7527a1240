"""Decoded pictures as upright RGB.

Chroma is interpolated bilinearly, as DALI does on either device, so that both decoders give the same frames.
"""

from collections.abc import Sequence

import torch
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from omnigrpo.media.clip_error import ClipError
from omnigrpo.media.sampling import Colour
from omnigrpo.schema import ClipStatus

_FLAGS = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND


class RgbFrames:
    """Collects the wanted pictures of one clip in one tensor.

    Args:
        wanted: what tells each frame's picture, in the order of the frames; short clips repeat pictures.
        colour: how pictures become RGB.
    """

    def __init__(self, wanted: Sequence[int], colour: Colour) -> None:
        self._rows: dict[int, list[int]] = {}
        for row, picture in enumerate(wanted):
            self._rows.setdefault(picture, []).append(row)
        self._missing = set(self._rows)
        self._convert = _Converter(colour)
        self._frames_FHWC: Tensor | None = None

    def __contains__(self, picture: object) -> bool:
        """Whether the picture is wanted."""
        return picture in self._rows

    @property
    def is_complete(self) -> bool:
        """Whether every wanted picture was added."""
        return not self._missing

    def add(self, picture: int, frame: VideoFrame) -> None:
        """Convert a wanted picture in place; ClipError when its size is not that of the others."""
        turns = round(frame.rotation / 90) % 4  # Rotation is a counter-clockwise angle, quarter turns only.
        size = (frame.height, frame.width) if turns % 2 == 0 else (frame.width, frame.height)
        if self._frames_FHWC is None:
            self._frames_FHWC = torch.empty(sum(map(len, self._rows.values())), *size, 3, dtype=torch.uint8)
        frames_FHWC = self._frames_FHWC
        if frames_FHWC.shape[1:3] != size:
            had, got = (f"{width}x{height}" for height, width in (tuple(frames_FHWC.shape[1:3]), size))
            raise ClipError(
                ClipStatus.RESOLUTION_CHANGE,
                f"is unusable: it has frames of {had} and {got}; re-encode it at one size",
            )
        first, *others = (frames_FHWC[row] for row in self._rows[picture])
        if turns:
            first.copy_(torch.rot90(self._convert(frame), k=turns))
        else:
            self._convert(frame, first)
        for other in others:
            other.copy_(first)
        self._missing.discard(picture)

    def tensor(self) -> Tensor:
        """uint8 RGB ``[F, height, width, 3]`` of all frames."""
        assert self._frames_FHWC is not None, "at least one picture is wanted"
        assert self.is_complete, f"pictures {sorted(self._missing)} were not added"
        return self._frames_FHWC


class _Converter:
    """Keeps swscale's tables from one picture to the next."""

    def __init__(self, colour: Colour) -> None:
        self._source = Colorspace.ITU601 if colour == "bt601" else None
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame, out_HWC: Tensor | None = None) -> Tensor:
        """uint8 RGB ``[height, width, 3]``, in ``out_HWC`` if given."""
        rgb = self._reformatter.reformat(
            frame, format="rgb24", src_colorspace=self._source, interpolation=_FLAGS
        )
        image_HWC = torch.from_numpy(rgb.to_ndarray())
        return image_HWC if out_HWC is None else out_HWC.copy_(image_HWC)
