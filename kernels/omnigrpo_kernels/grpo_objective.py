"""The objectives of the GRPO family, as differentiable functions of the log-probs of completion tokens.

Legend: ``C`` completion tokens of a pack, in any order. ``A`` advantage, ``r = exp(logp - old)``, ``sg`` stop-gradient.

    loss = sum_C weight_C * (-importance * surrogate + kl_coefficient * KL - entropy_coefficient * entropy)

    loss      surrogate                                              weight of a token                    source (arXiv)
    grpo      min(r A, clip(r, 1 - low, 1 + high) A)                 1 / (sequences * active in sequence) 2402.03300
    dr_grpo   as grpo                                                1 / (sequences * longest allowed)    2503.20783
    dapo      as grpo                                                1 / active tokens of the batch       2503.14476
    bnpo      as grpo                                                1 / (packs * active in the pack)     TRL's "bnpo"
    gspo      as grpo, r the sequence's s                            as grpo                              2507.18071
    cispo     sg(min(r, 1 + high)) A logp                            as dapo                              2506.13585
    sapo      4 / t * sigmoid(t (r - 1)) A, t by the sign of A       as grpo                              2511.20347

``s = exp(mean of logp - old over the sequence's active tokens)``. GSPO is taken in its token form (GSPO-token, section
4.3 of the paper): ``sg(s) * exp(logp - sg(logp))`` in place of ``s``. With one advantage per sequence its value and its
gradient, ``s A / length`` for each token, are those of the sequence form; it takes per-token advantages as well.

Without old log-probs the policy is its own old policy: ``r`` is exactly 1 and its gradient that of ``logp``.
A token of weight 0 is masked: nothing that it holds, infinite or NaN, reaches the loss, a gradient or another token.
No function waits for the device.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from omnigrpo_kernels import grpo_objective_cuda

LossForm = Literal["grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo", "sapo"]
KlEstimator = Literal["k1", "k2", "k3", "k3_k2grad"]
ImportanceCorrection = Literal["truncated", "masked"]
ImportanceLevel = Literal["token", "sequence"]

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to +-20 nats before exp, so that no ratio overflows; outside, a ratio has no gradient."""

_SERIES_BOUND = 0.03
"""Below it, expm1(-x) + x cancels (in float32 1e-2 relative at 1e-5), and the series up to x^9 is exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The objective's switches."""

    loss: LossForm = "grpo"
    """Surrogate and normaliser; see the table of this module."""
    clip_low: float = 0.2
    """The ratio's lower bound is 1 - clip_low. CISPO has none, SAPO has no clip: they do not read it."""
    clip_high: float = 0.2
    """The ratio's upper bound is 1 + clip_high, CISPO's too (TRL's epsilon_high of 5.0 for cispo is 4.0 here)."""
    dual_clip: float | None = None
    """c > 1: for A < 0 the surrogate is max(min(r A, clip(r) A), c A), so a ratio above c has no gradient
    (arXiv:1912.09729; INTELLECT-2's and TRL's delta). Not for cispo and sapo."""
    kl_coefficient: float = 0.04
    """Weight of the KL to the reference policy; 0 switches the reference pass off."""
    kl_estimator: KlEstimator = "k3"
    """See kl_penalty."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    importance_correction: ImportanceCorrection = "truncated"
    """What happens to a rollout importance weight old / rollout above max_importance_weight: truncated takes the
    maximum instead (TRL's token_truncate); masked makes it 0, also below the minimum (IcePop; TRL's token_mask)."""
    importance_level: ImportanceLevel = "token"
    """Whose weight old / rollout is taken: each token's own, or its sequence's, the product over the sequence's active
    tokens, for all of them (TRL's sequence_truncate and sequence_mask)."""
    max_importance_weight: float | None = None
    """Largest train/rollout importance weight; None leaves the mismatch uncorrected."""
    min_importance_weight: float = 0.0
    """Smallest importance weight that "masked" keeps."""
    sapo_temperature_positive: float = 1.0
    """SAPO's t for A > 0."""
    sapo_temperature_negative: float = 1.05
    """SAPO's t for A <= 0; above the positive one, so that bad tokens fade sooner."""

    def __post_init__(self) -> None:
        """Raises ValueError for switches that no objective has."""
        _require_choice("loss", self.loss, LossForm)
        _require_choice("kl_estimator", self.kl_estimator, KlEstimator)
        _require_choice("importance_correction", self.importance_correction, ImportanceCorrection)
        _require_choice("importance_level", self.importance_level, ImportanceLevel)
        _require(0 <= self.clip_low <= 1, "clip_low", self.clip_low, "be in [0, 1]")
        for name in ("clip_high", "kl_coefficient", "min_importance_weight"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "be finite and at least 0")
        for name in ("sapo_temperature_positive", "sapo_temperature_negative"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, value, "be finite and above 0")
        _require(
            math.isfinite(self.entropy_coefficient),
            "entropy_coefficient",
            self.entropy_coefficient,
            "be finite",
        )
        self._check_dual_clip()
        self._check_importance()

    def _check_dual_clip(self) -> None:
        if self.dual_clip is None:
            return
        _require(
            1 < self.dual_clip < math.inf, "dual_clip", self.dual_clip, "be finite and above 1, or left out"
        )
        if self.loss in ("cispo", "sapo"):
            raise ValueError(
                f"objective.dual_clip is {self.dual_clip}, but objective.loss {self.loss} does not clip the surrogate: "
                "leave dual_clip out, or take another loss"
            )

    def _check_importance(self) -> None:
        low, high = self.min_importance_weight, self.max_importance_weight
        if self.importance_correction == "truncated" and low > 0:
            raise ValueError(
                f"objective.min_importance_weight is {low}, but objective.importance_correction truncated has no lower "
                'bound: leave it out, or set importance_correction to "masked"'
            )
        if high is None:
            if self.importance_correction == "masked":
                raise ValueError(
                    'objective.importance_correction is "masked", but objective.max_importance_weight is left out: '
                    "give the largest weight to keep"
                )
            return
        _require(
            0 < high < math.inf, "max_importance_weight", high, "be finite and above 0, or left out for none"
        )
        if low > high:
            raise ValueError(
                f"objective.min_importance_weight is {low}, above objective.max_importance_weight {high}: "
                "no weight would be kept; lower it"
            )


def _require(holds: bool, name: str, value: float, requirement: str) -> None:
    if not holds:
        raise ValueError(f"objective.{name} must {requirement}, got {value}")


def _require_choice(name: str, value: str, choices: object) -> None:
    if value not in get_args(choices):
        raise ValueError(f"objective.{name} must be one of {', '.join(get_args(choices))}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchCounts:
    """What the normalisers divide by: totals of one optimizer step, over all packs and ranks."""

    num_sequences: int
    """Completions. TRL counts fully masked ones too: they shrink the others' share."""
    num_tokens: int
    """Active completion tokens."""
    max_tokens: int
    """The limit on a completion's length (Dr.GRPO's constant)."""
    num_packs: int
    """Packs (BNPO averages over them)."""

    def __post_init__(self) -> None:
        """Raises ValueError for counts below 0, or no limit on the length."""
        for field in fields(self):
            value, least = getattr(self, field.name), int(field.name == "max_tokens")
            if value < least:
                raise ValueError(f"BatchCounts: {field.name} must be at least {least}, got {value}")


def token_weights(loss: LossForm, lengths_C: Tensor, counts: BatchCounts) -> Tensor:
    """Each token's weight in the loss, float64 ``[C]``; the weighted losses of all packs and ranks are summed.

    Because the denominators are global, packs that share ``counts`` add up to the loss and gradient of one large
    batch. BNPO alone does not: as TRL defines it, each pack is normalised by its own active tokens and the packs are
    averaged, so a token weighs more in a pack that holds fewer, and the result depends on how the batch was cut.
    Dr.GRPO's paper sums; dividing by a constant is its code's and TRL's form. DAPO's and CISPO's papers write the
    token mean within a prompt's group; over the whole batch it is TRL's and verl's form.

    Args:
        loss: the loss form.
        lengths_C: integers: active tokens of the completion that each token belongs to; 0 at a masked token, which
            gets the weight 0. All tokens of one pack.
        counts: totals over the whole batch.
    """
    _require_choice("loss", loss, LossForm)
    active_C = (lengths_C > 0).double()
    if loss in ("grpo", "gspo", "sapo"):
        return active_C / (lengths_C.clamp_min(1).double() * max(counts.num_sequences, 1))
    if loss == "bnpo":
        return active_C / (active_C.sum().clamp_min(1) * max(counts.num_packs, 1))
    if loss == "dr_grpo":
        return active_C / max(counts.num_sequences * counts.max_tokens, 1)
    return active_C / max(counts.num_tokens, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenBatch:
    """What the objective takes as constant, per token."""

    advantage_C: Tensor
    """float ``[C]``."""
    weight_C: Tensor
    """float ``[C]``: weight in the loss (token_weights); 0 masks the token."""
    sequence_C: Tensor
    """int64 ``[C]``: any number per completion, the same for all of its tokens."""
    old_C: Tensor | None = None
    """float ``[C]``: log-prob under the policy that the ratio refers to; None for the current policy itself."""
    reference_C: Tensor | None = None
    """float ``[C]``: log-prob under the reference policy; None leaves the KL out."""
    rollout_C: Tensor | None = None
    """float ``[C]``: log-prob that the rollout engine reported; None when importance weights are off."""

    def __post_init__(self) -> None:
        """Raises ValueError for vectors of different lengths."""
        shapes = {name: tuple(value.shape) for name, value in self._vectors().items()}
        if len(self.advantage_C.shape) != 1 or len(set(shapes.values())) > 1:
            raise ValueError(f"TokenBatch: got {shapes}; give every vector one element per token, [C]")

    def select(self, tokens: Tensor | slice) -> "TokenBatch":
        """The batch of some of the tokens: a view for a slice, a copy for an int64 index tensor."""
        if isinstance(tokens, Tensor) and tokens.dtype != torch.int64:
            raise ValueError(
                f"TokenBatch.select: got an index tensor of {tokens.dtype}; give int64 (a mask makes the host wait)"
            )
        return TokenBatch(**{name: value[tokens] for name, value in self._vectors().items()})

    def _vectors(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTerms:
    """Per-token parts of the objective, ``[C]`` in the dtype of the log-probs; all but the loss are detached.

    A masked token holds what equal log-probs and no advantage give: loss 0, KL 0, ratio 1, not clipped.
    """

    loss_C: Tensor
    """Not yet weighted."""
    kl_C: Tensor | None
    """The estimate's value, without its coefficient; None without a reference."""
    ratio_C: Tensor
    """r before any clip; for GSPO the sequence's s."""
    clipped_C: Tensor
    """bool: the clip or the dual clip binds, so the token's policy gradient is zero. For CISPO: its bound replaces
    the ratio, which keeps a gradient. Never for SAPO."""
    importance_C: Tensor | None
    """Truncated or masked weight old / rollout; None when the correction is off."""


def couples_sequences(batch: TokenBatch, config: ObjectiveConfig) -> bool:
    """Whether a token's terms depend on its sequence's other tokens, so that a chunk must hold whole sequences."""
    has_sequence_ratio = config.loss == "gspo" and batch.old_C is not None
    return has_sequence_ratio or (config.importance_level == "sequence" and _corrects(batch, config))


def _corrects(batch: TokenBatch, config: ObjectiveConfig) -> bool:
    """Whether the surrogate is weighted for the mismatch of rollout and training."""
    return config.max_importance_weight is not None and batch.rollout_C is not None


def token_terms(
    logprob_C: Tensor, entropy_C: Tensor, batch: TokenBatch, config: ObjectiveConfig
) -> TokenTerms:
    """The unweighted loss of every token, differentiable in ``logprob_C`` and ``entropy_C``, and its parts.

    The clip binds strictly outside its bounds: a tie at an edge keeps the gradient. The importance weight multiplies
    the surrogate alone. ``entropy_C`` is part of the graph only when its coefficient is not 0.

    Args:
        logprob_C: log-prob of each token under the policy, float32 or float64.
        entropy_C: entropy of the distribution that each token was drawn from.
        batch: the constants, cast to the dtype of ``logprob_C``.
        config: the switches.

    Raises:
        ValueError: for shapes or dtypes that do not fit, a KL coefficient without reference log-probs, or an
            importance correction without rollout log-probs.
    """
    _check_inputs(logprob_C, entropy_C, batch, config)
    if logprob_C.is_cuda and logprob_C.dtype == torch.float32 and not couples_sequences(batch, config):
        return _token_terms_cuda(logprob_C, entropy_C, batch, config)
    active_C = batch.weight_C != 0
    logprob_C = torch.where(active_C, logprob_C, 0)
    advantage_C, old_C, reference_C, rollout_C = (
        None if value_C is None else torch.where(active_C, value_C.detach().to(logprob_C.dtype), 0)
        for value_C in (batch.advantage_C, batch.old_C, batch.reference_C, batch.rollout_C)
    )
    assert advantage_C is not None

    ratio_C = _ratio(logprob_C, old_C, active_C, batch.sequence_C, config)
    surrogate_C, clipped_C = _surrogate(logprob_C, ratio_C, advantage_C, config)
    importance_C = kl_C = None
    if config.max_importance_weight is not None and rollout_C is not None:
        policy_C = logprob_C.detach() if old_C is None else old_C
        importance_C = _importance(policy_C, rollout_C, active_C, batch.sequence_C, config)
        surrogate_C = surrogate_C * importance_C
    loss_C = -surrogate_C
    if reference_C is not None:
        kl_C = kl_penalty(logprob_C, reference_C, config.kl_estimator)
        if config.kl_coefficient:
            loss_C = loss_C + config.kl_coefficient * kl_C
    if config.entropy_coefficient:
        loss_C = loss_C - config.entropy_coefficient * torch.where(active_C, entropy_C, 0)
    return TokenTerms(
        loss_C=loss_C,
        kl_C=None if kl_C is None else kl_C.detach(),
        ratio_C=ratio_C.detach(),
        clipped_C=clipped_C,
        importance_C=importance_C,
    )


def _token_terms_cuda(
    logprob_C: Tensor, entropy_C: Tensor, batch: TokenBatch, config: ObjectiveConfig
) -> TokenTerms:
    """The same in one launch; GSPO's ratio, which couples tokens, has none."""
    terms = grpo_objective_cuda.objective_terms(
        logprob_C,
        entropy_C,
        batch.weight_C,
        batch.advantage_C,
        batch.old_C,
        batch.reference_C,
        batch.rollout_C,
        switches(batch, config),
    )
    return TokenTerms(
        loss_C=terms.loss_C,
        kl_C=terms.kl_C,
        ratio_C=terms.ratio_C,
        clipped_C=terms.clipped_C,
        importance_C=terms.importance_C,
    )


def switches(batch: TokenBatch, config: ObjectiveConfig) -> grpo_objective_cuda.Switches:
    """What the CUDA kernel is told."""
    return grpo_objective_cuda.Switches(
        loss=config.loss if config.loss in ("sapo", "cispo") else "clip",
        kl="none" if batch.reference_C is None else config.kl_estimator,
        importance=config.importance_correction if _corrects(batch, config) else "none",
        low=1 - config.clip_low,
        high=1 + config.clip_high,
        dual=math.inf if config.dual_clip is None else config.dual_clip,
        positive_temperature=config.sapo_temperature_positive,
        negative_temperature=config.sapo_temperature_negative,
        kl_coefficient=config.kl_coefficient,
        entropy_coefficient=config.entropy_coefficient,
        smallest_importance=config.min_importance_weight,
        largest_importance=config.max_importance_weight or math.inf,
        log_bound=LOG_RATIO_BOUND,
    )


def kl_penalty(logprob_C: Tensor, reference_C: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(policy || reference) per token, ``[C]``, from samples of the policy.

    With x = logp - ref (Schulman, "Approximating KL divergence", 2020): k1 = x; k2 = x^2 / 2, whose gradient x is an
    unbiased one of the KL; k3 = exp(-x) - 1 + x >= 0, GRPO's; k3_k2grad has the value of k3 and the gradient of k2
    (verl's "k3+"). Published without clamps. Here x is clamped to +-20 nats in k3, whose gradient is zero outside;
    k1, k2 and the gradient of k3_k2grad need no bound. verl's second clamp, of k3 to 10, is left out: it would
    silence every token that is 2.6 nats below the reference.
    """
    x_C = logprob_C - reference_C
    if estimator == "k1":
        return x_C
    if estimator == "k2":
        return 0.5 * x_C.square()
    bounded_C = x_C.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if estimator == "k3":
        return _with_slope(_k3(bounded_C.detach()), -torch.expm1(-bounded_C.detach()), bounded_C)
    return _with_slope(_k3(bounded_C.detach()), x_C.detach(), x_C)


def _k3(x_C: Tensor) -> Tensor:
    """exp(-x) - 1 + x to a few ulp, without gradient: x^2/2 - x^3/6 + ... - x^9/9! where the terms would cancel."""
    one = x_C.new_ones(())
    series_C = one
    for n in range(9, 2, -1):
        series_C = torch.addcmul(one, x_C, series_C, value=-1.0 / n)
    return torch.where(x_C.abs() < _SERIES_BOUND, 0.5 * x_C.square() * series_C, torch.expm1(-x_C) + x_C)


def _with_slope(value_C: Tensor, slope_C: Tensor, x_C: Tensor) -> Tensor:
    """``value_C`` with the gradient ``slope_C`` with respect to ``x_C``; the first two are constants."""
    return value_C + slope_C * (x_C - x_C.detach())


def _ratio(
    logprob_C: Tensor, old_C: Tensor | None, active_C: Tensor, sequence_C: Tensor, config: ObjectiveConfig
) -> Tensor:
    if old_C is None:
        log_ratio_C = logprob_C - logprob_C.detach()
    elif config.loss == "gspo":
        total_C, length_C = _sequence_sums(logprob_C.detach() - old_C, active_C, sequence_C)
        mean_C = torch.where(active_C, total_C / length_C.clamp_min(1), 0).to(logprob_C.dtype)
        log_ratio_C = mean_C + (logprob_C - logprob_C.detach())
    else:
        log_ratio_C = logprob_C - old_C
    return torch.exp(log_ratio_C.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def _sequence_sums(value_C: Tensor, active_C: Tensor, sequence_C: Tensor) -> tuple[Tensor, Tensor]:
    """At each token, its sequence's sum of the values, which are 0 where masked, and its number of active tokens.

    Sums are float64, and index_put rather than index_add: on CUDA it sorts, so a second run gives the same bits.
    """
    slot_C = torch.searchsorted(sequence_C.sort().values, sequence_C.contiguous())
    zeros_C = torch.zeros_like(value_C, dtype=torch.float64)
    totals_C = zeros_C.index_put((slot_C,), value_C.double(), accumulate=True)
    lengths_C = zeros_C.index_put((slot_C,), active_C.double(), accumulate=True)
    return totals_C[slot_C], lengths_C[slot_C]


def _surrogate(
    logprob_C: Tensor, ratio_C: Tensor, advantage_C: Tensor, config: ObjectiveConfig
) -> tuple[Tensor, Tensor]:
    """What the objective maximises, and where its clip binds."""
    is_good_C = advantage_C > 0
    high = 1 + config.clip_high
    if config.loss == "sapo":
        positive, negative = config.sapo_temperature_positive, config.sapo_temperature_negative
        t_C = torch.full_like(ratio_C, negative).masked_fill(is_good_C, positive)
        return 4 / t_C * torch.sigmoid(t_C * (ratio_C - 1)) * advantage_C, torch.zeros_like(is_good_C)
    if config.loss == "cispo":
        bounded_C = ratio_C.detach().clamp(max=high)
        surrogate_C = bounded_C * advantage_C * logprob_C
    else:
        low_C = ratio_C.clamp(min=1 - config.clip_low, max=config.dual_clip)
        bounded_C = torch.where(is_good_C, ratio_C.clamp(max=high), low_C)
        surrogate_C = bounded_C * advantage_C
    return surrogate_C, (bounded_C.detach() != ratio_C.detach()) & (advantage_C != 0)


def _importance(
    old_C: Tensor, rollout_C: Tensor, active_C: Tensor, sequence_C: Tensor, config: ObjectiveConfig
) -> Tensor:
    log_weight_C = old_C - rollout_C
    if config.importance_level == "sequence":
        total_C, _ = _sequence_sums(log_weight_C, active_C, sequence_C)
        log_weight_C = torch.where(active_C, total_C, 0).to(log_weight_C.dtype)
    weight_C = torch.exp(log_weight_C.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    assert config.max_importance_weight is not None
    if config.importance_correction == "truncated":
        return weight_C.clamp(max=config.max_importance_weight)
    is_kept_C = (weight_C >= config.min_importance_weight) & (weight_C <= config.max_importance_weight)
    return torch.where(is_kept_C, weight_C, 0)


def _check_inputs(logprob_C: Tensor, entropy_C: Tensor, batch: TokenBatch, config: ObjectiveConfig) -> None:
    if not logprob_C.shape == entropy_C.shape == batch.advantage_C.shape:
        raise ValueError(
            f"token_terms: got log-probs {tuple(logprob_C.shape)}, entropies {tuple(entropy_C.shape)} and a batch of "
            f"{tuple(batch.advantage_C.shape)}; give one element per token, [C]"
        )
    if logprob_C.dtype not in (torch.float32, torch.float64) or entropy_C.dtype != logprob_C.dtype:
        raise ValueError(
            f"token_terms: got log-probs {logprob_C.dtype}, entropies {entropy_C.dtype}; give both float32 or float64"
        )
    if config.kl_coefficient and batch.reference_C is None:
        raise ValueError(
            f"objective.kl_coefficient is {config.kl_coefficient}, but the batch has no reference log-probs: "
            "give them, or set it to 0"
        )
    if config.max_importance_weight is not None and batch.rollout_C is None:
        raise ValueError(
            f"objective.max_importance_weight is {config.max_importance_weight}, but the batch has no rollout "
            "log-probs: give them, or leave it out"
        )
