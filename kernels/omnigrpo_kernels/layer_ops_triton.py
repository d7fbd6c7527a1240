"""Triton kernels of a decoder layer besides its attention; `decoder_layer_cuda` launches them.

Legend: ``T`` rows, ``D`` width, ``N`` query heads, ``K`` key/value heads, ``H`` head width, ``F`` feed-forward width.
All arithmetic is float32. Where a sum over rows is wanted, a program takes ``rows_per_program`` rows in order and
leaves its own sum as one row of ``partials``, so that the result is the same in every run.

Outside a kernel a jitted function only raises: pyright takes its result for NoReturn.
"""

import triton
import triton.language as tl


@triton.jit
def norm_rows(
    x,  # [T, D]
    delta,  # [T, D] with ADD
    weight,  # [D]
    total,  # [T, D], written with ADD: x + delta
    normal,  # [T, D], written: weight * round(total * scale)
    scale,  # float32 [T], written: 1 / sqrt(mean(total^2) + eps)
    eps,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The root-mean-square norm of one row, after adding what its residual is to be added to."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = row * WIDTH + column
    rows = tl.load(x + at, mask=mask, other=0.0)
    if ADD:
        rows = (rows.to(tl.float32) + tl.load(delta + at, mask=mask, other=0.0).to(tl.float32)).to(rows.dtype)
        tl.store(total + at, rows, mask=mask)
    wide = rows.to(tl.float32)
    row_scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(wide * wide, axis=0) / WIDTH + eps))
    tl.store(scale + row, row_scale)
    rounded = (wide * row_scale).to(rows.dtype).to(tl.float32)
    weights = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(normal + at, (rounded * weights).to(rows.dtype), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def norm_gradient_rows(
    grad,  # [T, D]: the gradient of the norm's output
    x,  # [T, D]: its input
    scale,  # float32 [T], of `norm_rows`
    weight,  # [D]
    residual_grad,  # [T, D]: added to the gradient of x
    grad_x,  # [T, D], written; may be `grad`
    normal,  # [T, D], written: the norm's output again
    partials,  # float32 [programs, `partials_stride`], written from column `first`: sums for the weight's gradient
    num_rows,
    rows_per_program,
    partials_stride,
    first,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of some rows' norm: n = x * scale, dx = scale * (g w - n * mean(g w n)), dw = sum g n."""
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    weights = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    begin = program * rows_per_program
    for row in range(begin, tl.minimum(begin + rows_per_program, num_rows)):
        at = (row + tl.zeros((), dtype=tl.int64)) * WIDTH + column
        row_scale = tl.load(scale + row)
        n = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) * row_scale
        g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        residual = tl.load(residual_grad + at, mask=mask, other=0.0).to(tl.float32)
        sums += g * n
        g *= weights
        mean = tl.sum(g * n, axis=0) / WIDTH
        dtype: tl.constexpr = grad_x.dtype.element_ty
        tl.store(grad_x + at, (row_scale * (g - n * mean) + residual).to(dtype), mask=mask)
        tl.store(normal + at, (n.to(dtype).to(tl.float32) * weights).to(dtype), mask=mask)
    tl.store(partials + program.to(tl.int64) * partials_stride + first + column, sums, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rows_per_program"])
def turn_heads(
    qkv,  # [T, (N + 2K) * H], rewritten
    q_bias,  # [N * H] with BIAS
    k_bias,  # [K * H] with BIAS
    v_bias,  # [K * H] with BIAS
    cos,  # float32 [T, H / 2]
    sin,  # float32 [T, H / 2]
    partials,  # float32 [programs, `partials_stride`], written from column `first` with BACK and BIAS
    num_rows,
    rows_per_program,
    partials_stride,
    first,
    BACK: tl.constexpr,
    BIAS: tl.constexpr,
    QUERIES: tl.constexpr,  # N
    KEYS: tl.constexpr,  # K
    WIDTH: tl.constexpr,  # H
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Add biases, then rotate q and k; with BACK turn their gradients back, and sum all of qkv's for the biases."""
    half: tl.constexpr = WIDTH // 2
    tiles: tl.constexpr = ((QUERIES + 2 * KEYS) * half + PAIRS - 1) // PAIRS
    program = tl.program_id(0) // tiles
    pair = tl.program_id(0) % tiles * PAIRS + tl.arange(0, PAIRS)
    head = pair // half
    frequency = (pair % half)[None, :]
    inside = head < QUERIES + 2 * KEYS
    turns = (head < QUERIES + KEYS)[None, :]
    column = head * WIDTH + pair % half
    a_sums = tl.zeros((PAIRS,), dtype=tl.float32)
    b_sums = tl.zeros((PAIRS,), dtype=tl.float32)
    if BIAS and not BACK:
        a_sums = _bias(q_bias, k_bias, v_bias, column, head, QUERIES, KEYS, WIDTH)
        b_sums = _bias(q_bias, k_bias, v_bias, column + half, head, QUERIES, KEYS, WIDTH)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, num_rows)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < end) & inside[None, :]
        angle = row * half + frequency
        c = tl.load(cos + angle, mask=mask & turns, other=1.0)
        s = tl.load(sin + angle, mask=mask & turns, other=0.0)
        at = row * ((QUERIES + 2 * KEYS) * WIDTH) + column[None, :]
        a = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(qkv + at + half, mask=mask, other=0.0).to(tl.float32)
        if BACK:
            s = -s
        elif BIAS:
            a += a_sums[None, :]
            b += b_sums[None, :]
        turned_a = a * c - b * s
        turned_b = b * c + a * s
        if BACK:
            a_sums += tl.sum(turned_a, axis=0)
            b_sums += tl.sum(turned_b, axis=0)
        if BACK or not BIAS:
            mask = mask & turns
        tl.store(qkv + at, turned_a.to(qkv.dtype.element_ty), mask=mask)
        tl.store(qkv + at + half, turned_b.to(qkv.dtype.element_ty), mask=mask)
    if BACK and BIAS:
        to = partials + program.to(tl.int64) * partials_stride + first + column
        tl.store(to, a_sums, mask=inside)
        tl.store(to + half, b_sums, mask=inside)


@triton.jit
def _bias(
    q_bias, k_bias, v_bias, column, head, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr
):
    """The biases of some columns of qkv, which lie in three tensors."""
    q_mask = head < QUERIES
    k_mask = (head >= QUERIES) & (head < QUERIES + KEYS)
    v_mask = (head >= QUERIES + KEYS) & (head < QUERIES + 2 * KEYS)
    bias = tl.load(q_bias + column, mask=q_mask, other=0.0).to(tl.float32)
    bias += tl.load(k_bias + column - QUERIES * WIDTH, mask=k_mask, other=0.0).to(tl.float32)
    bias += tl.load(v_bias + column - (QUERIES + KEYS) * WIDTH, mask=v_mask, other=0.0).to(tl.float32)
    return bias


@triton.jit
def gate_rows(
    gate_up,  # [T, 2 * F]
    out,  # [T, F], written: silu(gate) * up
    WIDTH: tl.constexpr,  # F
    BLOCK: tl.constexpr,
):
    """A block of columns of one row."""
    tiles: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = gate_up + row * (2 * WIDTH) + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_gradient_rows(
    gate_up,  # [T, 2 * F]
    grad_out,  # [T, F]: the gradient of silu(gate) * up, replaced by silu(gate) * up
    grad,  # [T, 2 * F], written
    WIDTH: tl.constexpr,  # F
    BLOCK: tl.constexpr,
):
    """A block of columns of one row: du = g silu(gate), dgate = g up (s + silu(gate) (1 - s)), s the sigmoid."""
    tiles: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = row * (2 * WIDTH) + column
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    out = grad_out + row * WIDTH + column
    g = tl.load(out, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    dtype: tl.constexpr = grad.dtype.element_ty
    tl.store(out, (silu * up).to(dtype), mask=mask)
    tl.store(grad + at, (g * up * (share + silu * (1 - share))).to(dtype), mask=mask)
    tl.store(grad + at + WIDTH, (g * silu).to(dtype), mask=mask)
