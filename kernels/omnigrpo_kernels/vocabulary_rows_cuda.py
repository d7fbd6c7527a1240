"""What surrounds the products of the vocabulary head on CUDA: a launch each, where vector algebra would take dozens.

The head of an update is a few milliseconds of products in a few chunks; at 10 us of host time a launch, the float64
algebra of its rows took longer to launch than the products to run. Legend: ``T`` rows, ``D`` width, ``V`` vocabulary,
``U`` pairs of a row and one of its targets.
"""

import ctypes
import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from omnigrpo_kernels.triton_launch import launch

ROWS = 64
"""Of a program that works on vectors."""
COLUMNS = 1024
"""Of a program that works on a row of a matrix, at a time."""


def row_statistics(
    offset_T: Tensor, others_T: Tensor, weighted_T: Tensor, pair_logits_U: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs ``[U]``, entropies, log-sum-exps and sums of exponentials ``[T]``, float64, in nats.

    Args:
        offset_T: ``[T]``, as others and weighted from ``head_exps``, as is:
        others_T: ``[T]``.
        weighted_T: ``[T]``.
        pair_logits_U: ``[U]``.
        starts: int64 ``[T + 1]``: where the pairs of each row begin.
    """
    num_rows, float64 = len(offset_T), torch.float64
    logprob_U = torch.empty_like(pair_logits_U, dtype=float64)
    entropy_T, lse_T, total_T = torch.empty((3, num_rows), dtype=float64, device=offset_T.device).unbind()
    if num_rows:
        with torch.cuda.device_of(offset_T):
            launch(
                _kernels().row_statistics,
                -(-num_rows // ROWS),
                offset_T,
                others_T,
                weighted_T,
                pair_logits_U,
                starts,
                logprob_U,
                entropy_T,
                lse_T,
                total_T,
                num_rows,
                ROWS=ROWS,
                num_warps=2,
            )
    return logprob_U, entropy_T, lse_T, total_T


def row_gradients(
    logprob_U: Tensor,
    entropy_T: Tensor,
    total_T: Tensor,
    starts: Tensor,
    logprob_grad_U: Tensor,
    entropy_grad_T: Tensor | None,
    lse_grad_T: Tensor | None,
    temperature: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Scale, alpha, beta ``[T]`` and target ``[U]`` of ``RowGrads`` in ``dtype``, and counts of live rows.

    Args:
        logprob_U: float64 ``[U]``, as entropy and total from `row_statistics`.
        entropy_T: float64 ``[T]``.
        total_T: float64 ``[T]``.
        starts: int64 ``[T + 1]``.
        logprob_grad_U: float64 ``[U]``: derivatives of the loss.
        entropy_grad_T: float64 ``[T]`` or None; without it alpha and beta are None.
        lse_grad_T: float64 ``[T]`` or None.
        temperature: what the logits were divided by.
        dtype: float32 or float64.

    Returns:
        scale, alpha, beta, target and int32 counts that add up to the number of rows whose scale is not 0.
    """
    num_rows, device = len(total_T), total_T.device
    programs = -(-num_rows // ROWS)
    scale_T = torch.empty(num_rows, dtype=dtype, device=device)
    alpha_T, beta_T = (None if entropy_grad_T is None else torch.empty_like(scale_T) for _ in range(2))
    target_U = torch.empty_like(logprob_U, dtype=dtype)
    live = torch.empty(programs, dtype=torch.int32, device=device)
    inverse = ctypes.c_float(1.0 / temperature).value
    if num_rows:
        with torch.cuda.device_of(total_T):
            launch(
                _kernels().row_gradients,
                programs,
                logprob_U,
                entropy_T,
                total_T,
                starts,
                logprob_grad_U.contiguous(),
                total_T if entropy_grad_T is None else entropy_grad_T.contiguous(),
                total_T if lse_grad_T is None else lse_grad_T.contiguous(),
                scale_T,
                scale_T if alpha_T is None else alpha_T,
                scale_T if beta_T is None else beta_T,
                target_U,
                live,
                num_rows,
                inverse,
                1.0 / temperature - inverse,
                ENTROPY=entropy_grad_T is not None,
                LSE=lse_grad_T is not None,
                ROWS=ROWS,
                num_warps=2,
            )
    return scale_T, alpha_T, beta_T, target_U, live


def add_target_columns_(
    grad_TD: Tensor, weight_VD: Tensor, coefficients_U: Tensor, starts: Tensor, targets_U: Tensor
) -> None:
    """``grad[i] += coefficients[u] weight[targets[u]]`` for the pairs u of each row i, in place.

    Args:
        grad_TD: ``[T, D]``, contiguous, float32 or float64, as are the coefficients.
        weight_VD: ``[V, D]``, contiguous.
        coefficients_U: ``[U]``.
        starts: int64 ``[T + 1]``.
        targets_U: int64 ``[U]``; pairs whose target is outside the vocabulary have no right gradient.
    """
    num_rows, width = grad_TD.shape
    if num_rows:
        with torch.cuda.device_of(grad_TD):
            launch(
                _kernels().add_target_columns,
                num_rows,
                grad_TD,
                weight_VD,
                coefficients_U,
                starts,
                targets_U,
                width,
                len(weight_VD),
                BLOCK=COLUMNS,
            )


def add_target_rows_(
    grad_VD: Tensor, hidden_TD: Tensor, coefficients_U: Tensor, rows_U: Tensor, targets_U: Tensor
) -> None:
    """``grad[targets[u]] += coefficients[u] hidden[rows[u]]``, in place and in an order that never changes.

    Args:
        grad_VD: ``[V, D]``, contiguous, float32 or float64, as are the coefficients.
        hidden_TD: ``[T, D]``, contiguous.
        coefficients_U: ``[U]``.
        rows_U: int64 ``[U]``.
        targets_U: int64 ``[U]``; pairs whose target is outside the vocabulary are left out.
    """
    width = grad_VD.shape[1]
    if len(targets_U):
        sorted_targets, order = targets_U.sort(stable=True)
        with torch.cuda.device_of(grad_VD):
            launch(
                _kernels().add_target_rows,
                len(targets_U),
                grad_VD,
                hidden_TD,
                coefficients_U,
                rows_U,
                sorted_targets,
                order,
                len(targets_U),
                width,
                len(grad_VD),
                BLOCK=COLUMNS,
            )


def scale_in_place_(values: Tensor, factor: Tensor) -> None:
    """``values *= factor`` of a contiguous tensor, for a scalar on its device; a factor of 1 costs a launch alone."""
    with torch.cuda.device_of(values):
        programs = (
            8 * torch.cuda.get_device_properties(values.device).multi_processor_count if values.is_cuda else 2
        )
        launch(
            _kernels().scale_in_place,
            programs,
            values,
            factor.to(values.dtype),
            values.numel(),
            BLOCK=8192,
            num_warps=8,
        )


@cache
def _kernels() -> ModuleType:
    """The kernels, and triton with them, at the first use."""
    return importlib.import_module("omnigrpo_kernels.vocabulary_rows_triton")
