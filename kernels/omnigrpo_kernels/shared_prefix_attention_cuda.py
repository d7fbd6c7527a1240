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
from functools import cache, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout
from omnigrpo_kernels.shared_prefix_tiles import KeyTiles, Segments, find_segments, key_tiles, query_tiles

PARTS_PER_MULTIPROCESSOR = 4
"""Programs of the keys' kernel: enough that the last ones to run are a small part of the whole."""
KEPT_LAYOUTS = 8
SLICE = 16
"""Rows of a tile whose partial sums one program adds."""


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
    _check(q_TNH, scale)
    kernels, call = _kernels(), _Call.of(q_TNH, k_TKH, layout)
    q_TNH, k_TKH, v_TKH = (_rows(rows) for rows in (q_TNH, k_TKH, v_TKH))
    o_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    lse_NT = q_TNH.new_empty((q_TNH.shape[1], q_TNH.shape[0]), dtype=lse_dtype(q_TNH.dtype))
    blocks = call.tiling.forward
    tiles = call.query_tiles(blocks)
    if len(tiles):
        block = [blocks.step, call.head_block]
        with torch.cuda.device_of(q_TNH):
            kernels.attend_tiles[(len(tiles) * call.num_kv_heads,)](
                q_TNH,
                kernels.describe(k_TKH, block),
                kernels.describe(v_TKH, block),
                call.first_rows(),
                tiles,
                o_TNH,
                lse_NT,
                q_TNH.stride(0),
                q_TNH.shape[0],
                call.num_kv_heads,
                scale * math.log2(math.e),
                HEADS=call.heads_per_kv,
                WIDTH=call.width,
                HEAD=call.head_block,
                ROWS=blocks.rows,
                COLUMNS=blocks.step,
                UPCAST=kernels.INTERPRETED,
                num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )
    return o_TNH, lse_NT


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
    _check(q_TNH, scale)
    call = _Call.of(q_TNH, k_TKH, layout)
    do_TNH, q_TNH, k_TKH, v_TKH, o_TNH = (_rows(rows) for rows in (do_TNH, q_TNH, k_TKH, v_TKH, o_TNH))
    lse_NT = lse_NT.contiguous()
    with torch.cuda.device_of(q_TNH):
        dots_NT = _output_dots(do_TNH, o_TNH, call)
        dq_TNH = _query_gradient(do_TNH, q_TNH, k_TKH, v_TKH, lse_NT, dots_NT, call, scale)
        dk_TKH, dv_TKH = _key_gradients(do_TNH, q_TNH, k_TKH, v_TKH, lse_NT, dots_NT, call, scale)
    return dq_TNH, dk_TKH, dv_TKH


def _output_dots(do_TNH: Tensor, o_TNH: Tensor, call: "_Call") -> Tensor:
    num_rows, num_heads, width = o_TNH.shape
    dots_NT = o_TNH.new_empty((num_heads, num_rows), dtype=torch.float32)
    rows = 64
    if num_rows:
        _kernels().output_dots[(-(-num_rows // rows) * num_heads,)](
            do_TNH,
            o_TNH,
            dots_NT,
            do_TNH.stride(0),
            o_TNH.stride(0),
            num_rows,
            num_heads,
            WIDTH=width,
            HEAD=call.head_block,
            ROWS=rows,
        )
    return dots_NT


def _query_gradient(
    do_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    lse_NT: Tensor,
    dots_NT: Tensor,
    call: "_Call",
    scale: float,
) -> Tensor:
    kernels, blocks = _kernels(), call.tiling.queries
    dq_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    tiles = call.query_tiles(blocks)
    if len(tiles):
        block = [blocks.step, call.head_block]
        kernels.query_gradient_tiles[(len(tiles) * call.num_kv_heads,)](
            do_TNH,
            q_TNH,
            kernels.describe(k_TKH, block),
            kernels.describe(v_TKH, block),
            lse_NT,
            dots_NT,
            call.first_rows(),
            tiles,
            dq_TNH,
            do_TNH.stride(0),
            q_TNH.stride(0),
            q_TNH.shape[0],
            call.num_kv_heads,
            scale * math.log2(math.e),
            HEADS=call.heads_per_kv,
            WIDTH=call.width,
            HEAD=call.head_block,
            ROWS=blocks.rows,
            COLUMNS=blocks.step,
            UPCAST=kernels.INTERPRETED,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )
    return dq_TNH


def _key_gradients(
    do_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    lse_NT: Tensor,
    dots_NT: Tensor,
    call: "_Call",
    scale: float,
) -> tuple[Tensor, Tensor]:
    kernels, blocks = _kernels(), call.tiling.keys
    dk_TKH, dv_TKH = (torch.empty(k_TKH.shape, dtype=k_TKH.dtype, device=k_TKH.device) for _ in range(2))
    if not len(q_TNH):
        return dk_TKH.zero_(), dv_TKH.zero_()
    tiles = call.key_tiles(blocks)
    partials = k_TKH.new_empty(
        (tiles.num_slots, call.num_kv_heads, 2, blocks.rows, call.width), dtype=torch.float32
    )
    block = [blocks.step, call.head_block]
    kernels.key_gradient_tiles[(len(tiles.table) * call.num_kv_heads,)](
        kernels.describe(do_TNH, block),
        kernels.describe(q_TNH, block),
        k_TKH,
        v_TKH,
        lse_NT,
        dots_NT,
        call.past_rows(),
        tiles.table,
        partials,
        dk_TKH,
        dv_TKH,
        k_TKH.stride(0),
        v_TKH.stride(0),
        q_TNH.shape[0],
        call.num_kv_heads,
        scale * math.log2(math.e),
        HEADS=call.heads_per_kv,
        WIDTH=call.width,
        HEAD=call.head_block,
        ROWS=blocks.rows,
        BLOCK=blocks.step,
        UPCAST=kernels.INTERPRETED,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    if len(tiles.sums):
        kernels.sum_partials[(len(tiles.sums) * call.num_kv_heads * (blocks.rows // SLICE),)](
            partials,
            tiles.sums,
            dk_TKH,
            dv_TKH,
            call.num_kv_heads,
            WIDTH=call.width,
            HEAD=call.head_block,
            ROWS=blocks.rows,
            SLICE=SLICE,
        )
    return dk_TKH, dv_TKH


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What the launches of one call share."""

    layout: SharedPrefixLayout
    device: torch.device
    num_kv_heads: int
    heads_per_kv: int
    width: int
    head_block: int
    """The power of two that holds a head, at least what a tensor core takes."""
    tiling: Tiling

    @classmethod
    def of(cls, q_TNH: Tensor, k_TKH: Tensor, layout: SharedPrefixLayout) -> "_Call":
        num_kv_heads, width = k_TKH.shape[1:]
        head_block = max(16, 1 << (width - 1).bit_length())
        return cls(
            layout=layout,
            device=q_TNH.device,
            num_kv_heads=num_kv_heads,
            heads_per_kv=q_TNH.shape[1] // num_kv_heads,
            width=width,
            head_block=head_block,
            tiling=_tiling(q_TNH, head_block),
        )

    def first_rows(self) -> Tensor:
        """int32 ``[T]``: where the segment of each row begins."""
        return _first_rows(self.layout, self.device)

    def past_rows(self) -> Tensor:
        """int32 ``[T]``: the row after the last one that sees each row."""
        return _past_rows(self.layout, self.device)

    def query_tiles(self, blocks: Blocks) -> Tensor:
        return _query_tiles(self.layout, self.device, self.heads_per_kv, blocks.rows)

    def key_tiles(self, blocks: Blocks) -> KeyTiles:
        return _key_tiles(self.layout, self.device, self.heads_per_kv, self.num_kv_heads, blocks)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _segments(layout: SharedPrefixLayout) -> Segments:
    return find_segments(layout)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _first_rows(layout: SharedPrefixLayout, device: torch.device) -> Tensor:
    return _segments(layout).first_T.to(device, torch.int32)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _past_rows(layout: SharedPrefixLayout, device: torch.device) -> Tensor:
    return _segments(layout).past_T.to(device, torch.int32)


@lru_cache(maxsize=2 * KEPT_LAYOUTS)
def _query_tiles(layout: SharedPrefixLayout, device: torch.device, heads_per_kv: int, rows: int) -> Tensor:
    return query_tiles(layout, _segments(layout), heads_per_kv=heads_per_kv, rows=rows).to(device)


@lru_cache(maxsize=KEPT_LAYOUTS)
def _key_tiles(
    layout: SharedPrefixLayout, device: torch.device, heads_per_kv: int, num_kv_heads: int, blocks: Blocks
) -> KeyTiles:
    tiles = key_tiles(
        layout,
        _segments(layout),
        heads_per_kv=heads_per_kv,
        num_kv_heads=num_kv_heads,
        rows=blocks.rows,
        block=blocks.step,
        num_parts=PARTS_PER_MULTIPROCESSOR * _num_multiprocessors(device),
    )
    return replace(tiles, table=tiles.table.to(device), sums=tiles.sums.to(device))


def _num_multiprocessors(device: torch.device) -> int:
    """On the CPU, where the interpreter runs the kernels, any number does."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _tiling(q_TNH: Tensor, head_block: int) -> Tiling:
    if q_TNH.dtype == torch.float32:
        return FLOAT32
    if q_TNH.is_cuda and torch.cuda.get_device_capability(q_TNH.device)[0] != 9:
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


def _check(q_TNH: Tensor, scale: float) -> None:
    if q_TNH.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"shared_prefix_attention on CUDA: got {q_TNH.dtype}; give bfloat16, float16 or float32 "
            "(float64 runs on the CPU)"
        )
    width = q_TNH.shape[2]
    if width % 8 or not 8 <= width <= 128:
        raise ValueError(
            f"shared_prefix_attention on CUDA: got heads {width} wide; give a multiple of 8 up to 128"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"shared_prefix_attention on CUDA: got scale {scale}; it must be finite and above 0")
