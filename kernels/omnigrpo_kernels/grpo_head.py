"""The vocabulary head and the GRPO objective in one pass, gradients included.

Legend: ``R`` hidden rows, ``D`` width, ``V`` vocabulary, ``C`` completion tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omnigrpo_kernels.grpo_objective import (
    ObjectiveConfig,
    TokenBatch,
    TokenTerms,
    couples_sequences,
    token_terms,
)
from omnigrpo_kernels.linear_logprob import linear_logprob_reference
from omnigrpo_kernels.linear_token_loss import linear_token_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoHeadResult:
    """The objective of one pack, and the statistics of the same pass; vectors are detached and on the device."""

    loss: Tensor
    """Scalar ``sum(weight_C * loss_C)``; ``backward`` hands out gradients that are already computed, once."""
    logprob_C: Tensor
    """``[C]``: log-prob of each token under the policy."""
    entropy_C: Tensor
    """``[C]``: entropy at each token's row."""
    terms: TokenTerms
    """Per-token parts of the objective."""
    dropped_share: float
    """Rows that the gradients' GEMMs left out (clipped, masked or without advantage) over all rows."""


def grpo_head(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    batch: TokenBatch,
    config: ObjectiveConfig,
    *,
    rows_C: Tensor | None = None,
    temperature: float = 1.0,
) -> GrpoHeadResult:
    """Log-probs, objective and gradients of completion tokens: three GEMMs, logits never stored.

    The statistics stay on the device. With gradients the host waits once a chunk, for the number of rows that are left
    after dropping; GSPO with old log-probs reads its sequence numbers, too.

    Args:
        hidden_RD: final hidden states ``[R, D]`` of the rows that predict a token.
        weight_VD: the head ``[V, D]``; a frozen one costs no work.
        targets_C: int64 ``[C]``, the completion tokens.
        batch: the objective's constants, ``[C]`` each, on the device of ``hidden_RD``; denominators are in its weights.
        config: the objective.
        rows_C: int64 ``[C]``, the row that predicts each token (a prefix's last row predicts the first token of all
            its completions); row c without it.
        temperature: divides the logits, as it did in the rollout.

    Raises:
        ValueError: for inputs that have no right answer, or a batch of another length.
    """
    if len(batch.advantage_C) != len(targets_C):
        raise ValueError(
            f"grpo_head: got {len(targets_C)} targets and {len(batch.advantage_C)} advantages; give one a token"
        )
    parts: list[TokenTerms] = []

    def token_loss(tokens: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        chunk = batch.select(tokens)
        terms = token_terms(logprob_C, entropy_C, chunk, config)
        parts.append(terms)
        return (chunk.weight_C.to(logprob_C) * terms.loss_C).sum()

    result = linear_token_loss(
        hidden_RD,
        weight_VD,
        targets_C,
        token_loss,
        rows_C=rows_C,
        temperature=temperature,
        keep_whole_C=batch.sequence_C if couples_sequences(batch, config) else None,
    )
    return GrpoHeadResult(
        loss=result.loss,
        logprob_C=result.logprob_C,
        entropy_C=result.entropy_C,
        terms=_joined(parts, result.logprob_C),
        dropped_share=result.dropped_share,
    )


def grpo_head_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    batch: TokenBatch,
    config: ObjectiveConfig,
    *,
    rows_C: Tensor | None = None,
    temperature: float = 1.0,
) -> GrpoHeadResult:
    """The same through ``log_softmax`` of all logits at once and autograd."""
    policy = linear_logprob_reference(hidden_RD, weight_VD, targets_C, rows_C=rows_C, temperature=temperature)
    terms = token_terms(policy.logprob_T, policy.entropy_T, batch, config)
    return GrpoHeadResult(
        loss=(batch.weight_C.to(terms.loss_C) * terms.loss_C).sum(),
        logprob_C=policy.logprob_T.detach(),
        entropy_C=policy.entropy_T.detach(),
        terms=_joined([terms], policy.logprob_T),
        dropped_share=0.0,
    )


def _joined(parts: list[TokenTerms], logprob_C: Tensor) -> TokenTerms:
    """The chunks' terms as one, detached."""

    def join(values: list[Tensor | None]) -> Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present).detach() if present else None

    empty = logprob_C.new_empty(0)
    return TokenTerms(
        loss_C=torch.cat([empty, *(part.loss_C.detach() for part in parts)]),
        ratio_C=torch.cat([empty, *(part.ratio_C for part in parts)]),
        clipped_C=torch.cat([empty.bool(), *(part.clipped_C for part in parts)]),
        kl_C=join([part.kl_C for part in parts]),
        importance_C=join([part.importance_C for part in parts]),
    )
