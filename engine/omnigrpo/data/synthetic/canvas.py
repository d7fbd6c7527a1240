"""Anti-aliased shapes painted on a batch of pictures, each shape only inside its own box.

Shape suffixes: ``F`` pictures, ``H``/``W`` picture rows and columns, ``B`` rows and ``C`` columns of a box.
Arrays over pictures may have length 1 and then serve all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Layer = tuple[np.ndarray, np.ndarray]
"""Coverage ``[F, B, C]`` in 0..1 and colour ``[F or 1, 3]``."""
Shape = Callable[[np.ndarray, np.ndarray], Sequence[Layer]]
"""From box coordinates u (right) and v (down), in head units, to layers painted in order."""
Extent = np.ndarray | np.float32
"""A half-axis per picture, or one for all (a Python float would make everything float64)."""

_MARGIN = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """The head's coordinate frame in each picture, in pixels."""

    x_F: np.ndarray
    y_F: np.ndarray
    unit_F: np.ndarray
    """Pixels per head unit (half the head's height)."""
    roll_F: np.ndarray
    """Radians."""


def over_box(values: np.ndarray) -> np.ndarray:
    """``[F]`` as ``[F, 1, 1]``."""
    return values[:, None, None]


class Canvas:
    """A batch of square RGB pictures in 0..1, kept by colour plane, and the head frame in which shapes are given."""

    def __init__(self, background_3FHW: np.ndarray, frame: Frame) -> None:
        self._side = background_3FHW.shape[-1] + 2 * _MARGIN
        planes = np.zeros((3, len(frame.x_F), self._side, self._side), dtype=np.float32)
        planes[:, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = background_3FHW
        self._planes = planes.reshape(3, -1)
        self._frame = frame
        self._cos, self._sin = np.cos(frame.roll_F), np.sin(frame.roll_F)

    def paint(
        self, u_F: np.ndarray, v_F: np.ndarray, half_u_F: np.ndarray, half_v_F: np.ndarray, shape: Shape
    ) -> None:
        """Paints ``shape`` in a box around (u, v); its coordinates are relative to the box's centre."""
        frame, cos, sin = self._frame, self._cos, self._sin
        x_F = frame.x_F + frame.unit_F * (u_F * cos - v_F * sin) + _MARGIN
        y_F = frame.y_F + frame.unit_F * (u_F * sin + v_F * cos) + _MARGIN
        reach_x = np.max(frame.unit_F * (half_u_F * np.abs(cos) + half_v_F * np.abs(sin))) + 1.5
        reach_y = np.max(frame.unit_F * (half_u_F * np.abs(sin) + half_v_F * np.abs(cos))) + 1.5
        columns_FC = np.floor(x_F - reach_x).astype(np.int64)[:, None] + np.arange(int(2 * reach_x) + 2)
        rows_FB = np.floor(y_F - reach_y).astype(np.int64)[:, None] + np.arange(int(2 * reach_y) + 2)
        dx_F1C = ((columns_FC - x_F[:, None]) / frame.unit_F[:, None]).astype(np.float32)[:, None, :]
        dy_FB1 = ((rows_FB - y_F[:, None]) / frame.unit_F[:, None]).astype(np.float32)[:, :, None]
        cos, sin = over_box(cos), over_box(sin)
        layers = shape(dx_F1C * cos + dy_FB1 * sin, dy_FB1 * cos - dx_F1C * sin)
        self._blend(rows_FB, columns_FC, layers)

    def coverage(self, distance: np.ndarray) -> np.ndarray:
        """Coverage of a signed distance in head units (negative inside), one pixel soft."""
        return np.clip(0.5 - distance * over_box(self._frame.unit_F), 0.0, 1.0)

    def planes(self) -> np.ndarray:
        """The pictures by colour plane ``[3, F, H, W]``, float32."""
        planes = self._planes.reshape(3, -1, self._side, self._side)
        return planes[:, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]

    def _blend(self, rows_FB: np.ndarray, columns_FC: np.ndarray, layers: Sequence[Layer]) -> None:
        rows_FB, columns_FC = (np.clip(index, 0, self._side - 1) for index in (rows_FB, columns_FC))
        rows_FB += self._side * np.arange(len(rows_FB))[:, None]
        index_FBC = (rows_FB * self._side)[:, :, None] + columns_FC[:, None, :]
        for channel, plane in enumerate(self._planes):
            patch = plane[index_FBC]
            for coverage, colour in layers:
                patch += coverage * (over_box(colour[:, channel].astype(np.float32)) - patch)
            plane[index_FBC] = patch


def ellipse(u: np.ndarray, v: np.ndarray, half_u: Extent, half_v: Extent) -> np.ndarray:
    """Approximate signed distance to an axis-parallel ellipse."""
    return (np.sqrt((u / half_u) ** 2 + (v / half_v) ** 2) - 1.0) * np.minimum(half_u, half_v)
