"""Triton kernel of the objectives; `grpo_objective_cuda` launches it, `grpo_objective` says what it computes.

Legend: ``C`` tokens. Lengths are never specialised on.
"""

import triton
import triton.language as tl

from omnigrpo_kernels.vocabulary_rows_triton import expm1

SERIES_BOUND = tl.constexpr(0.03)
"""Below it expm1(-x) + x cancels; the series up to x^9 is exact."""


@triton.jit
def bounded(x, low, high):
    """x between the bounds; NaN stays."""
    x = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def k3(x):
    """exp(-x) - 1 + x in float64, for |x| at most 20."""
    series = 1.0 - x * (1.0 / 9)
    series = 1.0 - x * series * (1.0 / 8)
    series = 1.0 - x * series * (1.0 / 7)
    series = 1.0 - x * series * (1.0 / 6)
    series = 1.0 - x * series * (1.0 / 5)
    series = 1.0 - x * series * (1.0 / 4)
    series = 1.0 - x * series * (1.0 / 3)
    return tl.where(tl.abs(x) < SERIES_BOUND, 0.5 * x * x * series, expm1(-x) + x)


@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=[
        "logprob",
        "entropy",
        "weight",
        "advantage",
        "old",
        "reference",
        "rollout",
    ],
)
def objective_terms(
    logprob,  # float32 [C], as the other inputs
    entropy,  # read with ENTROPY
    weight,
    advantage,
    old,  # read with OLD
    reference,  # read with KL
    rollout,  # read with IMPORTANCE
    loss,  # float32 [C], written, as all below
    logprob_slope,  # derivative of the loss
    entropy_slope,  # with ENTROPY
    kl,  # with KL
    ratio,
    clipped,  # bool
    importance,  # with IMPORTANCE
    num_tokens,
    low,  # bounds of the ratio
    high,
    dual,
    positive_temperature,
    negative_temperature,
    kl_coefficient,
    entropy_coefficient,
    smallest_importance,
    largest_importance,
    log_bound,
    LOSS: tl.constexpr,
    KL: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    OLD: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Every token's loss, its slopes and its parts.

    Exponentials are float64's, rounded to float32 before a ratio meets its bounds. LOSS is ``sapo``, ``cispo`` or
    ``clip``; KL an estimator or ``none``; IMPORTANCE ``truncated``, ``masked`` or ``none``.
    """
    at = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = at < num_tokens
    active = inside & (tl.load(weight + at, mask=inside, other=0.0) != 0)
    logp = tl.load(logprob + at, mask=active, other=0.0).to(tl.float32)
    adv = tl.load(advantage + at, mask=active, other=0.0).to(tl.float32)
    old_logp = logp
    if OLD:
        old_logp = tl.load(old + at, mask=active, other=0.0).to(tl.float32)
    log_ratio = logp - old_logp
    r = tl.exp(bounded(log_ratio, -log_bound, log_bound).to(tl.float64)).to(tl.float32)
    ratio_slope = tl.where(tl.abs(log_ratio) <= log_bound, r, 0.0)

    good = adv > 0
    if LOSS == "sapo":
        t = tl.where(good, positive_temperature, negative_temperature)
        gate = (1.0 / (1.0 + tl.exp(-(t * (r - 1.0)).to(tl.float64)))).to(tl.float32)
        surrogate = 4.0 / t * gate * adv
        slope = 4.0 * gate * (1.0 - gate) * adv * ratio_slope
        binds = r != r
    else:
        if LOSS == "cispo":
            limited = tl.minimum(r, high, propagate_nan=tl.PropagateNan.ALL)
            surrogate = limited * adv * logp
            slope = limited * adv
        else:
            upper = tl.minimum(r, high, propagate_nan=tl.PropagateNan.ALL)
            limited = tl.where(good, upper, bounded(r, low, dual))
            surrogate = limited * adv
            free = tl.where(good, r <= high, (r >= low) & (r <= dual))
            slope = tl.where(free, adv, 0.0) * ratio_slope
        binds = (limited != r) & (adv != 0)
    tl.store(ratio + at, r, mask=inside)
    tl.store(clipped + at, binds & active, mask=inside)

    if IMPORTANCE != "none":
        mismatch = old_logp - tl.load(rollout + at, mask=active, other=0.0).to(tl.float32)
        w = tl.exp(bounded(mismatch, -log_bound, log_bound).to(tl.float64)).to(tl.float32)
        if IMPORTANCE == "truncated":
            w = tl.minimum(w, largest_importance, propagate_nan=tl.PropagateNan.ALL)
        else:
            w = tl.where((w >= smallest_importance) & (w <= largest_importance), w, 0.0)
        surrogate *= w
        slope *= w
        tl.store(importance + at, w, mask=inside)

    total = -surrogate
    slope = -slope
    if KL != "none":
        x = (logp - tl.load(reference + at, mask=active, other=0.0).to(tl.float32)).to(tl.float64)
        x_bounded = bounded(x, -log_bound, log_bound)
        if KL == "k1":
            value = x
            kl_slope = x * 0.0 + 1.0
        elif KL == "k2":
            value = 0.5 * x * x
            kl_slope = x
        elif KL == "k3":
            value = k3(x_bounded)
            kl_slope = tl.where(tl.abs(x) <= log_bound, -expm1(-x_bounded), 0.0)
        else:
            value = k3(x_bounded)
            kl_slope = x
        value = value.to(tl.float32)
        tl.store(kl + at, value, mask=inside)
        if kl_coefficient != 0:  # else what it holds stays out, infinite or NaN
            total += kl_coefficient * value
            slope += kl_coefficient * kl_slope.to(tl.float32)
    if ENTROPY:
        total -= entropy_coefficient * tl.load(entropy + at, mask=active, other=0.0).to(tl.float32)
        tl.store(entropy_slope + at, tl.where(active, -entropy_coefficient, 0.0), mask=inside)
    tl.store(loss + at, total, mask=inside)
    tl.store(logprob_slope + at, tl.where(active, slope, 0.0), mask=inside)
