"""A linear head and a loss of its tokens' log-probs and entropies, with gradients, in one pass over the vocabulary.

Legend: ``R`` hidden rows, ``D`` width, ``V`` vocabulary, ``C`` tokens.

The loss is any differentiable function of vectors of token statistics. It is evaluated as soon as a chunk's
statistics are known, and its derivatives turn the chunk's stored exponentials into gradients of hidden and weight on
the spot: three GEMMs, logits never stored, nothing computed twice. The price: the loss must be a sum over chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnigrpo_kernels import vocabulary_rows_cuda
from omnigrpo_kernels.chunking import TokenChunk, token_chunks
from omnigrpo_kernels.vocabulary_head import (
    HeadPass,
    StatisticGrads,
    assert_ranges,
    check_head_inputs,
    head_backward,
    head_pass,
    row_grads,
    stat_dtype_of,
)

TokenLoss = Callable[[slice, Tensor, Tensor], Tensor]
"""Tokens of a chunk, their log-probs and entropies ``[tokens]`` (float32, or float64) to their share of the loss, a
scalar."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLossResult:
    """A loss and what it was made of."""

    loss: Tensor
    """Scalar, float32 (float64); differentiable once with respect to hidden and weight."""
    logprob_C: Tensor
    """``[C]``: detached."""
    entropy_C: Tensor
    """``[C]``: detached."""
    dropped_share: float
    """Rows that the gradients' GEMMs left out because their coefficient is 0, over all rows; 0 without gradients."""


def linear_token_loss(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    token_loss: TokenLoss,
    *,
    rows_C: Tensor | None = None,
    temperature: float = 1.0,
    keep_whole_C: Tensor | None = None,
) -> TokenLossResult:
    """Evaluate ``token_loss`` on the tokens' statistics, with gradients of hidden and weight ready for backward.

    Gradients are computed in this call, for the inputs that require them (a frozen weight costs nothing), and handed
    out, times the upstream gradient, by ``loss.backward()``, once. The weight's is summed in float32 over chunks; a
    bfloat16 leaf keeps it so with ``weight.grad_dtype = torch.float32``, which also saves the conversion. A tied
    embedding's gradient adds up with it as any two do.

    With gradients the host waits once a chunk, for the number of rows that are left after dropping.

    Args:
        hidden_RD: float ``[R, D]``, finite (on the CPU that is checked).
        weight_VD: ``[V, D]`` of the same dtype and device.
        targets_C: int64 ``[C]``.
        token_loss: see ``TokenLoss``; called once a chunk, in token order, under autograd.
        rows_C: int64 ``[C]``, the row that predicts each token; row c without it.
        temperature: divides the logits.
        keep_whole_C: int64 ``[C]``, the sequence of each token, where ``token_loss`` couples the tokens of a sequence.

    Raises:
        ValueError: for inputs that have no right answer (see ``vocabulary_head.check_head_inputs``).
    """
    check_head_inputs("linear_token_loss", hidden_RD, weight_VD, targets_C, rows_C, temperature)
    wants_grads = torch.is_grad_enabled()
    dtype = stat_dtype_of(hidden_RD.dtype)
    run = _Run(
        token_loss=token_loss,
        temperature=temperature,
        want_hidden=wants_grads and hidden_RD.requires_grad,
        want_weight=wants_grads and weight_VD.requires_grad,
        logprob_C=hidden_RD.new_empty(len(targets_C), dtype=dtype),
        entropy_C=hidden_RD.new_empty(len(targets_C), dtype=dtype),
    )
    chunks = token_chunks(
        hidden_RD.detach(),
        weight_VD.detach(),
        targets_C,
        rows_C,
        keep_whole_C,
        keep=run.want_hidden or run.want_weight,
    )
    loss = _LinearTokenLoss.apply(hidden_RD, weight_VD, chunks, run)
    assert_ranges("linear_token_loss", hidden_RD, weight_VD, targets_C, rows_C)
    return TokenLossResult(
        loss=loss,
        logprob_C=run.logprob_C,
        entropy_C=run.entropy_C,
        dropped_share=run.dropped_rows / max(1, run.rows),
    )


@dataclass(kw_only=True, slots=True)
class _Run:
    """One call's settings, and the statistics that it fills in."""

    token_loss: TokenLoss
    temperature: float
    want_hidden: bool
    want_weight: bool
    logprob_C: Tensor
    entropy_C: Tensor
    rows: int = 0
    """That went through the vocabulary."""
    dropped_rows: int = 0


class _LinearTokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, chunks: Iterator[TokenChunk], run: _Run
    ) -> Tensor:
        weight_VD = weight_VD.contiguous()
        dtype = stat_dtype_of(hidden_RD.dtype)
        grad_hidden_RD = torch.zeros_like(hidden_RD, dtype=dtype) if run.want_hidden else None
        grad_weight_VD = torch.empty_like(weight_VD, dtype=dtype) if run.want_weight else None
        loss = hidden_RD.new_zeros((), dtype=dtype)
        for chunk in chunks:
            share, grad_TD = _pass_chunk(run, chunk, weight_VD, grad_weight_VD, accumulate=run.rows > 0)
            loss += share
            if grad_hidden_RD is not None and grad_TD is not None:
                chunk.add_to(grad_hidden_RD, grad_TD)
            run.rows += len(chunk.hidden_TD)
        if grad_weight_VD is not None and not run.rows:
            grad_weight_VD.zero_()
        ctx.grads = grad_hidden_RD, grad_weight_VD
        ctx.hidden_dtype = hidden_RD.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        if ctx.grads is None:
            raise RuntimeError("linear_token_loss hands its gradients out once; call it again instead")
        grad_hidden_RD, grad_weight_VD = ctx.grads
        ctx.grads = None
        if grad_hidden_RD is not None:
            grad_hidden_RD = (grad_hidden_RD * upstream).to(ctx.hidden_dtype)
        if grad_weight_VD is not None:
            _scale_(grad_weight_VD, upstream)
        return grad_hidden_RD, grad_weight_VD, None, None


def _pass_chunk(
    run: _Run, chunk: TokenChunk, weight_VD: Tensor, grad_weight_VD: Tensor | None, *, accumulate: bool
) -> tuple[Tensor, Tensor | None]:
    """The chunk's share of the loss and its rows' gradient; its exponentials die with the call."""
    keep = run.want_hidden or run.want_weight
    passed = head_pass(chunk.hidden_TD, weight_VD, chunk.pairs, run.temperature, keep=keep)
    share, grads = _evaluate(run, chunk, passed, run.logprob_C.dtype)
    if not keep:
        return share, None
    grad_TD, dropped = head_backward(
        passed,
        chunk.hidden_TD,
        weight_VD,
        chunk.pairs,
        row_grads(passed, chunk.pairs, grads, run.temperature),
        grad_weight_VD=grad_weight_VD,
        accumulate=accumulate,
        want_hidden=run.want_hidden,
    )
    run.dropped_rows += dropped
    return share, grad_TD


def _evaluate(
    run: _Run, chunk: TokenChunk, passed: HeadPass, dtype: torch.dtype
) -> tuple[Tensor, StatisticGrads]:
    """The chunk's share of the loss and its derivatives."""
    logprob_C = chunk.pairs.of_tokens(passed.logprob_U).to(dtype)
    entropy_C = chunk.pairs.rows_of_tokens(passed.entropy_T).to(dtype)
    run.logprob_C[chunk.tokens], run.entropy_C[chunk.tokens] = logprob_C, entropy_C
    with torch.enable_grad():
        leaves = logprob_C.detach().requires_grad_(), entropy_C.detach().requires_grad_()
        share = run.token_loss(chunk.tokens, *leaves)
        grads = torch.autograd.grad(share, leaves, allow_unused=True) if share.requires_grad else (None, None)
    by_pair = [None if grad_C is None else chunk.pairs.sum_by_pair(grad_C.double()) for grad_C in grads]
    logprob_U, entropy_U = by_pair
    return share.detach(), StatisticGrads(
        logprob_U=torch.zeros_like(passed.logprob_U) if logprob_U is None else logprob_U,
        entropy_T=None if entropy_U is None else chunk.pairs.sum_by_row(entropy_U),
    )


def _scale_(grad_VD: Tensor, upstream: Tensor) -> None:
    """``grad *= upstream``; a factor of 1, as a loss that is the last has it, leaves the largest gradient alone."""
    if grad_VD.is_cuda:
        vocabulary_rows_cuda.scale_in_place_(grad_VD, upstream)
    elif float(upstream) != 1.0:
        grad_VD *= upstream
