"""Shared-prefix attention on CUDA: launches of the Triton kernels.

Legend: ``T`` packed rows, ``Q`` rows of q, ``N`` query heads, ``K`` key/value heads, ``H`` head width.

    o = softmax(scale q k^T) v        D = rowsum(do o)        dS = P (do v^T - D)
    dq = scale dS k                   dk = scale dS^T q       dv = P^T do

Every row of a group's completions sees the whole prefix, so four fifths of the work of an update need no mask: a tile
of queries goes over the prefix as it is, then over its own completion. A tile takes the heads that share keys in turn,
row after row, because completions are short: with 7 heads to a key/value head, 128 pairs are 19 rows, and what a tile
computes beyond the diagonal or in a neighbouring completion is that much less than with 128 rows of one head.

dk and dv have their own kernel, which keeps a tile of keys and streams queries, so nothing is added by atomics. A
prefix is few tiles with many queries: 2,048 rows and 2 key/value heads are 32 programs. So their queries, all heads'
blocks in a row, are cut into parts of equal work; the parts leave float32 sums, which a last kernel adds in order.
The cut depends on the number of multiprocessors, and so do the last bits of dk and dv; runs on one card are equal.

The backward gets P = exp(scale q k^T - lse) from the log-sum-exp, so each rounding of lse is a relative error of P: up
to |lse| 2^-24, or 4e-5 at 700 nats, where a softmax that has the row's maximum is exact. Where P is rounded to 8 or 11
bits that is nothing. Where P is a float32, lse is a float64, for 4 bytes more a row and head.
"""

import importlib
import math
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout
from omnigrpo_kernels.shared_prefix_tiles import KeyTiles, Segments, find_segments, key_tiles, query_tiles
from omnigrpo_kernels.triton_launch import launch

PARTS_PER_MULTIPROCESSOR = 4
"""Programs of the keys' kernel: enough that the last ones to run are a small part of the whole."""
KEPT_LAYOUTS = 8
SLICE = 16
"""Rows of a tile whose partial sums one program adds."""
LOG2_E = math.log2(math.e)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """How one kernel cuts its work; head widths up to 64 and up to 128 each have their own."""

    rows: int
    """Of the tile that a program keeps."""
    step: int
    """Rows of the blocks that stream past."""
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """The blocks of the three kernels, for one head width, dtype and architecture."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


NARROW_HEADS = Tiling(
    forward=Blocks(rows=128, step=64, num_warps=4, num_stages=3),
    queries=Blocks(rows=128, step=64, num_warps=8, num_stages=3),
    keys=Blocks(rows=128, step=64, num_warps=8, num_stages=3),
)
"""bfloat16 and float16 on sm_90, heads up to 64 wide."""
WIDE_HEADS = Tiling(
    forward=Blocks(rows=128, step=64, num_warps=8, num_stages=3),
    queries=Blocks(rows=128, step=64, num_warps=8, num_stages=2),
    keys=Blocks(rows=128, step=64, num_warps=8, num_stages=2),
)
"""The same up to 128."""
ANY_CARD = Tiling(
    forward=Blocks(rows=64, step=64, num_warps=4, num_stages=2),
    queries=Blocks(rows=64, step=32, num_warps=4, num_stages=2),
    keys=Blocks(rows=64, step=32, num_warps=4, num_stages=2),
)
"""On other architectures: at most 99 KiB, which every GPU since sm_80 has."""
FLOAT32 = Tiling(
    forward=Blocks(rows=32, step=32, num_warps=4, num_stages=2),
    queries=Blocks(rows=32, step=32, num_warps=4, num_stages=2),
    keys=Blocks(rows=32, step=32, num_warps=4, num_stages=2),
)
"""IEEE products, without tensor cores."""


def attention_forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of every query.

    Args:
        q_TNH: ``[Q, N, H]`` bfloat16, float16 or float32: all rows, or the completions' without ``prefix_queries``.
        k_TKH: ``[T, K, H]``.
        v_TKH: ``[T, K, H]``.
        layout: which rows are which.
        scale: of the scores; positive.

    Returns:
        o ``[Q, N, H]`` in the dtype of q, and in `lse_dtype` the log-sum-exp ``[N, Q]`` in nats. Raises ValueError
        for a dtype, head width or scale that the kernels do not have.
    """
    _check_scale(scale)
    plan = _plan_of(q_TNH, k_TKH, layout)
    with torch.cuda.device_of(q_TNH):
        return plan.forward(_rows(q_TNH), _rows(k_TKH), _rows(v_TKH), scale)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp, for inputs of ``dtype``: float32 where P is rounded to half precision, else float64."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def attention_backward(
    do_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq ``[Q, N, H]``, dk and dv ``[T, K, H]``, prefix rows included, in the inputs' dtype.

    ``o_TNH`` and ``lse_NT`` are `attention_forward`'s; raises as it does.
    """
    _check_scale(scale)
    plan = _plan_of(q_TNH, k_TKH, layout)
    dq_TNH, dk_TKH, dv_TKH = (
        torch.empty(rows.shape, dtype=rows.dtype, device=rows.device) for rows in (q_TNH, k_TKH, v_TKH)
    )
    do_TNH, q_TNH, k_TKH, v_TKH, o_TNH = (_rows(rows) for rows in (do_TNH, q_TNH, k_TKH, v_TKH, o_TNH))
    given = do_TNH, q_TNH, k_TKH, v_TKH, o_TNH, lse_NT.contiguous()
    with torch.cuda.device_of(q_TNH):
        plan.backward(*given, scale, dq_TNH, dk_TKH, dv_TKH)
    return dq_TNH, dk_TKH, dv_TKH


class AttentionPlan:
    """Both directions for one layout, dtype and geometry: what their launches share is made at the first one.

    Rows that it is given or writes have their heads side by side and are 16-byte aligned: ``[T, (N + 2K) * H]`` holds
    q, k and v. The device of the tensors must be the current one.
    """

    def __init__(
        self,
        layout: SharedPrefixLayout,
        device: torch.device,
        dtype: torch.dtype,
        num_heads: int,
        num_kv_heads: int,
        width: int,
    ) -> None:
        """Raises ValueError for a dtype or head width that the kernels do not have."""
        _check(dtype, width)
        self.num_query_rows, self.num_rows = layout.num_query_rows, layout.num_rows
        self.num_heads, self.num_kv_heads, self.width = num_heads, num_kv_heads, width
        self._layout, self._device, self._dtype = layout, device, dtype
        self._heads_per_kv = num_heads // num_kv_heads
        self._head_block = max(16, 1 << (width - 1).bit_length())
        """The power of two that holds a head, at least what a tensor core takes."""
        self._tiling = _tiling(device, dtype, self._head_block)
        self._kernels = _kernels()

    def forward(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """o ``[Q, N, H]`` and log-sum-exp ``[N, Q]``."""
        shape = self.num_query_rows, self.num_heads, self.width
        o_TNH = torch.empty(shape, dtype=self._dtype, device=self._device)
        lse_NT = torch.empty(shape[1::-1], dtype=lse_dtype(self._dtype), device=self._device)
        tiles, blocks = self._forward_tiles, self._tiling.forward
        if not len(tiles):
            return o_TNH, lse_NT
        block = [blocks.step, self._head_block]
        launch(
            self._kernels.attend_tiles,
            len(tiles) * self.num_kv_heads,
            q_TNH,
            self._kernels.describe(k_TKH, block),
            self._kernels.describe(v_TKH, block),
            self._first_rows,
            tiles,
            o_TNH,
            lse_NT,
            q_TNH.stride(0),
            self.num_query_rows,
            self.num_kv_heads,
            scale * LOG2_E,
            **self._constants(blocks),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        return o_TNH, lse_NT

    def backward(
        self,
        do_TNH: Tensor,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        o_TNH: Tensor,
        lse_NT: Tensor,
        scale: float,
        dq_TNH: Tensor,
        dk_TKH: Tensor,
        dv_TKH: Tensor,
    ) -> None:
        """Write dq ``[Q, N, H]``, dk and dv ``[T, K, H]``; the last two have one row stride."""
        if not self.num_query_rows:
            dk_TKH.zero_()
            dv_TKH.zero_()
            return
        dots_NT = torch.empty(lse_NT.shape, dtype=torch.float32, device=self._device)
        self._query_gradient(do_TNH, q_TNH, k_TKH, v_TKH, o_TNH, lse_NT, dots_NT, scale, dq_TNH)
        self._key_gradients(do_TNH, q_TNH, k_TKH, v_TKH, lse_NT, dots_NT, scale, dk_TKH, dv_TKH)

    def _query_gradient(
        self,
        do_TNH: Tensor,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        o_TNH: Tensor,
        lse_NT: Tensor,
        dots_NT: Tensor,
        scale: float,
        dq_TNH: Tensor,
    ) -> None:
        blocks, tiles = self._tiling.queries, self._backward_tiles
        block = [blocks.step, self._head_block]
        launch(
            self._kernels.query_gradient_tiles,
            len(tiles) * self.num_kv_heads,
            do_TNH,
            q_TNH,
            self._kernels.describe(k_TKH, block),
            self._kernels.describe(v_TKH, block),
            o_TNH,
            lse_NT,
            dots_NT,
            self._first_rows,
            tiles,
            dq_TNH,
            do_TNH.stride(0),
            q_TNH.stride(0),
            o_TNH.stride(0),
            dq_TNH.stride(0),
            self.num_query_rows,
            self.num_kv_heads,
            scale * LOG2_E,
            **self._constants(blocks),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )

    def _key_gradients(
        self,
        do_TNH: Tensor,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKH: Tensor,
        lse_NT: Tensor,
        dots_NT: Tensor,
        scale: float,
        dk_TKH: Tensor,
        dv_TKH: Tensor,
    ) -> None:
        blocks, tiles = self._tiling.keys, self._key_tiles
        partials = torch.empty(
            (tiles.num_slots, self.num_kv_heads, 2, blocks.rows, self.width),
            dtype=torch.float32,
            device=self._device,
        )
        block = [blocks.step, self._head_block]
        launch(
            self._kernels.key_gradient_tiles,
            len(tiles.table) * self.num_kv_heads,
            self._kernels.describe(do_TNH, block),
            self._kernels.describe(q_TNH, block),
            k_TKH,
            v_TKH,
            lse_NT,
            dots_NT,
            self._past_rows,
            tiles.table,
            partials,
            dk_TKH,
            dv_TKH,
            k_TKH.stride(0),
            v_TKH.stride(0),
            dk_TKH.stride(0),
            self.num_query_rows,
            self.num_kv_heads,
            scale * LOG2_E,
            **self._constants(blocks),
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
        if len(tiles.sums):
            launch(
                self._kernels.sum_partials,
                len(tiles.sums) * self.num_kv_heads * (blocks.rows // SLICE),
                partials,
                tiles.sums,
                dk_TKH,
                dv_TKH,
                dk_TKH.stride(0),
                self.num_kv_heads,
                WIDTH=self.width,
                HEAD=self._head_block,
                ROWS=blocks.rows,
                SLICE=SLICE,
            )

    def _constants(self, blocks: Blocks) -> dict[str, int | bool]:
        """Of the kernels that multiply."""
        return {
            "HEADS": self._heads_per_kv,
            "WIDTH": self.width,
            "HEAD": self._head_block,
            "ROWS": blocks.rows,
            "COLUMNS": blocks.step,
            "UPCAST": self._kernels.INTERPRETED,
        }

    @cached_property
    def _segments(self) -> Segments:
        return find_segments(self._layout)

    @cached_property
    def _first_rows(self) -> Tensor:
        """int32 ``[T]``: where the segment of each row begins."""
        return self._segments.first_T.to(self._device, torch.int32)

    @cached_property
    def _past_rows(self) -> Tensor:
        """int32 ``[T]``: the row after the last one that sees each row."""
        return self._segments.past_T.to(self._device, torch.int32)

    @cached_property
    def _forward_tiles(self) -> Tensor:
        return self._query_tiles(self._tiling.forward.rows)

    @cached_property
    def _backward_tiles(self) -> Tensor:
        rows = self._tiling.queries.rows
        return self._forward_tiles if rows == self._tiling.forward.rows else self._query_tiles(rows)

    def _query_tiles(self, rows: int) -> Tensor:
        tiles = query_tiles(self._layout, self._segments, heads_per_kv=self._heads_per_kv, rows=rows)
        return tiles.to(self._device)

    @cached_property
    def _key_tiles(self) -> KeyTiles:
        tiles = key_tiles(
            self._layout,
            self._segments,
            heads_per_kv=self._heads_per_kv,
            num_kv_heads=self.num_kv_heads,
            rows=self._tiling.keys.rows,
            block=self._tiling.keys.step,
            num_parts=PARTS_PER_MULTIPROCESSOR * num_multiprocessors(self._device),
        )
        return replace(tiles, table=tiles.table.to(self._device), sums=tiles.sums.to(self._device))


attention_plan = lru_cache(maxsize=KEPT_LAYOUTS)(AttentionPlan)
"""The plan of these arguments, which hashes all lengths: a caller with many layers asks once."""


def _plan_of(q_TNH: Tensor, k_TKH: Tensor, layout: SharedPrefixLayout) -> AttentionPlan:
    num_kv_heads, width = k_TKH.shape[1:]
    return attention_plan(layout, q_TNH.device, q_TNH.dtype, q_TNH.shape[1], num_kv_heads, width)


@cache
def num_multiprocessors(device: torch.device) -> int:
    """On the CPU, where the interpreter runs the kernels, any number does."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _tiling(device: torch.device, dtype: torch.dtype, head_block: int) -> Tiling:
    if dtype == torch.float32:
        return FLOAT32
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return ANY_CARD
    return NARROW_HEADS if head_block <= 64 else WIDE_HEADS


def _rows(rows_TNH: Tensor) -> Tensor:
    """The rows themselves, or a copy where no descriptor fits: heads must be side by side, rows 16-byte aligned."""
    step = 16 // rows_TNH.element_size()
    side_by_side = rows_TNH.stride()[1:] == (rows_TNH.shape[2], 1)
    if side_by_side and rows_TNH.stride(0) % step == 0 and rows_TNH.data_ptr() % 16 == 0:
        return rows_TNH
    return rows_TNH.clone(memory_format=torch.contiguous_format)


@cache
def _kernels() -> ModuleType:
    """The kernels, and triton with them, at the first use: the package imports without triton."""
    try:
        return importlib.import_module("omnigrpo_kernels.shared_prefix_attention_triton")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise ImportError(
            "shared_prefix_attention on CUDA needs triton >= 3.6, which is not installed: "
            "pip install 'triton>=3.6' (CUDA builds of torch for Linux bring it along)",
            name="triton",
        ) from error


def _check(dtype: torch.dtype, width: int) -> None:
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"shared_prefix_attention on CUDA: got {dtype}; give bfloat16, float16 or float32 "
            "(float64 runs on the CPU)"
        )
    if width % 8 or not 8 <= width <= 128:
        raise ValueError(
            f"shared_prefix_attention on CUDA: got heads {width} wide; give a multiple of 8 up to 128"
        )


def _check_scale(scale: float) -> None:
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"shared_prefix_attention on CUDA: got scale {scale}; it must be finite and above 0")
