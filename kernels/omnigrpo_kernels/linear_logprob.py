"""Log-prob, entropy and logsumexp of a linear head, without the logits of all rows at once.

Legend: ``T`` rows, ``D`` width, ``V`` vocabulary, ``C`` rows of one chunk.

    z = hidden weight^T / temperature        logprob_i = z[i, target_i] - lse_i
    lse_i = log sum_j exp z[i, j]            entropy_i = lse_i - sum_j softmax(z)[i, j] z[i, j]

Rows go through in chunks of a byte budget; backward computes a chunk's logits again, bit for bit, and turns them
into their gradient in place. Logits have the dtype of ``hidden``; statistics and the sums over chunks are float32
(float64 for float64).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnigrpo_kernels import extension

extension.load()

CHUNK_BYTES = 128 << 20
"""Logits of one chunk, in their own dtype; at least one row."""


_LOGP_FLOOR = -1e4
"""exp() of it is 0 in every dtype, and so is its product with a masked logit, which -infinity would turn to NaN."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogProbs:
    """Statistics of the head's distribution at each row, in nats: float32, or float64 for float64 inputs."""

    logprob_T: Tensor
    """``[T]``: log-prob of the row's target."""
    entropy_T: Tensor
    """``[T]``: entropy over the vocabulary."""
    lse_T: Tensor
    """``[T]``: logsumexp of the logits divided by the temperature."""


def linear_logprob_reference(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0
) -> LogProbs:
    """The same through ``log_softmax`` of all logits at once, in float32 (float64 for float64)."""
    stat_dtype = _stat_dtype(hidden_TD.dtype)
    z_TV = (hidden_TD @ weight_VD.T).to(stat_dtype) / temperature
    logp_TV = z_TV.log_softmax(dim=-1)
    return LogProbs(
        logprob_T=logp_TV.gather(1, targets_T[:, None]).squeeze(1),
        entropy_T=-(logp_TV.exp() * logp_TV).sum(dim=-1),
        lse_T=z_TV.logsumexp(dim=-1),
    )


def _logit_row_stats_torch(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.to(_stat_dtype(logits.dtype)) / temperature
    lse = z.logsumexp(dim=-1)
    logp = z - lse[:, None]
    entropy = -(logp.exp() * logp.clamp_min(_LOGP_FLOOR)).sum(dim=-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy, lse


def _logit_row_grads_torch_(
    logits: Tensor,
    targets: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    temperature: float,
) -> None:
    logp = (logits.to(lse.dtype) / temperature - lse[:, None]).clamp_min(_LOGP_FLOOR)
    constant = grad_lse - grad_logprob - grad_entropy * entropy
    dz = logp.exp() * (constant[:, None] - grad_entropy[:, None] * logp)
    dz.scatter_add_(1, targets[:, None], grad_logprob[:, None])
    logits.copy_(dz / temperature)


torch.library.register_kernel("omnigrpo::logit_row_stats", "cuda", _logit_row_stats_torch)
torch.library.register_kernel("omnigrpo::logit_row_grads_", "cuda", _logit_row_grads_torch_)


@torch.library.register_fake("omnigrpo::logit_row_stats")
def _logit_row_stats_fake(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], _stat_dtype(logits.dtype)
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
    )


@torch.library.register_fake("omnigrpo::logit_row_grads_")
def _logit_row_grads_fake_(
    logits: Tensor,
    targets: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_lse: Tensor,
    temperature: float,
) -> None:
    """Writes ``logits`` and returns nothing."""


def linear_logprob(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, *, temperature: float = 1.0
) -> LogProbs:
    """Log-prob of ``targets_T`` under ``softmax(hidden_TD @ weight_VD.T / temperature)``, with entropy and lse.

    All three results are differentiable with respect to ``hidden_TD`` and ``weight_VD``, once. Raises ValueError
    for shapes, dtypes, devices, targets or a temperature that do not fit; on CUDA a target out of range is a
    device-side assertion, so that the check does not wait for the device.
    """
    _check_inputs(hidden_TD, weight_VD, targets_T, temperature)
    logprob_T, entropy_T, lse_T = _LinearLogprob.apply(
        hidden_TD, weight_VD, targets_T.contiguous(), temperature
    )
    return LogProbs(logprob_T=logprob_T, entropy_T=entropy_T, lse_T=lse_T)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats = [
            torch.ops.omnigrpo.logit_row_stats(logits_CV, targets_T[rows], temperature)
            for rows, logits_CV in _logit_chunks(hidden_TD, weight_VD)
        ]
        empty = (hidden_TD.new_empty(0, dtype=_stat_dtype(hidden_TD.dtype)),) * 3
        logprob_T, entropy_T, lse_T = (torch.cat(parts) for parts in zip(*(stats or [empty]), strict=True))
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, logprob_T, entropy_T, lse_T)
        ctx.temperature = temperature
        return logprob_T, entropy_T, lse_T

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads_T: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_TD, weight_VD, *stats_T = ctx.saved_tensors
        rows_T = (*stats_T, *(grad_T.contiguous() for grad_T in grads_T))
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        grad_hidden_TD = hidden_TD.new_empty(hidden_TD.shape) if wants_hidden else None
        grad_weight_VD = None
        for rows, logits_CV in _logit_chunks(hidden_TD, weight_VD):
            torch.ops.omnigrpo.logit_row_grads_(
                logits_CV, *(row_T[rows] for row_T in rows_T), ctx.temperature
            )
            if grad_hidden_TD is not None:
                torch.mm(logits_CV, weight_VD, out=grad_hidden_TD[rows])
            if wants_weight:
                grad_weight_VD = _add_product(grad_weight_VD, logits_CV.T, hidden_TD[rows])
        if wants_weight:
            grad_weight_VD = _in_dtype_of(weight_VD, grad_weight_VD)
        return grad_hidden_TD, grad_weight_VD, None, None


def _logit_chunks(hidden_TD: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges and their logits, which are valid until the next chunk: the buffer is one and the same."""
    num_rows, vocabulary = hidden_TD.shape[0], weight_VD.shape[0]
    chunk_rows = min(num_rows, max(1, CHUNK_BYTES // (vocabulary * hidden_TD.element_size())))
    buffer_CV = hidden_TD.new_empty(chunk_rows, vocabulary)
    for start in range(0, num_rows, max(1, chunk_rows)):
        rows = slice(start, min(start + chunk_rows, num_rows))
        logits_CV = buffer_CV[: rows.stop - start]
        yield rows, torch.mm(hidden_TD[rows], weight_VD.T, out=logits_CV)


def _add_product(sum_VD: Tensor | None, left_VC: Tensor, right_CD: Tensor) -> Tensor:
    """The sum over chunks, in float32 from the second chunk on: one chunk alone needs no wider sum."""
    if sum_VD is None:
        return left_VC @ right_CD
    sum_VD = sum_VD.to(_stat_dtype(left_VC.dtype))
    if sum_VD.dtype == left_VC.dtype:
        return sum_VD.addmm_(left_VC, right_CD)
    return sum_VD.add_(left_VC @ right_CD)


def _in_dtype_of(weight_VD: Tensor, grad_VD: Tensor | None) -> Tensor:
    return torch.zeros_like(weight_VD) if grad_VD is None else grad_VD.to(weight_VD.dtype)


def _stat_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_inputs(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, temperature: float) -> None:
    shapes = (
        f"hidden {tuple(hidden_TD.shape)}, weight {tuple(weight_VD.shape)}, targets {tuple(targets_T.shape)}"
    )
    if (hidden_TD.dim(), weight_VD.dim(), targets_T.dim()) != (2, 2, 1) or 0 in weight_VD.shape:
        raise ValueError(f"linear_logprob: got {shapes}; give hidden [T, D], weight [V, D] and targets [T]")
    if hidden_TD.shape[1] != weight_VD.shape[1] or hidden_TD.shape[0] != targets_T.shape[0]:
        raise ValueError(
            f"linear_logprob: got {shapes}; D of hidden and weight and T of hidden and targets differ"
        )
    if hidden_TD.dtype != weight_VD.dtype or not hidden_TD.dtype.is_floating_point:
        raise ValueError(
            f"linear_logprob: got hidden {hidden_TD.dtype}, weight {weight_VD.dtype}; give one float dtype"
        )
    if hidden_TD.device.type == "cpu" and hidden_TD.dtype == torch.float16:
        raise ValueError("linear_logprob: got float16 on the CPU; give bfloat16, float32 or float64")
    if targets_T.dtype != torch.int64:
        raise ValueError(f"linear_logprob: got targets {targets_T.dtype}; give int64")
    if len({hidden_TD.device, weight_VD.device, targets_T.device}) > 1:
        raise ValueError(
            f"linear_logprob: got hidden on {hidden_TD.device}, weight on {weight_VD.device}, targets on "
            f"{targets_T.device}; give one device"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"linear_logprob: got temperature {temperature}; it must be finite and above 0")
    _check_targets(targets_T, weight_VD.shape[0])


def _check_targets(targets_T: Tensor, vocabulary: int) -> None:
    message = f"linear_logprob: every target must be in [0, {vocabulary}), the vocabulary of weight"
    if targets_T.device.type == "cuda":
        torch.ops.aten._assert_async.msg(((targets_T >= 0) & (targets_T < vocabulary)).all(), message)
    elif targets_T.device.type == "cpu" and targets_T.numel():
        low, high = (int(bound) for bound in targets_T.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"{message}; got targets from {low} to {high}")
