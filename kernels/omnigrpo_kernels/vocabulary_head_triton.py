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
    pair_starts,  # int32 [T + 1]: where the pairs of each row begin
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
    pair = tl.minimum(tl.load(pair_starts + row), num_pairs - 1)
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


@triton.jit
def tile_product(
    hidden,
    weight,
    row,
    column,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """float32 [ROWS, COLUMNS] of hidden weight^T, from the row and the column on."""
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for depth in range(0, width, DEPTH):
        x = hidden.load([row, depth])
        w = weight.load([column, depth])
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        product = tl.dot(x, w.T, product, input_precision="ieee")
    return product


@triton.jit
def without_targets(
    product,  # float32 [ROWS, COLUMNS]
    pair_starts,
    pair_targets,
    pair_logits,
    keep,  # bool [ROWS]: whose pairs' logits are written
    row,
    column,
    num_rows,
    vocabulary,
    to_nats,
    to_nats_rest,
    masked,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The product with ``masked`` at the rows' targets and beyond the vocabulary; the targets' logits are written."""
    columns = column + tl.arange(0, COLUMNS)
    if column + COLUMNS > vocabulary:
        product = tl.where(columns[None, :] < vocabulary, product, masked)
    rows = row + tl.arange(0, ROWS)
    inside = rows < num_rows
    first = tl.load(pair_starts + rows, mask=inside, other=0)
    count = tl.load(pair_starts + rows + 1, mask=inside, other=0) - first
    place = 0
    most = tl.max(count, axis=0)
    while place < most:  # once, but for rows that predict several tokens
        target = tl.load(pair_targets + first + place, mask=place < count, other=-1)
        target = tl.where((target >= 0) & (target < vocabulary), target, -1).to(tl.int32)
        here = (target >= column) & (target < column + COLUMNS)
        if tl.max(here.to(tl.int32), axis=0) > 0:  # most tiles have none
            hit = here[:, None] & (columns[None, :] == target[:, None])
            at_pair = tl.sum(tl.where(hit, product, 0.0), axis=1)
            logit = at_pair * to_nats + at_pair * to_nats_rest
            tl.store(pair_logits + first + place, logit, mask=here & keep)
            product = tl.where(hit, masked, product)
        place += 1
    return product


@triton.jit(
    do_not_specialize=["num_rows", "vocabulary", "width", "num_tile_rows", "num_tile_columns", "group"],
    do_not_specialize_on_alignment=["pair_targets"],
)
def exp_tiles(
    hidden,  # descriptor of [T, D] in blocks [ROWS, DEPTH]
    weight,  # descriptor of [V, D] in blocks [COLUMNS, DEPTH]
    exps,  # descriptor of [T, V] in blocks [ROWS, COLUMNS // 2], written when STORE
    offset,  # float32 [T]
    pair_starts,  # int32 [T + 1]: where the pairs of each row begin
    pair_targets,  # int64 [U]
    pair_logits,  # float32 [U], written
    partials,  # float32 [2, J, T], written
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
    UPCAST: tl.constexpr,
):
    """Tiles of exp2(scale * hidden weight^T - offset), and what each leaves of its rows in ``partials``.

    That is the sums of E and of E log2 E, without the columns of the row's targets. Programs stay for many tiles; a
    band of ``group`` rows of tiles goes through the vocabulary together, so that its hidden states stay in L2 and each
    weight is read from memory once per band.
    """
    for tile in range(tl.program_id(0), num_tile_rows * num_tile_columns, tl.num_programs(0)):
        band = tile // (group * num_tile_columns)
        height = tl.minimum(group, num_tile_rows - band * group)
        within = tile - band * group * num_tile_columns
        row = (band * group + within % height) * ROWS
        tile_column = within // height
        column = tile_column * COLUMNS

        product = tile_product(hidden, weight, row, column, width, ROWS, COLUMNS, DEPTH, UPCAST)
        rows = row + tl.arange(0, ROWS)
        inside = rows < num_rows
        product = without_targets(
            product,
            pair_starts,
            pair_targets,
            pair_logits,
            inside,
            row,
            column,
            num_rows,
            vocabulary,
            to_nats,
            to_nats_rest,
            masked,
            ROWS,
            COLUMNS,
        )
        out = partials + tile_column.to(tl.int64) * num_rows + rows
        k = tl.load(offset + rows, mask=inside, other=0.0)
        y = product * scale - k[:, None]
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


@triton.jit(
    do_not_specialize=["num_rows", "vocabulary", "width", "num_tile_columns"],
    do_not_specialize_on_alignment=["pair_targets"],
)
def crowded_rows(
    hidden,  # descriptor of [T, D] in blocks [ROWS, DEPTH]
    weight,  # descriptor of [V, D] in blocks [COLUMNS, DEPTH]
    exps,  # [T, V] in rows of `exps_stride`, written when STORE
    offset,  # float32 [T]: raised by the rounded maximum of log2 E
    pair_starts,  # int32 [T + 1]
    pair_targets,  # int64 [U]
    pair_logits,  # float32 [U], written
    others,  # float32 [T]: in, which rows are crowded; out, their sums
    weighted,  # float32 [T]
    num_rows,
    vocabulary,
    width,
    num_tile_columns,
    exps_stride,
    scale,
    to_nats,
    to_nats_rest,
    masked,
    limit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STORE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A row of tiles per program: where ``others`` is not below ``limit``, all of it again with another offset.

    Twice through the vocabulary, for the maxima and then for E. Other rows of the same tiles keep what they have.
    """
    row = tl.program_id(0) * ROWS
    rows = row + tl.arange(0, ROWS)
    inside = rows < num_rows
    crowded = inside & ~(tl.load(others + rows, mask=inside, other=0.0) < limit)  # NaN is no number below it
    if tl.max(crowded.to(tl.int32), axis=0) > 0:
        k = tl.load(offset + rows, mask=inside, other=0.0)
        largest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
        for tile_column in range(num_tile_columns):
            column = tile_column * COLUMNS
            product = tile_product(hidden, weight, row, column, width, ROWS, COLUMNS, DEPTH, UPCAST)
            columns = column + tl.arange(0, COLUMNS)
            y = tl.where(columns[None, :] < vocabulary, product, masked) * scale - k[:, None]
            largest = tl.maximum(largest, tl.max(y, axis=1))
        k += tl.floor(largest + 0.5)
        tl.store(offset + rows, k, mask=crowded)

        sum_others = tl.zeros((ROWS,), dtype=tl.float64)
        sum_weighted = tl.zeros((ROWS,), dtype=tl.float64)
        for tile_column in range(num_tile_columns):
            column = tile_column * COLUMNS
            product = tile_product(hidden, weight, row, column, width, ROWS, COLUMNS, DEPTH, UPCAST)
            product = without_targets(
                product,
                pair_starts,
                pair_targets,
                pair_logits,
                crowded,
                row,
                column,
                num_rows,
                vocabulary,
                to_nats,
                to_nats_rest,
                masked,
                ROWS,
                COLUMNS,
            )
            y = product * scale - k[:, None]
            e = tl.exp2(y)
            sum_others += tl.sum(e, axis=1).to(tl.float64)
            sum_weighted += tl.sum(e * y, axis=1).to(tl.float64)
            if STORE:
                columns = column + tl.arange(0, COLUMNS)
                at = rows.to(tl.int64)[:, None] * exps_stride + columns[None, :]
                mask = crowded[:, None] & (columns[None, :] < vocabulary)
                tl.store(exps + at, e.to(exps.dtype.element_ty), mask=mask)
        tl.store(others + rows, sum_others.to(tl.float32), mask=crowded)
        tl.store(weighted + rows, sum_weighted.to(tl.float32), mask=crowded)


@triton.jit(do_not_specialize=["num_rows", "num_tile_columns"])
def merge_partials(
    partials,  # float32 [2, J, T]
    others,  # float32 [T], written
    weighted,  # float32 [T], written
    num_rows,
    num_tile_columns,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Sums over the columns of tiles in float64, in one order."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    sum_others = tl.zeros((ROWS,), dtype=tl.float64)
    sum_weighted = tl.zeros((ROWS,), dtype=tl.float64)
    for start in range(0, num_tile_columns, TILES):
        tiles = start + tl.arange(0, TILES)
        mask = (tiles < num_tile_columns)[:, None] & inside[None, :]
        at = partials + tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
        sum_others += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), axis=0)
        at += num_tile_columns.to(tl.int64) * num_rows
        sum_weighted += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float64), axis=0)
    tl.store(others + rows, sum_others.to(tl.float32), mask=inside)
    tl.store(weighted + rows, sum_weighted.to(tl.float32), mask=inside)


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
