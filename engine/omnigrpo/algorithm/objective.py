"""The clipped GRPO objective with a KL penalty, as a weighted sum over completion tokens.

Everything here is over packed completion tokens ``C``. A loss form is nothing but a weight per token: the loss is
``sum(weight_C * token_loss_C)``, and because the weights carry global counts, the losses of several packs (or ranks)
add up to that of one large batch.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossForm = Literal["grpo", "dr_grpo", "dapo"]
KlEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The objective's switches."""

    loss: LossForm = "grpo"
    """grpo: mean over sequences of token means; dapo: mean over all tokens; dr_grpo: sum over a constant length."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.04
    """Weight of the KL to the reference policy; 0 switches the reference pass off."""
    kl_estimator: KlEstimator = "k3"
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    max_importance_weight: float | None = None
    """Cap of the train/rollout importance weight of a token; None leaves the mismatch uncorrected."""

    def __post_init__(self) -> None:
        """Reject switches that no objective has."""
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise ValueError(
                f"objective.clip_low must be in [0, 1] and clip_high >= 0, got {self.clip_low} and {self.clip_high}"
            )
        if self.kl_coefficient < 0:
            raise ValueError(
                f"objective.kl_coefficient must be >= 0, got {self.kl_coefficient}; 0 turns the KL off"
            )
        if self.max_importance_weight is not None and not self.max_importance_weight > 0:
            raise ValueError(
                f"objective.max_importance_weight must be > 0, got {self.max_importance_weight}; leave it out for none"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTerms:
    """Per-token parts of the objective, float, ``[C]`` each."""

    loss_C: Tensor
    kl_C: Tensor | None
    """None without a reference."""
    ratio_C: Tensor
    clipped_C: Tensor
    """bool: the clip binds, so the token's policy gradient is zero."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchCounts:
    """Global counts that a loss form divides by."""

    num_sequences: int
    num_tokens: int
    max_tokens: int
    """The limit on a completion's length (Dr.GRPO's constant)."""


def token_weights(form: LossForm, lengths_C: Tensor, counts: BatchCounts) -> Tensor:
    """Return each token's weight in the loss, float64 ``[C]``.

    Args:
        form: the loss form.
        lengths_C: length of the completion that each token belongs to.
        counts: totals over the whole batch, all packs and ranks.
    """
    if form == "grpo":
        return 1.0 / (lengths_C.double() * counts.num_sequences)
    denominator = counts.num_tokens if form == "dapo" else counts.num_sequences * counts.max_tokens
    return torch.full(lengths_C.shape, 1.0 / denominator, dtype=torch.float64, device=lengths_C.device)


def kl_penalty(logprob_C: Tensor, reference_C: Tensor, estimator: KlEstimator) -> Tensor:
    """Estimate KL(policy || reference) per token from samples of the policy (Schulman, "Approximating KL")."""
    log_ratio = logprob_C - reference_C
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return torch.expm1(-log_ratio) + log_ratio


def token_terms(
    logprob_C: Tensor,
    *,
    entropy_C: Tensor,
    old_C: Tensor,
    reference_C: Tensor | None,
    rollout_C: Tensor,
    advantage_C: Tensor,
    config: ObjectiveConfig,
) -> TokenTerms:
    """Return the unweighted loss of every token and what the metrics need.

    ``-min(r A, clip(r, 1 - low, 1 + high) A) + beta KL - entropy bonus`` with ``r = exp(logprob - old)``; a tie at the
    clip edge keeps the gradient. ``old_C``, ``reference_C`` and ``rollout_C`` are constants.
    """
    ratio_C = torch.exp(logprob_C - old_C)
    free_C = ratio_C * advantage_C
    bounded_C = ratio_C.clamp(1 - config.clip_low, 1 + config.clip_high) * advantage_C
    clipped_C = bounded_C < free_C
    surrogate_C = torch.where(clipped_C, bounded_C, free_C)
    if config.max_importance_weight is not None:
        surrogate_C = surrogate_C * torch.exp(old_C - rollout_C).clamp(max=config.max_importance_weight)
    loss_C = -surrogate_C - config.entropy_coefficient * entropy_C
    kl_C = None
    if reference_C is not None:
        kl_C = kl_penalty(logprob_C, reference_C, config.kl_estimator)
        loss_C = loss_C + config.kl_coefficient * kl_C
        kl_C = kl_C.detach()
    return TokenTerms(loss_C=loss_C, kl_C=kl_C, ratio_C=ratio_C.detach(), clipped_C=clipped_C)
