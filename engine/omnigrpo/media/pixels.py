"""Frames to the pixels of SigLIP and CLIP towers, batched in torch.

On the CPU equal, bit for bit, to transformers' image processors with their torchvision backend: a bicubic resize of
uint8, then one affine map to float32. Torch has no uint8 kernel for other devices: there the two passes are float32,
rounded and clipped in between as the kernel does; two values in a hundred are a step of uint8 apart, none more than
two. (Without rounding in between, hard edges are ten steps apart.)

Shape suffixes: ``F`` frames, ``H`` height, ``W`` width, ``C`` the three colours, ``S`` side of the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Aspect = Literal["pad", "stretch"]
"""How a frame becomes square: grey bars, or another aspect ratio."""

ClipAspect = Literal["crop", "pad", "stretch"]
"""CLIP's own way besides: the middle of the frame, its shortest side resized."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Colours:
    """What a tower was trained on."""

    mean_C: tuple[float, float, float]
    """Mean of each colour, of 1."""
    std_C: tuple[float, float, float]
    """Standard deviation of each colour, of 1."""

    @property
    def bars_C(self) -> tuple[int, ...]:
        """uint8 colour of the bars that make a frame square: the mean, rounded down, as in ``expand2square``."""
        return tuple(int(255 * mean) for mean in self.mean_C)


_SIGLIP = _Colours(mean_C=(0.5, 0.5, 0.5), std_C=(0.5, 0.5, 0.5))
_CLIP = _Colours(
    mean_C=(0.48145466, 0.4578275, 0.40821073),
    std_C=(0.26862954, 0.26130258, 0.27577711),
)


def siglip_pixels(
    frames_FHWC: Tensor | Sequence[Tensor],
    *,
    image_size: int,
    aspect: Aspect,
    device: torch.device | str | None = None,
) -> Tensor:
    """Resize frames to squares and normalise them to [-1, 1], as ``SiglipImageProcessor`` does.

    Args:
        frames_FHWC: uint8 RGB ``[F, H, W, 3]`` of a clip, or of several clips, each of its own size.
        image_size: side S of the result, pixels.
        aspect: ``pad`` adds grey bars before the resize (HumanOmni's training), ``stretch`` does not (its
            inference).
        device: where to work; the frames' own device by default.

    Returns:
        float32 ``[F, 3, S, S]``, the frames of all clips in their order.

    Raises:
        ValueError: The frames have another dtype or layout, there are none, or they lie on several devices.
    """
    _check_choice(aspect, get_args(Aspect))
    return _pixels(_clips_of(frames_FHWC), image_size, aspect, _SIGLIP, device)


def clip_pixels(
    frames_FHWC: Tensor | Sequence[Tensor],
    *,
    image_size: int = 224,
    aspect: ClipAspect = "crop",
    device: torch.device | str | None = None,
) -> Tensor:
    """Resize frames to squares and normalise them with CLIP's mean and deviation, as ``CLIPImageProcessor`` does.

    Args:
        frames_FHWC: uint8 RGB ``[F, H, W, 3]`` of a clip, or of several clips, each of its own size.
        image_size: side S of the result, pixels.
        aspect: ``crop`` resizes the shortest side to S and cuts out the middle, as the processor does by default;
            ``stretch`` gives the whole frame another aspect ratio (AffectGPT's frames); ``pad`` adds bars of
            CLIP's mean colour before the resize.
        device: where to work; the frames' own device by default.

    Returns:
        float32 ``[F, 3, S, S]``, the frames of all clips in their order.

    Raises:
        ValueError: The frames have another dtype or layout, there are none, or they lie on several devices.
    """
    _check_choice(aspect, get_args(ClipAspect))
    return _pixels(_clips_of(frames_FHWC), image_size, aspect, _CLIP, device)


def _check_choice(aspect: str, choices: tuple[str, ...]) -> None:
    if aspect not in choices:
        *most, last = (repr(choice) for choice in choices)
        raise ValueError(f"aspect must be {', '.join(most)} or {last}, got {aspect!r}")


def _clips_of(frames_FHWC: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One clip or several as a list, each of them checked."""
    clips = [frames_FHWC] if isinstance(frames_FHWC, Tensor) else list(frames_FHWC)
    if not clips:
        raise ValueError("there are no clips to make pixels of; leave the call out")
    for clip in clips:
        if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[-1] != 3:
            raise ValueError(
                f"frames must be uint8 [frames, height, width, 3], got {clip.dtype} "
                f"{list(clip.shape)}; decode them as RGB first"
            )
        if clip.numel() == 0:
            raise ValueError(f"frames must not be empty, got {list(clip.shape)}; leave the clip out")
    return clips


def _pixels(
    clips: list[Tensor],
    side: int,
    aspect: ClipAspect,
    colours: _Colours,
    device: torch.device | str | None,
) -> Tensor:
    if side < 2:  # Torch's uint8 kernel fails an assertion where the result is a single pixel.
        raise ValueError(f"image_size must be at least 2 pixels, got {side}")
    devices = {clip.device for clip in clips}
    if device is None and len(devices) > 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"the clips must lie on one device, got {names}; say which by device=")
    target = torch.device(device) if device is not None else clips[0].device
    pixels_FCSS = torch.empty((sum(len(clip) for clip in clips), 3, side, side), device=target)
    first = 0
    for clip in clips:
        square_FCSS = _square(clip.to(target).permute(0, 3, 1, 2), side, aspect, colours.bars_C)
        pixels_FCSS[first : first + len(clip)] = square_FCSS
        first += len(clip)
    # The processors scale mean and deviation, in float32, and not the pixels: the last bit depends on it.
    mean_C11, std_C11 = (
        (torch.tensor(values, device=target) * 255.0).view(3, 1, 1)
        for values in (colours.mean_C, colours.std_C)
    )
    return pixels_FCSS.sub_(mean_C11).div_(std_C11)


def _square(frames_FCHW: Tensor, side: int, aspect: ClipAspect, bars_C: tuple[int, ...]) -> Tensor:
    """Frames as squares of the given side, values 0-255."""
    height, width = frames_FCHW.shape[-2:]
    if aspect == "crop":
        return _resize_and_crop(frames_FCHW, side)
    if aspect == "stretch" or height == width:
        return _resize(frames_FCHW, side, side)
    resize = _resize_between_bars if width > height else _resize_padded
    if frames_FCHW.device.type != "cpu":
        return resize(frames_FCHW, side, bars_C)
    # One frame at a time stays in cache: 8 padded frames of 720p at once take four times as long.
    return torch.cat([resize(frame, side, bars_C) for frame in frames_FCHW.split(1)])


def _resize_and_crop(frames_FCHW: Tensor, side: int) -> Tensor:
    """Resize the shortest side to ``side`` and cut out the middle."""
    height, width = frames_FCHW.shape[-2:]
    shortest = min(height, width)
    resized = _resize(frames_FCHW, int(side * height / shortest), int(side * width / shortest))
    top, left = ((length - side) // 2 for length in resized.shape[-2:])
    return resized[..., top : top + side, left : left + side]


def _resize_padded(frames_FCHW: Tensor, side: int, bars_C: tuple[int, ...]) -> Tensor:
    """Resize frames padded to squares."""
    longest = max(frames_FCHW.shape[-2:])
    return _resize(_pad(frames_FCHW, longest, longest, bars_C), side, side)


def _resize_between_bars(frames_FCHW: Tensor, side: int, bars_C: tuple[int, ...]) -> Tensor:
    """Resize wide frames as if they had bars above and below: bit-equal to ``_resize_padded``, in half the time.

    The resize goes along rows first and rounds, and that leaves a row of one colour as it is: the bars are missed in
    the second pass only. Bars beside a tall frame are part of the first pass.
    """
    height, width = frames_FCHW.shape[-2:]
    narrow_FCHS = _resize(frames_FCHW, height, side)
    return _resize(_pad(narrow_FCHS, width, side, bars_C), side, side)


def _pad(frames_FCHW: Tensor, height: int, width: int, bars_C: tuple[int, ...]) -> Tensor:
    """Centre each frame between bars; the odd pixel goes to the bottom or right bar. Channels lie last in memory."""
    top, left = (height - frames_FCHW.shape[-2]) // 2, (width - frames_FCHW.shape[-1]) // 2
    bottom, right = top + frames_FCHW.shape[-2], left + frames_FCHW.shape[-1]
    padded_FHWC = frames_FCHW.new_empty((len(frames_FCHW), height, width, 3))
    padded_FHWC[:, top:bottom, left:right] = frames_FCHW.permute(0, 2, 3, 1)
    row_WC = frames_FCHW.new_tensor(bars_C).repeat(
        width, 1
    )  # A row is copied at once, a colour pixel by pixel.
    padded_FHWC[:, :top] = row_WC
    padded_FHWC[:, bottom:] = row_WC
    padded_FHWC[:, top:bottom, :left] = row_WC[:left]
    padded_FHWC[:, top:bottom, right:] = row_WC[right:]
    return padded_FHWC.permute(0, 3, 1, 2)


def _resize(frames_FCHW: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of values 0-255; only the CPU kernel takes uint8."""
    if frames_FCHW.device.type == "cpu":
        return _bicubic(frames_FCHW, height, width)
    return _resize_in_float(frames_FCHW, height, width)


def _resize_in_float(frames_FCHW: Tensor, height: int, width: int) -> Tensor:
    """The two passes of the uint8 kernel in float32."""
    narrow_FCHS = _bicubic(frames_FCHW.float(), frames_FCHW.shape[-2], width).round().clamp(0, 255)
    return _bicubic(narrow_FCHS, height, width).round().clamp(0, 255)


def _bicubic(frames_FCHW: Tensor, height: int, width: int) -> Tensor:
    if frames_FCHW.shape[-2:] == (height, width):
        return frames_FCHW
    return F.interpolate(frames_FCHW, size=(height, width), mode="bicubic", antialias=True)
