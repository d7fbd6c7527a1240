"""Triton kernels of the vocabulary head; `vocabulary_head_cuda` launches them and says what they compute.

Legend: ``T`` rows, ``D`` width, ``V`` vocabulary, ``U`` pairs of a row and a target, ``L`` live rows, ``J`` columns of
tiles over the vocabulary. Lengths that change from call to call are never specialised on.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = knobs.runtime.interpret
"""True under ``TRITON_INTERPRET=1``, where a product of bfloat16 operands is silently wrong."""


def describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """What a kernel reads or writes ``matrix`` through, a block at a time: zeros beyond its ends, stores dropped."""
    return TensorDescriptor.from_tensor(matrix, block)


@triton.jit(
    do_not_specialize=["num_pairs"],
    do_not_specialize_on_alignment=["hidden", "weight", "pair_targets"],
)
def target_offsets(
    hidden,  # [T, D]
    weight,  # [V, D]
    first_pair,  # int64 [T]
    pair_targets,  # int64 [U]
    offset,  # float32 [T], written
    width,
    vocabulary,
    num_pairs,
    scale,
    BLOCK: tl.constexpr,
):
    """offset = round(scale * hidden . weight[first target]); NaN where that target is outside the vocabulary."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.minimum(tl.load(first_pair + row), num_pairs - 1)
    target = tl.load(pair_targets + pair)
    known = (target >= 0) & (target < vocabulary)
    target = tl.where(known, target, 0)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        depth = start + tl.arange(0, BLOCK)
        mask = depth < width
        x = tl.load(hidden + row * width + depth, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + target * width + depth, mask=mask, other=0.0).to(tl.float32)
        total += x * w
    k = tl.floor(tl.sum(total, axis=0) * scale + 0.5)
    tl.store(offset + row, tl.where(known, k, float("nan")))


@triton.jit(
    do_not_specialize=["num_rows", "vocabulary", "width", "num_tile_rows", "num_tile_columns", "group"],
    do_not_specialize_on_alignment=["pair_rows", "pair_targets"],
)
def exp_tiles(
    hidden,  # descriptor of [T, D] in blocks [ROWS, DEPTH]
    weight,  # descriptor of [V, D] in blocks [COLUMNS, DEPTH]
    exps,  # descriptor of [T, V] in blocks [ROWS, COLUMNS // 2], written when STORE
    offset,  # float32 [T]
    pair_order,  # int64 [U]: pairs by tile
    tile_pairs,  # int64 [tiles + 1]: where the pairs of each tile begin in pair_order
    pair_rows,  # int64 [U]
    pair_targets,  # int64 [U]
    pair_logits,  # float32 [U], written
    partials,  # float32 [2, J, T], written
    listed,  # int32 [1 + rows of tiles]: with LISTED, how many rows of tiles to work on, then which ones
    num_rows,
    vocabulary,
    width,
    num_tile_rows,
    num_tile_columns,
    group,
    scale,  # log2(e) / temperature
    to_nats,  # scale * ln 2 as a sum of two floats
    to_nats_rest,
    masked,  # a product of which nothing is left after exp2
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STORE: tl.constexpr,
    LISTED: tl.constexpr,
    MAXIMA: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Tiles of exp2(scale * hidden weight^T - offset), and what each leaves of its rows in ``partials``.

    That is the sums of E and of E log2 E, without the columns of the row's targets, or with MAXIMA the maximum of
    log2 E, and nothing else is written. Programs stay for many tiles; a band of ``group`` rows of tiles goes through
    the vocabulary together, so that its hidden states stay in L2 and each weight is read from memory once per band.
    """
    num_listed = num_tile_rows
    if LISTED:
        num_listed = tl.load(listed)
    for tile in range(tl.program_id(0), num_listed * num_tile_columns, tl.num_programs(0)):
        band = tile // (group * num_tile_columns)
        height = tl.minimum(group, num_listed - band * group)
        within = tile - band * group * num_tile_columns
        tile_row = band * group + within % height
        tile_column = within // height
        if LISTED:
            tile_row = tl.load(listed + 1 + tile_row)
        row = tile_row * ROWS
        column = tile_column * COLUMNS

        product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for depth in range(0, width, DEPTH):
            x = hidden.load([row, depth])
            w = weight.load([column, depth])
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            product = tl.dot(x, w.T, product, input_precision="ieee")

        tile_row_index = tl.arange(0, ROWS)
        tile_column_index = tl.arange(0, COLUMNS)
        if column + COLUMNS > vocabulary:
            product = tl.where(tile_column_index[None, :] < vocabulary - column, product, masked)
        if not MAXIMA:
            pairs_at = tile_pairs + tile_row.to(tl.int64) * num_tile_columns + tile_column
            place = tl.load(pairs_at)
            end = tl.load(pairs_at + 1)
            while place < end:  # most tiles have none
                pair = tl.load(pair_order + place)
                pair_row = (tl.load(pair_rows + pair) - row).to(tl.int32)
                pair_column = (tl.load(pair_targets + pair) - column).to(tl.int32)
                hit = (tile_row_index == pair_row)[:, None] & (tile_column_index == pair_column)[None, :]
                at_pair = tl.sum(tl.sum(tl.where(hit, product, 0.0), axis=1), axis=0)
                own = (pair_row >= 0) & (pair_row < ROWS) & (pair_column >= 0) & (pair_column < COLUMNS)
                own = own & (pair_column < vocabulary - column)
                tl.store(pair_logits + pair, at_pair * to_nats + at_pair * to_nats_rest, mask=own)
                product = tl.where(hit, masked, product)
                place += 1

        rows = row + tile_row_index
        inside = rows < num_rows
        out = partials + tile_column.to(tl.int64) * num_rows + rows
        k = tl.load(offset + rows, mask=inside, other=0.0)
        y = product * scale - k[:, None]
        if MAXIMA:
            tl.store(out, tl.max(y, axis=1), mask=inside)
        else:
            # Half a tile at a time: e, y and the accumulators of a whole one do not fit in the registers.
            left, right = tl.split(tl.permute(tl.reshape(y, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            e = tl.exp2(left)
            others = tl.sum(e, axis=1)
            weighted = tl.sum(e * left, axis=1)
            if STORE:
                exps.store([row, column], e.to(exps.dtype))
            e = tl.exp2(right)
            others += tl.sum(e, axis=1)
            weighted += tl.sum(e * right, axis=1)
            if STORE:
                exps.store([row, column + COLUMNS // 2], e.to(exps.dtype))
            tl.store(out, others, mask=inside)
            tl.store(out + num_tile_columns.to(tl.int64) * num_rows, weighted, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_tile_columns"])
def merge_partials(
    partials,  # float32 [2, J, T]
    others,  # float32 [T], written
    weighted,  # float32 [T], written
    crowded,  # int32, at least [T]: 1 where `others` is not below `limit`; written unless AGAIN
    num_rows,
    num_tile_columns,
    limit,
    AGAIN: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums over the columns of tiles in float64, in one order; with AGAIN for the crowded rows alone."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    if AGAIN:
        inside = inside & (tl.load(crowded + rows, mask=inside, other=0) != 0)
    sum_others = tl.zeros((ROWS,), dtype=tl.float64)
    sum_weighted = tl.zeros((ROWS,), dtype=tl.float64)
    for start in range(0, num_tile_columns, TILES):
        tiles = start + tl.arange(0, TILES)
        mask = (tiles < num_tile_columns)[:, None] & inside[None, :]
        at = partials + tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        sum_others += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), axis=0)
        at += num_tile_columns.to(tl.int64) * num_rows
        sum_weighted += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), axis=0)
    total = sum_others.to(tl.float32)
    tl.store(others + rows, total, mask=inside)
    tl.store(weighted + rows, sum_weighted.to(tl.float32), mask=inside)
    if not AGAIN:
        tl.store(crowded + rows, tl.where(total < limit, 0, 1), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_tile_columns"])
def raise_offsets(
    partials,  # float32 [2, J, T]: in the first half the maxima of log2 E
    crowded,  # int32, at least [T]
    offset,  # float32 [T]: raised by the rounded maximum where crowded
    num_rows,
    num_tile_columns,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Moves a crowded row's offset to its largest logit."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    inside = inside & (tl.load(crowded + rows, mask=inside, other=0) != 0)
    largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for start in range(0, num_tile_columns, TILES):
        tiles = start + tl.arange(0, TILES)
        mask = (tiles < num_tile_columns)[:, None] & inside[None, :]
        at = partials + tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        largest = tl.maximum(largest, tl.max(tl.load(at, mask=mask, other=float("-inf")), axis=0))
    k = tl.load(offset + rows, mask=inside, other=0.0)
    tl.store(offset + rows, k + tl.floor(largest + 0.5), mask=inside)


@triton.jit
def sum_rows(
    logits,  # float32 [T, V], -infinity at the row's targets
    offset,  # float32 [T]: in, a first guess; out, at least the rounded maximum
    others,  # float32 [T], written
    weighted,  # float32 [T], written
    logits_stride,
    vocabulary,
    scale,
    BLOCK: tl.constexpr,
):
    """An online sweep for the offset and the sums, one program per row.

    Apart from `exp_rows`: what threads hold, and with it the order of a sum, follows from every access of a kernel.
    """
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(offset + row)
    sum_others = 0.0
    sum_weighted = 0.0
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + row * logits_stride + columns, mask=columns < vocabulary, other=float("-inf"))
        z = tl.maximum(z * scale, -1e30, propagate_nan=tl.PropagateNan.ALL)
        raised = tl.maximum(k, tl.floor(tl.max(z, axis=0) + 0.5), propagate_nan=tl.PropagateNan.ALL)
        y = z - raised
        e = tl.exp2(y)
        shrink = tl.exp2(k - raised)
        sum_weighted = shrink * (sum_weighted + sum_others * (k - raised)) + tl.sum(e * y, axis=0)
        sum_others = shrink * sum_others + tl.sum(e, axis=0)
        k = raised
    tl.store(offset + row, k)
    tl.store(others + row, sum_others)
    tl.store(weighted + row, sum_weighted)


@triton.jit
def exp_rows(
    logits,  # float32 [T, V], -infinity at the row's targets
    exps,  # [T, V], written
    offset,  # float32 [T]
    logits_stride,
    exps_stride,
    vocabulary,
    scale,
    BLOCK: tl.constexpr,
):
    """E of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.load(offset + row)
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocabulary
        z = tl.load(logits + row * logits_stride + columns, mask=inside, other=float("-inf"))
        e = tl.exp2(z * scale - k)
        tl.store(exps + row * exps_stride + columns, e.to(exps.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_live"],
    do_not_specialize_on_alignment=["live", "alpha", "beta"],
)
def gather_rows(
    exps,  # [T, V] in rows of `stride`, rewritten
    live,  # int64 [L], live[i] >= i
    alpha,  # [L]
    beta,  # [L]
    stride,
    num_live,
    vocabulary,
    MOVE: tl.constexpr,
    REWEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """exps[i] = exps[live[i]] with MOVE, and times alpha + beta log2(itself) with REWEIGHT; in place.

    A program has its columns to itself and goes down the rows, so what it overwrites it has read: live[i] >= i.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    for start in range(0, num_live, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < num_live
        mask = inside[:, None] & (columns < vocabulary)[None, :]
        source = tl.load(live + rows, mask=inside, other=0)
        at = columns.to(tl.int64)[None, :]
        e = tl.load(exps + source[:, None] * stride + at, mask=mask, other=0.0)
        if REWEIGHT:
            a = tl.load(alpha + rows, mask=inside, other=0.0)[:, None]
            b = tl.load(beta + rows, mask=inside, other=0.0)[:, None]
            wide = e.to(alpha.dtype.element_ty)
            e = tl.where(wide == 0, 0.0, wide * (a + b * tl.log2(wide))).to(e.dtype)
        if MOVE:
            tl.debug_barrier()  # one thread's row may be another's source
        tl.store(exps + rows.to(tl.int64)[:, None] * stride + at, e, mask=mask)
