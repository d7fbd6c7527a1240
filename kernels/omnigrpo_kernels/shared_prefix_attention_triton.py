"""Triton kernels of shared-prefix attention; `shared_prefix_attention_cuda` launches them on `shared_prefix_tiles`.

Legend: ``T`` packed rows of k and v, ``Q`` rows of q, ``N`` query heads, ``K`` key/value heads, ``H`` head width.
A tile's keys or queries come in blocks: first those that every row sees, without a mask, then the others. A block that
ends beyond its range reads the rows that follow and masks their scores, so they only must be finite; a block that is
wider than a head reads the next head's columns, which the other factor's zeros cancel. Lengths that change from call to
call are never specialised on.

Outside a kernel a jitted function only raises: pyright takes its result for NoReturn.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = knobs.runtime.interpret
"""True under ``TRITON_INTERPRET=1``, where a product of bfloat16 operands is silently wrong."""


def describe(rows_TNH: Tensor, block: list[int]) -> TensorDescriptor:
    """Rows of all heads as one matrix ``[T, N * H]``, read a block at a time; zeros beyond its ends."""
    num_rows, num_heads, width = rows_TNH.shape
    return TensorDescriptor(rows_TNH, [num_rows, num_heads * width], [rows_TNH.stride(0), 1], block)


@triton.jit
def _product(a, b, total, UPCAST: tl.constexpr):
    """total + a b, summed in float32."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _query_tile(tile, kv_head, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Rows of k and v, rows of q and heads of a tile's pairs, and which pairs there are: others repeat the last."""
    region = tl.load(tile)
    region_rows = tl.load(tile + 1)
    pair = tl.load(tile + 2) + tl.arange(0, ROWS)
    inside = pair < region_rows
    pair = tl.where(inside, pair, region_rows - 1)
    token = region + pair // HEADS
    return token, (token - tl.load(tile + 3)).to(tl.int64), kv_head * HEADS + pair % HEADS, inside


@triton.jit
def _key_ranges(tile, COLUMNS: tl.constexpr):
    """Of a query tile: the prefix, its whole blocks, the own rows, theirs, and what is left of both."""
    prefix = tl.load(tile + 4)
    prefix_length = tl.load(tile + 5)
    own = tl.load(tile + 6)
    prefix_blocks = prefix_length // COLUMNS
    own_blocks = (tl.load(tile + 7) - own) // COLUMNS
    rest = own + own_blocks * COLUMNS
    tail = tl.where(prefix_length % COLUMNS > 0, 1, 0)
    rest_blocks = (tl.load(tile + 8) - rest + COLUMNS - 1) // COLUMNS
    return prefix, prefix + prefix_length, prefix_blocks, own, own_blocks, rest, tail, rest_blocks


@triton.jit
def _attend(
    q, k, v, start, column, low, past, acc, peak, total, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """One block of keys into the running sums; with MASKED a row sees the keys in [low, past)."""
    rows: tl.constexpr = q.shape[0]
    columns: tl.constexpr = k.block_shape[0]
    k_block = k.load([start, column])
    s = _product(q, k_block.T, tl.zeros((rows, columns), dtype=tl.float32), UPCAST)
    if MASKED:
        keys = start + tl.arange(0, columns)
        s = tl.where((keys[None, :] >= low[:, None]) & (keys[None, :] < past[:, None]), s, float("-inf"))
    raised = tl.maximum(peak, tl.max(s, axis=1) * scale)
    p = tl.exp2(tl.fma(s, scale, -raised[:, None]))
    shrink = tl.exp2(peak - raised)
    v_block = v.load([start, column])
    acc = _product(p.to(v_block.dtype), v_block, acc * shrink[:, None], UPCAST)
    return acc, raised, total * shrink + tl.sum(p, axis=1)


@triton.jit
def _in_bits(lse):
    """A log-sum-exp in nats as one in bits: a float32, and of a float64 also the float32 that is missing from it."""
    bits = lse * 1.4426950408889634
    high = bits.to(tl.float32)
    missing = tl.zeros_like(high)
    if lse.dtype == tl.float64:
        missing = (bits - high).to(tl.float32)
    return high, missing


@triton.jit
def _probabilities(s, scale, bits, missing):
    """exp2(scale s - bits - missing); the products are fused here as in the forward, whose rounding it repeats."""
    return tl.exp2(tl.fma(s, scale, -bits) - missing)


@triton.jit(do_not_specialize=["num_query_rows"])
def attend_tiles(
    q,  # [Q, N, H] in rows of `q_stride`
    k,  # descriptor of [T, K * H] in blocks [COLUMNS, HEAD]
    v,  # likewise
    first,  # int32 [T]: where each row's segment begins
    tiles,  # int32 [tiles, 9]
    o,  # [Q, N, H], written
    lse,  # float32 or float64 [N, Q], written
    q_stride,
    num_query_rows,
    num_kv_heads,
    scale,  # log2(e) times the scale of the scores
    HEADS: tl.constexpr,  # query heads per key/value head
    WIDTH: tl.constexpr,  # H
    HEAD: tl.constexpr,  # the power of two that holds it
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Output and log-sum-exp in nats of one tile of queries."""
    kv_head = tl.program_id(0) % num_kv_heads
    tile = tiles + (tl.program_id(0) // num_kv_heads).to(tl.int64) * 9
    token, row, head, inside = _query_tile(tile, kv_head, HEADS, ROWS)  # pyright: ignore[reportGeneralTypeIssues]
    prefix, prefix_end, prefix_blocks, own, own_blocks, rest, tail, rest_blocks = _key_ranges(tile, COLUMNS)
    depth = tl.arange(0, HEAD)
    mask = inside[:, None] & (depth < WIDTH)[None, :]
    q_rows = tl.load(
        q + row[:, None] * q_stride + (head * WIDTH)[:, None] + depth[None, :], mask=mask, other=0.0
    )
    low = tl.load(first + token)

    acc = tl.zeros((ROWS, HEAD), dtype=tl.float32)
    peak = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    column = kv_head * WIDTH
    for block in range(prefix_blocks + own_blocks):
        start = tl.where(
            block < prefix_blocks, prefix + block * COLUMNS, own + (block - prefix_blocks) * COLUMNS
        )
        acc, peak, total = _attend(
            q_rows, k, v, start, column, low, token, acc, peak, total, scale, MASKED=False, UPCAST=UPCAST
        )
    for block in range(tail + rest_blocks):
        start = tl.where(block < tail, prefix + prefix_blocks * COLUMNS, rest + (block - tail) * COLUMNS)
        since = tl.where(block < tail, prefix, low)
        past = tl.where(block < tail, prefix_end, token + 1)
        acc, peak, total = _attend(
            q_rows, k, v, start, column, since, past, acc, peak, total, scale, MASKED=True, UPCAST=UPCAST
        )

    at = o + row[:, None] * (num_kv_heads * HEADS * WIDTH) + (head * WIDTH)[:, None] + depth[None, :]
    tl.store(at, (acc / total[:, None]).to(o.dtype.element_ty), mask=mask)
    nats = (peak.to(lse.dtype.element_ty) + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + head.to(tl.int64) * num_query_rows + row, nats, mask=inside)


@triton.jit
def _pull_query(
    q, do, k, v, start, column, low, past, dq, bits, missing, dots, scale,
    MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of keys adds to dq / scale."""
    rows: tl.constexpr = q.shape[0]
    columns: tl.constexpr = k.block_shape[0]
    zeros = tl.zeros((rows, columns), dtype=tl.float32)
    k_block = k.load([start, column])
    v_block = v.load([start, column])
    p = _probabilities(_product(q, k_block.T, zeros, UPCAST), scale, bits[:, None], missing[:, None])
    if MASKED:
        keys = start + tl.arange(0, columns)
        p = tl.where((keys[None, :] >= low[:, None]) & (keys[None, :] < past[:, None]), p, 0.0)
    ds = p * (_product(do, v_block.T, zeros, UPCAST) - dots[:, None])
    return _product(ds.to(k_block.dtype), k_block, dq, UPCAST)


@triton.jit(do_not_specialize=["num_query_rows"])
def query_gradient_tiles(
    do,  # [Q, N, H] in rows of `do_stride`
    q,  # [Q, N, H] in rows of `q_stride`
    k,  # descriptor of [T, K * H] in blocks [COLUMNS, HEAD]
    v,  # likewise
    o,  # [Q, N, H] in rows of `o_stride`
    lse,  # float32 or float64 [N, Q], in nats
    dots,  # float32 [N, Q], written: do . o, which every score's gradient is less by
    first,  # int32 [T]
    tiles,  # int32 [tiles, 9]
    dq,  # [Q, N, H] in rows of `dq_stride`, written
    do_stride,
    q_stride,
    o_stride,
    dq_stride,
    num_query_rows,
    num_kv_heads,
    scale,  # log2(e) times the scale of the scores
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dq of one tile of queries, over the keys that `attend_tiles` gives it, and do . o for `key_gradient_tiles`."""
    kv_head = tl.program_id(0) % num_kv_heads
    tile = tiles + (tl.program_id(0) // num_kv_heads).to(tl.int64) * 9
    token, row, head, inside = _query_tile(tile, kv_head, HEADS, ROWS)  # pyright: ignore[reportGeneralTypeIssues]
    prefix, prefix_end, prefix_blocks, own, own_blocks, rest, tail, rest_blocks = _key_ranges(tile, COLUMNS)
    depth = tl.arange(0, HEAD)
    mask = inside[:, None] & (depth < WIDTH)[None, :]
    at = (head * WIDTH)[:, None] + depth[None, :]
    q_rows = tl.load(q + row[:, None] * q_stride + at, mask=mask, other=0.0)
    do_rows = tl.load(do + row[:, None] * do_stride + at, mask=mask, other=0.0)
    low = tl.load(first + token)
    statistic = head.to(tl.int64) * num_query_rows + row
    bits, missing = _in_bits(tl.load(lse + statistic, mask=inside, other=0.0))
    o_rows = tl.load(o + row[:, None] * o_stride + at, mask=mask, other=0.0)
    dots_rows = tl.sum(do_rows.to(tl.float32) * o_rows.to(tl.float32), axis=1)
    tl.store(dots + statistic, dots_rows, mask=inside)

    sums = tl.zeros((ROWS, HEAD), dtype=tl.float32)
    column = kv_head * WIDTH
    for block in range(prefix_blocks + own_blocks):
        start = tl.where(
            block < prefix_blocks, prefix + block * COLUMNS, own + (block - prefix_blocks) * COLUMNS
        )
        sums = _pull_query(
            q_rows, do_rows, k, v, start, column, low, token, sums, bits, missing, dots_rows, scale,
            MASKED=False, UPCAST=UPCAST,
        )  # fmt: skip
    for block in range(tail + rest_blocks):
        start = tl.where(block < tail, prefix + prefix_blocks * COLUMNS, rest + (block - tail) * COLUMNS)
        since = tl.where(block < tail, prefix, low)
        past = tl.where(block < tail, prefix_end, token + 1)
        sums = _pull_query(
            q_rows, do_rows, k, v, start, column, since, past, sums, bits, missing, dots_rows, scale,
            MASKED=True, UPCAST=UPCAST,
        )  # fmt: skip

    out = dq + row[:, None] * dq_stride + at
    tl.store(out, (sums * (scale * 0.6931471805599453)).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def _pull_keys(
    k, v, q, do, lse, dots, keys, past, start, head, num_query_rows, dk, dv, scale,
    WIDTH: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What one block of a head's queries from row ``start`` of q adds to dk / scale and dv.

    With MASKED a key is seen by the queries in [itself, past); all are counted in rows of q.
    """
    rows: tl.constexpr = k.shape[0]
    block: tl.constexpr = q.block_shape[0]
    zeros = tl.zeros((rows, block), dtype=tl.float32)
    queries = start + tl.arange(0, block)
    inside = queries < num_query_rows
    of_head = head.to(tl.int64) * num_query_rows
    bits, missing = _in_bits(tl.load(lse + of_head + queries, mask=inside, other=0.0))
    dots_block = tl.load(dots + of_head + queries, mask=inside, other=0.0)
    q_block = q.load([start, head * WIDTH])
    do_block = do.load([start, head * WIDTH])
    s = _product(k, q_block.T, zeros, UPCAST)
    if MASKED:
        s = tl.where(
            (queries[None, :] >= keys[:, None]) & (queries[None, :] < past[:, None]), s, float("-inf")
        )
    p = _probabilities(s, scale, bits[None, :], missing[None, :])
    dv = _product(p.to(do_block.dtype), do_block, dv, UPCAST)
    ds = p * (_product(v, do_block.T, zeros, UPCAST) - dots_block[None, :])
    return _product(ds.to(q_block.dtype), q_block, dk, UPCAST), dv


@triton.jit(do_not_specialize=["num_query_rows"])
def key_gradient_tiles(
    do,  # descriptor of [Q, N * H] in blocks [COLUMNS, HEAD]
    q,  # likewise
    k,  # [T, K, H] in rows of `k_stride`
    v,  # [T, K, H] in rows of `v_stride`
    lse,  # float32 or float64 [N, Q], in nats
    dots,  # float32 [N, Q]
    past,  # int32 [T]: the row after the last one that sees each row
    parts,  # int32 [parts, 12]
    partials,  # float32 [slots, K, 2, ROWS, H], written by parts with a slot: sums for dk / scale and dv
    dk,  # [T, K, H] in rows of `dk_stride`, written by the others
    dv,  # likewise
    k_stride,
    v_stride,
    dk_stride,
    num_query_rows,
    num_kv_heads,
    scale,  # log2(e) times the scale of the scores
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dk and dv of one tile of keys, or one part of their sums, over the queries of all heads that share them."""
    kv_head = tl.program_id(0) % num_kv_heads
    part = parts + (tl.program_id(0) // num_kv_heads).to(tl.int64) * 12
    key = tl.load(part) + tl.arange(0, ROWS)
    shift = tl.load(part + 2)
    full = tl.load(part + 3)
    slot = tl.load(part + 11).to(tl.int64)
    depth = tl.arange(0, HEAD)
    inside = key < tl.load(part + 1)
    mask = inside[:, None] & (depth < WIDTH)[None, :]
    at = key.to(tl.int64)[:, None]
    column = (kv_head * WIDTH + depth)[None, :]
    k_rows = tl.load(k + at * k_stride + column, mask=mask, other=0.0)
    v_rows = tl.load(v + at * v_stride + column, mask=mask, other=0.0)

    full_blocks = (tl.load(part + 4) - full) // COLUMNS
    dk_sums = tl.zeros((ROWS, HEAD), dtype=tl.float32)
    dv_sums = tl.zeros((ROWS, HEAD), dtype=tl.float32)
    for block in range(tl.load(part + 7), tl.load(part + 8)):
        head = kv_head * HEADS + block // full_blocks
        start = full - shift + block % full_blocks * COLUMNS
        dk_sums, dv_sums = _pull_keys(
            k_rows, v_rows, q, do, lse, dots, key, key, start, head, num_query_rows, dk_sums, dv_sums, scale,
            WIDTH=WIDTH, MASKED=False, UPCAST=UPCAST,
        )  # fmt: skip
    causal = tl.load(part + 5)
    tail = tl.where((tl.load(part + 4) - full) % COLUMNS > 0, 1, 0)
    masked_blocks = tail + (tl.load(part + 6) - causal) // COLUMNS
    keys = key - shift
    past_keys = tl.load(past + key, mask=inside, other=0) - shift
    for block in range(tl.load(part + 9), tl.load(part + 10)):
        head = kv_head * HEADS + block // masked_blocks
        of_head = block % masked_blocks
        start = tl.where(of_head < tail, full + full_blocks * COLUMNS, causal + (of_head - tail) * COLUMNS)
        dk_sums, dv_sums = _pull_keys(
            k_rows, v_rows, q, do, lse, dots, keys, past_keys, start - shift, head, num_query_rows, dk_sums,
            dv_sums, scale, WIDTH=WIDTH, MASKED=True, UPCAST=UPCAST,
        )  # fmt: skip

    dk_sums *= scale * 0.6931471805599453
    if slot < 0:
        out = at * dk_stride + column
        tl.store(dk + out, dk_sums.to(dk.dtype.element_ty), mask=mask)
        tl.store(dv + out, dv_sums.to(dv.dtype.element_ty), mask=mask)
    else:
        to = partials + (slot * num_kv_heads + kv_head) * (2 * ROWS * WIDTH)
        to += tl.arange(0, ROWS)[:, None] * WIDTH + depth[None, :]
        tl.store(to, dk_sums, mask=mask)
        tl.store(to + ROWS * WIDTH, dv_sums, mask=mask)


@triton.jit
def sum_partials(
    partials,  # float32 [slots, K, 2, ROWS, H]
    sums,  # int32 [split tiles, 4]
    dk,  # [T, K, H] in rows of `dk_stride`, written
    dv,  # likewise
    dk_stride,
    num_kv_heads,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """dk and dv of some rows of a tile in parts: their sums in the order of the parts."""
    program = tl.program_id(0)
    piece = program % (ROWS // SLICE)
    kv_head = program // (ROWS // SLICE) % num_kv_heads
    tile = sums + (program // (ROWS // SLICE) // num_kv_heads).to(tl.int64) * 4
    row = piece * SLICE + tl.arange(0, SLICE)
    key = tl.load(tile) + row
    depth = tl.arange(0, HEAD)
    mask = (key < tl.load(tile + 1))[:, None] & (depth < WIDTH)[None, :]
    step = num_kv_heads * (2 * ROWS * WIDTH)
    at = partials + tl.load(tile + 2).to(tl.int64) * step + kv_head * (2 * ROWS * WIDTH)
    at += row[:, None] * WIDTH + depth[None, :]
    dk_sums = tl.zeros((SLICE, HEAD), dtype=tl.float32)
    dv_sums = tl.zeros((SLICE, HEAD), dtype=tl.float32)
    for _ in range(tl.load(tile + 3)):
        dk_sums += tl.load(at, mask=mask, other=0.0)
        dv_sums += tl.load(at + ROWS * WIDTH, mask=mask, other=0.0)
        at += step
    out = key.to(tl.int64)[:, None] * dk_stride + (kv_head * WIDTH + depth)[None, :]
    tl.store(dk + out, dk_sums.to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + out, dv_sums.to(dv.dtype.element_ty), mask=mask)
