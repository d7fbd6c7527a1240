"""Decoded pictures as upright RGB.

Chroma is interpolated bilinearly, and a chroma sample is taken to lie in the middle of four luma samples even where the
stream says otherwise (H.264 mostly has it at their left): so DALI does on either device, and both decoders give the
same frames. Pictures of other kinds than 8-bit 4:2:0 of even sizes, which only this decoder takes, keep their siting.
"""

from collections.abc import Sequence

import torch
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from omnigrpo.media.clip_error import ClipError
from omnigrpo.media.frame_memory import FRAME_MEMORY
from omnigrpo.media.sampling import Colour
from omnigrpo.schema import ClipStatus
from omnigrpo_kernels.yuv_to_rgb import BT601, MATRICES, yuv420_to_rgb

_FLAGS = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
_FULL_RANGE_420 = "yuvj420p"
_EIGHT_BIT_420 = ("yuv420p", _FULL_RANGE_420)


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
            self._frames_FHWC = FRAME_MEMORY.empty(sum(map(len, self._rows.values())), *size, 3)
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
    """Turns pictures into RGB: the common kind by the extension's op, others by swscale, whose tables it keeps."""

    def __init__(self, colour: Colour) -> None:
        self._is_always_bt601 = colour == "bt601"
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame, out_HWC: Tensor | None = None) -> Tensor:
        """uint8 RGB ``[height, width, 3]``, in ``out_HWC`` if given."""
        matrix = BT601 if self._is_always_bt601 else int(frame.colorspace)
        is_even = frame.width % 2 == 0 and frame.height % 2 == 0
        if frame.format.name in _EIGHT_BIT_420 and is_even and matrix in MATRICES:
            return _by_op(frame, matrix, out_HWC)
        return self._by_swscale(frame, out_HWC)

    def _by_swscale(self, frame: VideoFrame, out_HWC: Tensor | None) -> Tensor:
        source = Colorspace.ITU601 if self._is_always_bt601 else None
        try:
            rgb = self._reformatter.reformat(
                frame, format="rgb24", src_colorspace=source, interpolation=_FLAGS
            )
        except OSError as error:
            raise ClipError(
                ClipStatus.UNSUPPORTED_CODEC,
                f"has pictures of format {frame.format.name} and colour matrix {int(frame.colorspace)} "
                "(ITU-T H.273), which FFmpeg does not turn into RGB; re-encode it, as H.264 in BT.709 for example",
            ) from error
        image_HWC = torch.from_numpy(rgb.to_ndarray())
        return image_HWC if out_HWC is None else out_HWC.copy_(image_HWC)


def _by_op(frame: VideoFrame, matrix: int, out_HWC: Tensor | None) -> Tensor:
    y_HW, u_hw, v_hw = (_visible(plane) for plane in frame.planes)
    is_full_range = frame.format.name == _FULL_RANGE_420 or frame.color_range == ColorRange.JPEG
    return yuv420_to_rgb(y_HW, u_hw, v_hw, matrix=matrix, is_full_range=is_full_range, out=out_HWC)


def _visible(plane: VideoPlane) -> Tensor:
    """The plane's own memory, without what pads its rows."""
    rows = torch.frombuffer(plane, dtype=torch.uint8, count=plane.height * plane.line_size)
    return rows.view(plane.height, plane.line_size)[:, : plane.width]
