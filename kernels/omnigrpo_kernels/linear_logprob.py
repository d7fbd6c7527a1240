"""Log-prob, entropy and logsumexp of a linear head, without the logits of all rows at once.

Legend: ``R`` hidden rows, ``D`` width, ``V`` vocabulary, ``C`` tokens.

    z = hidden weight^T / temperature        logprob_c = z[row_c, target_c] - lse[row_c]
    lse_i = log sum_j exp z[i, j]            entropy_i = lse_i - sum_j softmax(z)[i, j] z[i, j]

Forward alone is one GEMM and keeps nothing of the size of the vocabulary. What a loss makes of the results is not
known until backward, which therefore computes a chunk's exponentials again (four GEMMs in all); a loss that is known
beforehand takes three: ``omnigrpo_kernels.linear_token_loss``. The pass itself is ``omnigrpo_kernels.vocabulary_head``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnigrpo_kernels.chunking import TokenChunk, token_chunks
from omnigrpo_kernels.vocabulary_head import (
    StatisticGrads,
    assert_ranges,
    check_head_inputs,
    head_backward,
    head_pass,
    row_grads,
    stat_dtype_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LogProbs:
    """Statistics of the head's distribution at each token, in nats: float32, or float64 for float64 inputs."""

    logprob_T: Tensor
    """``[C]``: log-prob of the token."""
    entropy_T: Tensor
    """``[C]``: entropy over the vocabulary."""
    lse_T: Tensor
    """``[C]``: logsumexp of the logits divided by the temperature."""


def linear_logprob_reference(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    *,
    rows_C: Tensor | None = None,
    temperature: float = 1.0,
) -> LogProbs:
    """The same through ``log_softmax`` of all logits at once, which have the inputs' dtype; statistics are float32."""
    if rows_C is not None:
        hidden_RD = hidden_RD[rows_C]
    z_CV = (hidden_RD @ weight_VD.T).to(stat_dtype_of(hidden_RD.dtype)) / temperature
    logp_CV = z_CV.log_softmax(dim=-1)
    return LogProbs(
        logprob_T=logp_CV.gather(1, targets_C[:, None]).squeeze(1),
        entropy_T=-(logp_CV.exp() * logp_CV).sum(dim=-1),
        lse_T=z_CV.logsumexp(dim=-1),
    )


def linear_logprob(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    *,
    rows_C: Tensor | None = None,
    temperature: float = 1.0,
) -> LogProbs:
    """Log-prob of ``targets_C`` under ``softmax(hidden_RD @ weight_VD.T / temperature)``, with entropy and lse.

    Token c is predicted by row ``rows_C[c]`` (int64, on the targets' device, any order and repetition), or by row c
    without ``rows_C``. Products of bfloat16 are summed in float32 and never rounded to bfloat16: on the CPU a log-prob
    is within 1e-5 of the exact one. A row that predicts tokens of two chunks is computed in both, and its log-prob may
    then differ in the last bit from that of another chunk size. All three results are differentiable with respect to
    ``hidden_RD`` and ``weight_VD``, once. Raises ValueError for inputs that have no right answer (see
    ``vocabulary_head.check_head_inputs``).
    """
    check_head_inputs("linear_logprob", hidden_RD, weight_VD, targets_C, rows_C, temperature)
    logprob_C, entropy_C, lse_C = _LinearLogprob.apply(hidden_RD, weight_VD, targets_C, rows_C, temperature)
    assert_ranges("linear_logprob", hidden_RD, weight_VD, targets_C, rows_C)
    return LogProbs(logprob_T=logprob_C, entropy_T=entropy_C, lse_T=lse_C)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        targets_C: Tensor,
        rows_C: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        weight_VD = weight_VD.contiguous()
        dtype = stat_dtype_of(hidden_RD.dtype)
        parts = []
        for chunk in token_chunks(hidden_RD, weight_VD, targets_C, rows_C, keep=False):
            passed = head_pass(chunk.hidden_TD, weight_VD, chunk.pairs, temperature, keep=False)
            parts.append(
                (
                    chunk.pairs.of_tokens(passed.logprob_U).to(dtype),
                    chunk.pairs.rows_of_tokens(passed.entropy_T).to(dtype),
                    chunk.pairs.rows_of_tokens(passed.lse_T).to(dtype),
                )
            )
        empty = (hidden_RD.new_empty(0, dtype=dtype),) * 3
        logprob_C, entropy_C, lse_C = (torch.cat(part) for part in zip(*(parts or [empty]), strict=True))
        ctx.save_for_backward(hidden_RD, weight_VD, targets_C, rows_C)
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        return logprob_C, entropy_C, lse_C

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads_C: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_RD, weight_VD, targets_C, rows_C = ctx.saved_tensors
        want_hidden, want_weight, *_ = ctx.needs_input_grad
        dtype = stat_dtype_of(hidden_RD.dtype)
        grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=dtype) if want_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD, dtype=dtype) if want_weight else None
        if not len(targets_C) and grad_weight_VD is not None:
            grad_weight_VD.zero_()
        for index, chunk in enumerate(token_chunks(hidden_RD, weight_VD, targets_C, rows_C)):
            grad_TD = _chunk_grad(
                chunk,
                weight_VD,
                [None if grad_C is None else grad_C[chunk.tokens] for grad_C in grads_C],
                ctx.temperature,
                grad_weight_VD=grad_weight_VD,
                accumulate=index > 0,
                want_hidden=want_hidden,
            )
            if grad_hidden_RD is not None and grad_TD is not None:
                chunk.add_to(grad_hidden_RD, grad_TD)
        return (
            None if grad_hidden_RD is None else grad_hidden_RD.to(hidden_RD.dtype),
            grad_weight_VD,
            None,
            None,
            None,
        )


def _chunk_grad(
    chunk: TokenChunk,
    weight_VD: Tensor,
    grads_C: Sequence[Tensor | None],
    temperature: float,
    *,
    grad_weight_VD: Tensor | None,
    accumulate: bool,
    want_hidden: bool,
) -> Tensor | None:
    """The rows' gradient, the weight's added to ``grad_weight_VD``; the exponentials die with the call."""
    passed = head_pass(chunk.hidden_TD, weight_VD, chunk.pairs, temperature, keep=True)
    logprob_U, entropy_U, lse_U = (
        None if grad_C is None else chunk.pairs.sum_by_pair(grad_C.double()) for grad_C in grads_C
    )
    statistics = StatisticGrads(
        logprob_U=torch.zeros_like(passed.logprob_U) if logprob_U is None else logprob_U,
        entropy_T=None if entropy_U is None else chunk.pairs.sum_by_row(entropy_U),
        lse_T=None if lse_U is None else chunk.pairs.sum_by_row(lse_U),
    )
    grad_TD, _ = head_backward(
        passed,
        chunk.hidden_TD,
        weight_VD,
        chunk.pairs,
        row_grads(passed, chunk.pairs, statistics, temperature),
        grad_weight_VD=grad_weight_VD,
        accumulate=accumulate,
        want_hidden=want_hidden,
    )
    return grad_TD
