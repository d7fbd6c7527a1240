"""Pictures of 8-bit YUV 4:2:0 to RGB, with chroma interpolated bilinearly.

Legend: ``H`` x ``W`` luma samples and pixels, ``h`` x ``w`` chroma samples, half as many each way.

A chroma sample lies in the middle of four luma samples, so a pixel's chroma is a sum of four samples with weights 9, 3,
3 and 1 (edges repeat). With y = 16 Y - offset, and u, v = that sum - 2048, all in integers:

    R = (luma y + red_v v + 2^16) >> 17        G = (luma y + green_u u + green_v v + 2^16) >> 17
    B = (luma y + blue_u u + 2^16) >> 17       clamped to 0 .. 255

These are the very numbers of FFmpeg's swscale with BILINEAR, FULL_CHR_H_INT and ACCURATE_RND (``yuv2rgb_write_full`` in
libswscale/output.c), and of DALI's video decoder, from 8 x 8 pixels on; only where both luma and blue chroma are near
255 does swscale overflow, to a blue of 0. A 720p picture takes 0.5 ms with AVX2, and 2.2 ms in swscale.
"""

import torch
from torch import Tensor

from omnigrpo_kernels import extension

_VIDEO_BLACK = 16

_RED_V_BLUE_U_GREEN_U_GREEN_V = {
    1: (117489, 138438, 13975, 34925),
    2: (104597, 132201, 25675, 53279),
    4: (104448, 132798, 24759, 53109),
    5: (104597, 132201, 25675, 53279),
    6: (104597, 132201, 25675, 53279),
    7: (117579, 136230, 16907, 35559),
    9: (110013, 140363, 12277, 42626),
}
"""Multiplied by 2^16, for video range; by ``matrix_coefficients`` of ITU-T H.273 (``ff_yuv2rgb_coeffs`` in FFmpeg)."""

BT601, BT709, UNSPECIFIED = 6, 1, 2
MATRICES = frozenset(_RED_V_BLUE_U_GREEN_U_GREEN_V)
"""What ``matrix`` may be: BT.709 (1), none named, which means BT.601 (2), FCC (4), BT.601 (5 and 6), SMPTE 240M (7),
BT.2020 (9)."""


def coefficients(matrix: int, *, is_full_range: bool) -> list[int]:
    """``[offset, luma, red_v, green_u, green_v, blue_u]``, all but the first multiplied by 2^13.

    Source: ``ff_yuv2rgb_c_init_tables`` in libswscale/yuv2rgb.c.
    """
    if matrix not in MATRICES:
        raise ValueError(f"matrix must be one of {sorted(MATRICES)} (ITU-T H.273), got {matrix}")
    red_v, blue_u, green_u, green_v = _RED_V_BLUE_U_GREEN_U_GREEN_V[matrix]
    luma, offset = (1 << 16) * 255 // 219, 16 * _VIDEO_BLACK
    if is_full_range:
        luma, offset = 1 << 16, 0
        red_v, blue_u, green_u, green_v = (value * 224 // 255 for value in (red_v, blue_u, green_u, green_v))
    return [offset, *((value + 4) >> 3 for value in (luma, red_v, -green_u, -green_v, blue_u))]


def yuv420_to_rgb_reference(
    y_HW: Tensor, u_hw: Tensor, v_hw: Tensor, *, matrix: int, is_full_range: bool
) -> Tensor:
    """As ``yuv420_to_rgb``, in plain PyTorch."""
    offset, luma, red_v, green_u, green_v, blue_u = coefficients(matrix, is_full_range=is_full_range)
    u_HW, v_HW = (_upsampled(_upsampled(plane.int(), 0), 1) - 2048 for plane in (u_hw, v_hw))
    scaled_HW = (16 * y_HW.int() - offset) * luma + (1 << 16)
    channels = (
        scaled_HW + red_v * v_HW,
        scaled_HW + green_u * u_HW + green_v * v_HW,
        scaled_HW + blue_u * u_HW,
    )
    return torch.stack([(channel >> 17).clamp(0, 255) for channel in channels], dim=-1).to(torch.uint8)


def yuv420_to_rgb(
    y_HW: Tensor, u_hw: Tensor, v_hw: Tensor, *, matrix: int, is_full_range: bool, out: Tensor | None = None
) -> Tensor:
    """uint8 RGB ``[H, W, 3]`` of one picture on the CPU.

    Args:
        y_HW: uint8; rows may be padded (any row stride), H and W are even.
        u_hw: uint8 ``[H / 2, W / 2]``, likewise.
        v_hw: uint8 ``[H / 2, W / 2]``, likewise.
        matrix: one of MATRICES.
        is_full_range: luma from 0 to 255, where video has 16 to 235.
        out: contiguous uint8 ``[H, W, 3]`` that is written and returned; None makes a new one.

    Raises:
        ValueError: planes that are no uint8 matrices on the CPU, or of other sizes; an unknown matrix.
    """
    height, width = y_HW.shape if y_HW.ndim == 2 else (0, 0)
    if not height or not width or height % 2 or width % 2:
        raise ValueError(f"y_HW must be a matrix of even, positive sizes, got shape {tuple(y_HW.shape)}")
    half = (height // 2, width // 2)
    for name, plane, size in (("y_HW", y_HW, (height, width)), ("u_hw", u_hw, half), ("v_hw", v_hw, half)):
        _check(name, plane, size)
    numbers = coefficients(matrix, is_full_range=is_full_range)
    if out is None:
        out = torch.empty(height, width, 3, dtype=torch.uint8)
    _check("out", out, (height, width, 3))
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {out.stride()}")
    extension.load()
    torch.ops.omnigrpo.yuv420_to_rgb(y_HW, u_hw, v_hw, out, numbers)
    return out


def _check(name: str, plane: Tensor, size: tuple[int, ...]) -> None:
    if (
        plane.dtype != torch.uint8
        or plane.device.type != "cpu"
        or plane.shape != size
        or plane.stride(-1) != 1
    ):
        raise ValueError(
            f"{name} must be uint8 {list(size)} on the CPU with dense rows, got {plane.dtype} "
            f"{list(plane.shape)} on {plane.device} with strides {plane.stride()}"
        )


def _upsampled(chroma: Tensor, dim: int) -> Tensor:
    """Three parts of the nearer sample and one of the farther, for twice as many places."""
    first, last = chroma.narrow(dim, 0, 1), chroma.narrow(dim, -1, 1)
    size = chroma.shape[dim]
    before = torch.cat([first, chroma.narrow(dim, 0, size - 1)], dim)
    after = torch.cat([chroma.narrow(dim, 1, size - 1), last], dim)
    return torch.stack([3 * chroma + before, 3 * chroma + after], dim + 1).flatten(dim, dim + 1)
