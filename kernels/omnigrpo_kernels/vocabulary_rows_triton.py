"""Triton kernels for the rows of the vocabulary head, around its products; `vocabulary_rows_cuda` launches them.

Legend: ``T`` rows, ``D`` width, ``V`` vocabulary, ``U`` pairs of a row and a target. The pairs of row i are those from
``starts[i]`` to ``starts[i + 1]``. Formulae: `vocabulary_head`. Lengths that change from call to call are
never specialised on.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def log1p(x):
    """ln(1 + x) of x at least 0, float64 to a few ulp: the rounding of 1 + x cancels (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def expm1(x):
    """e^x - 1 of x at most 0, float64 to a few ulp (Kahan)."""
    u = tl.exp(x)
    small = (u - 1.0) * (x / tl.log(u))
    return tl.where(u == 1.0, x, tl.where(u < 0.25, u - 1.0, small))


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["starts"])
def row_statistics(
    offset,  # [T]
    others,  # [T]
    weighted,  # [T]
    pair_logits,  # [U]
    starts,  # int64 [T + 1]
    logprob,  # float64 [U], written, as all below
    entropy,  # [T]
    lse,  # [T]
    total,  # [T]
    num_rows,
    ROWS: tl.constexpr,
):
    """What `vocabulary_head.HeadPass` holds, from what ``head_exps`` returns."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    k = tl.load(offset + rows, mask=inside, other=0.0).to(tl.float64)
    others_T = tl.load(others + rows, mask=inside, other=1.0).to(tl.float64)
    weighted_T = tl.load(weighted + rows, mask=inside, other=0.0).to(tl.float64)
    first = tl.load(starts + rows, mask=inside, other=0)
    count = tl.load(starts + rows + 1, mask=inside, other=0) - first
    most = tl.max(count, axis=0)
    targets = tl.zeros((ROWS,), dtype=tl.float64)
    place = 0
    while place < most:
        mask = place < count
        y = tl.load(pair_logits + first + place, mask=mask, other=float("-inf")).to(tl.float64) * LOG2E - k
        e = tl.exp2(y)
        targets += e
        weighted_T += tl.where(mask, e * y, 0.0)
        place += 1
    total_T = others_T + targets
    ln_total = tl.log(total_T)
    place = 0
    while place < most:
        mask = place < count
        y = tl.load(pair_logits + first + place, mask=mask, other=0.0).to(tl.float64) * LOG2E - k
        e = tl.exp2(y)
        rest = others_T + (targets - e)
        # The first form holds where e is 0, the second keeps 1 - p where p rounds to 1.
        value = tl.where(e < rest, y * LN2 - ln_total, -log1p(rest / e))
        tl.store(logprob + first + place, value, mask=mask)
        place += 1
    tl.store(entropy + rows, ln_total - weighted_T / total_T * LN2, mask=inside)
    tl.store(lse + rows, k * LN2 + ln_total, mask=inside)
    tl.store(total + rows, total_T, mask=inside)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["starts", "logprob_grad"])
def row_gradients(
    logprob,  # float64 [U]
    entropy,  # float64 [T]
    total,  # float64 [T]
    starts,  # int64 [T + 1]
    logprob_grad,  # float64 [U]
    entropy_grad,  # float64 [T], read with ENTROPY
    lse_grad,  # float64 [T], read with LSE
    scale,  # [T], written, as all below
    alpha,  # [T], with ENTROPY
    beta,  # [T], with ENTROPY
    target,  # [U]
    live,  # int32, one per program: its rows whose scale is not 0
    num_rows,
    inverse_temperature,  # as a sum of two floats
    inverse_rest,
    ENTROPY: tl.constexpr,
    LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What `vocabulary_head.RowGrads` holds, from the derivatives of a loss."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < num_rows
    inverse = tl.zeros((ROWS,), dtype=tl.float64) + inverse_temperature + inverse_rest
    first = tl.load(starts + rows, mask=inside, other=0)
    count = tl.load(starts + rows + 1, mask=inside, other=0) - first
    most = tl.max(count, axis=0)
    mass = tl.zeros((ROWS,), dtype=tl.float64)
    place = 0
    while place < most:
        mass += tl.load(logprob_grad + first + place, mask=place < count, other=0.0)
        place += 1
    if LSE:
        mass -= tl.load(lse_grad + rows, mask=inside, other=0.0)

    total_T = tl.load(total + rows, mask=inside, other=1.0)
    scale_T = -inverse / total_T
    if ENTROPY:
        entropy_T = tl.load(entropy + rows, mask=inside, other=0.0)
        b = tl.load(entropy_grad + rows, mask=inside, other=0.0)
        a = mass + b * (entropy_T - tl.log(total_T))
        scale_T = tl.where((a == 0.0) & (b == 0.0), 0.0, scale_T)
        tl.store(alpha + rows, a.to(alpha.dtype.element_ty), mask=inside)
        tl.store(beta + rows, (b * LN2).to(beta.dtype.element_ty), mask=inside)
    else:
        scale_T *= mass
    rounded = scale_T.to(scale.dtype.element_ty)
    tl.store(scale + rows, rounded, mask=inside)
    tl.store(live + tl.program_id(0), tl.sum((inside & (rounded != 0.0)).to(tl.int32), axis=0))

    place = 0
    while place < most:
        mask = place < count
        lnp = tl.load(logprob + first + place, mask=mask, other=0.0)
        value = tl.load(logprob_grad + first + place, mask=mask, other=0.0) - mass - mass * expm1(lnp)
        if ENTROPY:
            # An impossible target has no share of the entropy: 0 * infinity is 0 here.
            bounded = tl.maximum(lnp, -1e4, propagate_nan=tl.PropagateNan.ALL)
            value -= b * tl.exp(lnp) * (bounded + entropy_T)
        tl.store(target + first + place, (value * inverse).to(target.dtype.element_ty), mask=mask)
        place += 1


@triton.jit(
    do_not_specialize=["vocabulary"],
    do_not_specialize_on_alignment=["weight", "coefficients", "starts", "targets"],
)
def add_target_columns(
    grad,  # [T, D], added to
    weight,  # [V, D]
    coefficients,  # [U]
    starts,  # int64 [T + 1]
    targets,  # int64 [U]
    width,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """grad[i] += sum over the pairs u of row i of coefficients[u] weight[targets[u]]; a row per program."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < width
        total = tl.load(grad + row * width + columns, mask=mask, other=0.0)
        for pair in range(first, end):
            target = tl.load(targets + pair)
            known = (target >= 0) & (target < vocabulary)
            w = tl.load(weight + tl.where(known, target, 0) * width + columns, mask=mask, other=0.0)
            total += tl.load(coefficients + pair) * w.to(total.dtype)
        tl.store(grad + row * width + columns, total, mask=mask)


@triton.jit(
    do_not_specialize=["num_pairs", "vocabulary"],
    do_not_specialize_on_alignment=["hidden", "coefficients", "rows", "sorted_targets", "order"],
)
def add_target_rows(
    grad,  # [V, D], added to
    hidden,  # [T, D]
    coefficients,  # [U]
    rows,  # int64 [U]
    sorted_targets,  # int64 [U], ascending
    order,  # int64 [U]: which pair each of them belongs to
    num_pairs,
    width,
    vocabulary,
    BLOCK: tl.constexpr,
):
    """grad[v] += sum over the pairs u whose target is v of coefficients[u] hidden[rows[u]], in the order of pairs.

    A program per place in the sorted targets: the first of each run of equal ones does its work.
    """
    place = tl.program_id(0)
    target = tl.load(sorted_targets + place)
    before = tl.load(sorted_targets + place - 1, mask=place > 0, other=-1)
    if (target != before) & (target >= 0) & (target < vocabulary):
        for start in range(0, width, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            mask = columns < width
            total = tl.load(grad + target * width + columns, mask=mask, other=0.0)
            at = place
            current = target
            while current == target:
                pair = tl.load(order + at)
                x = tl.load(hidden + tl.load(rows + pair) * width + columns, mask=mask, other=0.0)
                total += tl.load(coefficients + pair) * x.to(total.dtype)
                at += 1
                current = tl.load(sorted_targets + at, mask=at < num_pairs, other=-1)
            tl.store(grad + target * width + columns, total, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["factor"])
def scale_in_place(
    values,  # [numel]
    factor,  # scalar, of the same dtype
    numel,
    BLOCK: tl.constexpr,
):
    """values *= factor; where the factor is 1, nothing is read."""
    by = tl.load(factor)
    if by != 1.0:
        size = tl.full((), BLOCK, dtype=tl.int64)
        for start in range(tl.program_id(0), tl.cdiv(numel, BLOCK), tl.num_programs(0)):
            at = start * size + tl.arange(0, BLOCK)
            mask = at < numel
            tl.store(values + at, tl.load(values + at, mask=mask) * by, mask=mask)
