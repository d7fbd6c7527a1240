"""Frames to SigLIP pixels, batched in torch.

Shape suffixes: ``F`` frames, ``H`` height, ``W`` width, ``C`` the three colours, ``S`` side of the result.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Aspect = Literal["pad", "stretch"]

PAD_GREY = 127
"""Value of the bars that make a frame square: ``int(255 * 0.5)``, as in HumanOmni's ``expand2square``."""


def siglip_pixels(
    frames_FHWC: Tensor,
    *,
    image_size: int,
    aspect: Aspect,
    device: torch.device | str | None = None,
) -> Tensor:
    """Resize frames to squares and normalise them to [-1, 1].

    Args:
        frames_FHWC: uint8 RGB ``[F, H, W, 3]``.
        image_size: side S of the result, pixels.
        aspect: ``pad`` adds grey bars before the resize (HumanOmni's training), ``stretch`` does not (its
            inference).
        device: where to work; the frames' own device by default.

    Returns:
        float32 ``[F, 3, S, S]``. On the CPU equal to torchvision's bicubic, within 2/255 of Pillow's; other
        devices resize in float32 and round once.
    """
    if frames_FHWC.dtype != torch.uint8 or frames_FHWC.ndim != 4 or frames_FHWC.shape[-1] != 3:
        raise ValueError(
            f"frames must be uint8 [frames, height, width, 3], got {frames_FHWC.dtype} "
            f"{list(frames_FHWC.shape)}; decode them as RGB first"
        )
    if aspect not in ("pad", "stretch"):
        raise ValueError(f"aspect must be 'pad' or 'stretch', got {aspect!r}")
    frames_FCHW = frames_FHWC.to(device or frames_FHWC.device).permute(0, 3, 1, 2)
    height, width = frames_FCHW.shape[-2:]
    if aspect == "pad" and height != width:
        # One frame at a time keeps the square in cache: 8 x 720p take 10 ms on one core, 80 ms at once.
        squares = [_resize_bicubic(_pad_to_square(frame), image_size) for frame in frames_FCHW.split(1)]
        frames_FCHW = torch.cat(squares)
    elif (height, width) != (image_size, image_size):
        frames_FCHW = _resize_bicubic(frames_FCHW, image_size)
    return frames_FCHW.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def _pad_to_square(frames_FCHW: Tensor) -> Tensor:
    """Centre each frame on a grey square; the odd pixel goes to the bottom or right bar."""
    height, width = frames_FCHW.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square_FHWC = frames_FCHW.new_full((frames_FCHW.shape[0], side, side, 3), PAD_GREY)
    square_FHWC[:, top : top + height, left : left + width] = frames_FCHW.permute(0, 2, 3, 1)
    return square_FHWC.permute(0, 3, 1, 2)


def _resize_bicubic(frames_FCHW: Tensor, side: int) -> Tensor:
    """Antialiased bicubic resize; only the CPU kernel takes uint8."""
    if frames_FCHW.device.type == "cpu":
        return F.interpolate(frames_FCHW, size=(side, side), mode="bicubic", antialias=True)
    resized = F.interpolate(frames_FCHW.float(), size=(side, side), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255)
