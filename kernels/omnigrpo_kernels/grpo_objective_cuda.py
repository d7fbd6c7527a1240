"""The objective's terms on CUDA: one launch, where the formulae of `grpo_objective` are some ninety."""

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnigrpo_kernels.triton_launch import launch

TOKENS = 128
"""Of a program."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Switches:
    """What the kernel is compiled for, and its numbers."""

    loss: str
    """``sapo``, ``cispo``, or ``clip`` for the rest."""
    kl: str
    """An estimator; without reference log-probs ``none``."""
    importance: str
    """A correction; without rollout log-probs or a bound ``none``."""
    low: float
    high: float
    """Bounds of the ratio."""
    dual: float
    """Infinite for none."""
    positive_temperature: float
    negative_temperature: float
    """SAPO's."""
    kl_coefficient: float
    entropy_coefficient: float
    smallest_importance: float
    largest_importance: float
    log_bound: float
    """Of log-ratios."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Per-token results, ``[C]`` float32, all but the loss without a gradient."""

    loss_C: Tensor
    kl_C: Tensor | None
    ratio_C: Tensor
    clipped_C: Tensor
    """bool"""
    importance_C: Tensor | None


def objective_terms(
    logprob_C: Tensor,
    entropy_C: Tensor,
    weight_C: Tensor,
    advantage_C: Tensor,
    old_C: Tensor | None,
    reference_C: Tensor | None,
    rollout_C: Tensor | None,
    switches: Switches,
) -> Terms:
    """The loss of every token, differentiable once in ``logprob_C`` and ``entropy_C``, and its parts.

    Args:
        logprob_C: float32 ``[C]``; the other vectors may have any float dtype.
        entropy_C: ``[C]``, read where its coefficient is not 0.
        weight_C: ``[C]``: 0 masks a token.
        advantage_C: ``[C]``.
        old_C: ``[C]``, or None for a ratio of 1 with a gradient.
        reference_C: ``[C]``; None where ``switches.kl`` is ``none``.
        rollout_C: ``[C]``; None where ``switches.importance`` is ``none``.
        switches: see there.
    """
    loss_C, kl_C, ratio_C, clipped_C, importance_C = _Terms.apply(
        logprob_C, entropy_C, weight_C, advantage_C, old_C, reference_C, rollout_C, switches
    )
    return Terms(loss_C=loss_C, kl_C=kl_C, ratio_C=ratio_C, clipped_C=clipped_C, importance_C=importance_C)


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprob_C: Tensor,
        entropy_C: Tensor,
        weight_C: Tensor,
        advantage_C: Tensor,
        old_C: Tensor | None,
        reference_C: Tensor | None,
        rollout_C: Tensor | None,
        switches: Switches,
    ) -> tuple[Tensor | None, ...]:
        num_tokens = len(logprob_C)
        loss_C, slope_C, ratio_C = torch.empty(
            (3, num_tokens), dtype=torch.float32, device=logprob_C.device
        ).unbind()
        entropy_slope_C = torch.empty_like(loss_C) if switches.entropy_coefficient else None
        kl_C = None if switches.kl == "none" else torch.empty_like(loss_C)
        importance_C = None if switches.importance == "none" else torch.empty_like(loss_C)
        clipped_C = torch.empty_like(loss_C, dtype=torch.bool)
        given = (
            weight_C if value_C is None else value_C.contiguous()
            for value_C in (entropy_C, weight_C, advantage_C, old_C, reference_C, rollout_C)
        )
        if num_tokens:
            with torch.cuda.device_of(logprob_C):
                launch(
                    _kernels().objective_terms,
                    -(-num_tokens // TOKENS),
                    logprob_C.contiguous(),
                    *given,
                    loss_C,
                    slope_C,
                    loss_C if entropy_slope_C is None else entropy_slope_C,
                    loss_C if kl_C is None else kl_C,
                    ratio_C,
                    clipped_C,
                    loss_C if importance_C is None else importance_C,
                    num_tokens,
                    switches.low,
                    switches.high,
                    switches.dual,
                    switches.positive_temperature,
                    switches.negative_temperature,
                    switches.kl_coefficient,
                    switches.entropy_coefficient,
                    switches.smallest_importance,
                    switches.largest_importance,
                    switches.log_bound,
                    LOSS=switches.loss,
                    KL=switches.kl,
                    IMPORTANCE=switches.importance,
                    OLD=old_C is not None,
                    ENTROPY=entropy_slope_C is not None,
                    TOKENS=TOKENS,
                    num_warps=4,
                )
        ctx.save_for_backward(slope_C, entropy_slope_C)
        ctx.mark_non_differentiable(*(x for x in (kl_C, ratio_C, clipped_C, importance_C) if x is not None))
        ctx.set_materialize_grads(False)
        return loss_C, kl_C, ratio_C, clipped_C, importance_C

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_C: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        slope_C, entropy_slope_C = ctx.saved_tensors
        if grad_C is None:
            return (None,) * 8
        wants_logprob, wants_entropy, *_rest = ctx.needs_input_grad
        return (
            grad_C * slope_C if wants_logprob else None,
            grad_C * entropy_slope_C if wants_entropy and entropy_slope_C is not None else None,
            *(None,) * 6,
        )


@cache
def _kernels() -> ModuleType:
    """The kernel, and triton with it, at the first use."""
    return importlib.import_module("omnigrpo_kernels.grpo_objective_triton")
