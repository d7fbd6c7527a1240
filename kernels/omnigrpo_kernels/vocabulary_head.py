"""The vocabulary head in one pass: statistics of every row, and gradients from exponentials that are stored once.

Legend: ``T`` hidden rows of a pass, ``D`` width, ``V`` vocabulary, ``C`` tokens, ``U`` distinct pairs of a row and a
target: a row may predict several tokens, as the last prefix row does the first token of all G completions.

    z_ij = hidden_i . weight_j / temperature        E_ij = 2^(z_ij log2 e - k_i), 0 where j is a target of row i
    total_i = sum_j 2^(z_ij log2 e - k_i)           logprob_u = -log1p((total_i - e_u) / e_u)
    entropy_i = ln total_i - ln2 sum_j p_ij y_ij    lse_i = ln2 k_i + ln total_i

The op ``head_exps`` gives E in the inputs' dtype, k (a whole number), the sums over columns that are no target, and
the targets' own logits, from float32 accumulation; the rest is algebra on vectors, in float64. With c_u, b_i and a_i
the derivatives of a loss with respect to logprob_u, entropy_i and lse_i, and C_i = sum_u c_u - a_i, the derivative
with respect to the product hidden_i . weight_j is

    -p_ij (C_i + b_i (ln p_ij + entropy_i)) / temperature, plus c_u / temperature at the target of u.

Everything but the target's column is a row's scalar times E (times a row's linear function of log2 E where b is not
0), so it goes through ``head_gradients``, two GEMMs on E as stored; the target's column is exact and sparse, and free
of the cancellation in 1 - p. Nothing is recomputed: three GEMMs for a forward and backward pass.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from omnigrpo_kernels import extension, vocabulary_head_cuda, vocabulary_rows_cuda

extension.load()
vocabulary_head_cuda.register()

_LN2 = math.log(2.0)
_LOG2E = 1.0 / _LN2


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPairs:
    """Which row predicts which tokens."""

    rows_U: Tensor
    """int64 ``[U]``, ascending; every row has a pair."""
    targets_U: Tensor
    """int64 ``[U]``: the vocabulary's index; a row's targets differ."""
    starts: Tensor
    """int64 ``[T + 1]``: where the pairs of each row begin."""
    is_single: bool
    """Whether every row has exactly one pair."""
    pair_C: Tensor | None
    """int64 ``[C]``: pair of each token; None where tokens, pairs and rows are the same."""
    order_C: Tensor | None
    """int64 ``[C]``: tokens by pair; None together with ``pair_C``."""
    token_starts: Tensor | None
    """int64 ``[U + 1]``: where the tokens of each pair begin in ``order_C``."""

    def of_tokens(self, values_U: Tensor) -> Tensor:
        """Each token's share of a pair's value, ``[C]``."""
        return values_U if self.pair_C is None else values_U[self.pair_C]

    def rows_of_tokens(self, values_T: Tensor) -> Tensor:
        """Each token's share of a row's value, ``[C]``."""
        return values_T if self.pair_C is None else values_T[self.rows_U[self.pair_C]]

    def sum_by_pair(self, values_C: Tensor) -> Tensor:
        """Sum over the tokens of each pair, ``[U]``."""
        if self.order_C is None or self.token_starts is None:
            return values_C
        return _segment_sums(values_C[self.order_C], self.token_starts)

    def sum_by_row(self, values_U: Tensor) -> Tensor:
        """Sum over the pairs of each row, ``[T]``."""
        return values_U if self.is_single else _segment_sums(values_U, self.starts)


def token_pairs(targets_C: Tensor, rows_C: Tensor | None) -> TokenPairs:
    """Pairs of tokens and the rows that predict them; without ``rows_C``, token i is predicted by row i.

    Rows must be 0, 1, ... without a gap. With ``rows_C`` the sizes depend on the values: index tensors on the CPU
    keep that from waiting for a GPU.
    """
    if rows_C is None:
        starts = torch.arange(len(targets_C) + 1, device=targets_C.device)
        return TokenPairs(
            rows_U=starts[:-1],
            targets_U=targets_C,
            starts=starts,
            is_single=True,
            pair_C=None,
            order_C=None,
            token_starts=None,
        )
    stride = targets_C.max() + 1 if len(targets_C) else 1
    keys_U, pair_C, tokens_U = torch.unique(
        rows_C * stride + targets_C, return_inverse=True, return_counts=True
    )
    rows_U = keys_U // stride
    pairs_T = torch.bincount(rows_U)
    return TokenPairs(
        rows_U=rows_U,
        targets_U=keys_U % stride,
        starts=_ends(pairs_T),
        is_single=len(pairs_T) == len(rows_U),
        pair_C=pair_C,
        order_C=pair_C.argsort(stable=True),
        token_starts=_ends(tokens_U),
    )


def _ends(lengths: Tensor) -> Tensor:
    """0 and the running sums."""
    return functional.pad(lengths.cumsum(0), (1, 0))


def pairs_to(pairs: TokenPairs, device: torch.device) -> TokenPairs:
    """The same on another device."""

    def move(index: Tensor) -> Tensor:
        return index.to(device, non_blocking=True)

    return TokenPairs(
        rows_U=move(pairs.rows_U),
        targets_U=move(pairs.targets_U),
        starts=move(pairs.starts),
        is_single=pairs.is_single,
        pair_C=None if pairs.pair_C is None else move(pairs.pair_C),
        order_C=None if pairs.order_C is None else move(pairs.order_C),
        token_starts=None if pairs.token_starts is None else move(pairs.token_starts),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadPass:
    """Statistics of one pass over the vocabulary, float64, natural logarithms."""

    exps: Tensor
    """E in the inputs' dtype and a layout of the device's own; empty where it was not kept."""
    logprob_U: Tensor
    """``[U]``: log-prob of the pair's target."""
    entropy_T: Tensor
    """``[T]``: entropy over the vocabulary."""
    lse_T: Tensor
    """``[T]``: logsumexp of the logits divided by the temperature."""
    total_T: Tensor
    """``[T]``: sum over the vocabulary of 2^(z log2 e - k)."""


def head_pass(
    hidden_TD: Tensor, weight_VD: Tensor, pairs: TokenPairs, temperature: float, *, keep: bool
) -> HeadPass:
    """One pass: a GEMM whose results become statistics and, with ``keep``, the exponentials of ``HeadPass.exps``."""
    exps, offset_T, others_T, weighted_T, logit_U = torch.ops.omnigrpo.head_exps(
        hidden_TD, weight_VD, pairs.rows_U, pairs.targets_U, temperature, keep
    )
    if hidden_TD.is_cuda:
        logprob_U, entropy_T, lse_T, total_T = vocabulary_rows_cuda.row_statistics(
            offset_T, others_T, weighted_T, logit_U, pairs.starts
        )
        return HeadPass(exps=exps, logprob_U=logprob_U, entropy_T=entropy_T, lse_T=lse_T, total_T=total_T)
    offset_T, others_T, weighted_T = offset_T.double(), others_T.double(), weighted_T.double()
    y_U = logit_U.double() * _LOG2E - offset_T[pairs.rows_U]
    e_U = torch.exp2(y_U)
    targets_T = pairs.sum_by_row(e_U)
    total_T = others_T + targets_T
    ln_total_T = total_T.log()
    others_U = others_T[pairs.rows_U] + (targets_T[pairs.rows_U] - e_U)
    return HeadPass(
        exps=exps,
        logprob_U=torch.where(  # The first form holds where e_U is 0, the second keeps 1 - p where p rounds to 1.
            e_U < others_U, _LN2 * y_U - ln_total_T[pairs.rows_U], -torch.log1p(others_U / e_U)
        ),
        entropy_T=ln_total_T - _LN2 * (weighted_T + pairs.sum_by_row(e_U * y_U)) / total_T,
        lse_T=_LN2 * offset_T + ln_total_T,
        total_T=total_T,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StatisticGrads:
    """Derivatives of a loss with respect to a pass's statistics, float64."""

    logprob_U: Tensor
    """``[U]``"""
    entropy_T: Tensor | None = None
    """``[T]``; None where the entropy is no part of the loss."""
    lse_T: Tensor | None = None
    """``[T]``; None where the logsumexp is no part of the loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowGrads:
    """What the derivative with respect to the logits is made of, row by row."""

    scale_T: Tensor
    """``[T]``: times E, outside the targets' columns; 0 leaves the row out."""
    alpha_T: Tensor | None
    """``[T]``: E is first multiplied with ``alpha + beta log2 E``; None leaves it."""
    beta_T: Tensor | None
    """``[T]``"""
    target_U: Tensor
    """``[U]``: the derivative at the target's column, whole."""
    live: Tensor
    """Integers that add up to the number of rows whose scale is not 0."""


def row_grads(passed: HeadPass, pairs: TokenPairs, grads: StatisticGrads, temperature: float) -> RowGrads:
    """The derivative with respect to the products hidden . weight, as the module's formula splits it."""
    if passed.total_T.is_cuda:
        scale_T, alpha_T, beta_T, target_U, live = vocabulary_rows_cuda.row_gradients(
            passed.logprob_U,
            passed.entropy_T,
            passed.total_T,
            pairs.starts,
            grads.logprob_U,
            grads.entropy_T,
            grads.lse_T,
            temperature,
            stat_dtype_of(passed.exps.dtype),
        )
        return RowGrads(scale_T=scale_T, alpha_T=alpha_T, beta_T=beta_T, target_U=target_U, live=live)
    mass_T = pairs.sum_by_row(grads.logprob_U)
    if grads.lse_T is not None:
        mass_T = mass_T - grads.lse_T
    mass_U = mass_T[pairs.rows_U]
    target_U = grads.logprob_U - mass_U - mass_U * torch.expm1(passed.logprob_U)
    inverse_T = -1.0 / (temperature * passed.total_T)
    if grads.entropy_T is None:
        scale_T = mass_T * inverse_T
        return RowGrads(
            scale_T=scale_T,
            alpha_T=None,
            beta_T=None,
            target_U=target_U / temperature,
            live=scale_T.count_nonzero(),
        )
    entropy_U, b_U = passed.entropy_T[pairs.rows_U], grads.entropy_T[pairs.rows_U]
    p_U, lnp_U = (
        passed.logprob_U.exp(),
        passed.logprob_U.clamp_min(-1e4),
    )  # 0 * infinity at an impossible target
    alpha_T = mass_T + grads.entropy_T * (passed.entropy_T - passed.total_T.log())
    unused_T = (alpha_T == 0) & (grads.entropy_T == 0)
    scale_T = torch.where(unused_T, 0.0, inverse_T)
    return RowGrads(
        scale_T=scale_T,
        alpha_T=alpha_T,
        beta_T=_LN2 * grads.entropy_T,
        target_U=(target_U - b_U * p_U * (lnp_U + entropy_U)) / temperature,
        live=scale_T.count_nonzero(),
    )


def head_backward(
    passed: HeadPass,
    hidden_TD: Tensor,
    weight_VD: Tensor,
    pairs: TokenPairs,
    rows: RowGrads,
    *,
    grad_weight_VD: Tensor | None,
    accumulate: bool,
    want_hidden: bool,
) -> tuple[Tensor | None, int]:
    """Gradients of hidden and weight; consumes ``passed.exps``.

    Rows with scale 0 are dropped before the GEMMs, which waits for the device once to learn how many are left. The
    last ones fill their places, so that little moves where few are dropped.

    Args:
        passed: the pass, with its exponentials.
        hidden_TD: as given to the pass.
        weight_VD: as given to the pass.
        pairs: as given to the pass.
        rows: from ``row_grads``.
        grad_weight_VD: float32 (float64), overwritten, or added to with ``accumulate``; None does no work for it.
        accumulate: whether ``grad_weight_VD`` already holds a gradient.
        want_hidden: whether to compute the hidden states' gradient.

    Returns:
        The hidden states' gradient ``[T, D]``, float32 (float64), or None; and the number of rows left out.
    """
    stat_dtype = stat_dtype_of(hidden_TD.dtype)
    num_rows = len(hidden_TD)
    dropped = num_rows - sum(rows.live.flatten().tolist())
    whole = dropped == 0
    live_T = torch.arange(num_rows, device=hidden_TD.device) if whole else _filling_holes(rows.scale_T != 0)

    def at_live(values_T: Tensor | None) -> Tensor | None:
        return None if values_T is None else (values_T if whole else values_T[live_T]).to(stat_dtype)

    grad_live = hidden_TD.new_zeros(0, hidden_TD.shape[1], dtype=stat_dtype)
    if len(live_T):
        grad_live = torch.ops.omnigrpo.head_gradients(
            passed.exps,
            hidden_TD if whole else hidden_TD[live_T],
            weight_VD,
            live_T,
            at_live(rows.scale_T),
            at_live(rows.alpha_T),
            at_live(rows.beta_T),
            grad_weight_VD,
            accumulate,
            want_hidden,
        )
    elif grad_weight_VD is not None and not accumulate:
        grad_weight_VD.zero_()
    target_U = rows.target_U.to(stat_dtype)
    if grad_weight_VD is not None:
        _add_target_rows_(grad_weight_VD, hidden_TD, target_U, pairs)
    if not want_hidden:
        return None, dropped
    grad_TD = grad_live
    if not whole:
        grad_TD = grad_live.new_zeros(hidden_TD.shape).index_copy_(0, live_T, grad_live)
    _add_target_columns_(grad_TD, weight_VD, target_U, pairs)
    return grad_TD, dropped


def _add_target_rows_(grad_VD: Tensor, hidden_TD: Tensor, target_U: Tensor, pairs: TokenPairs) -> None:
    """The targets' share of the weight's gradient."""
    if grad_VD.is_cuda:
        vocabulary_rows_cuda.add_target_rows_(grad_VD, hidden_TD, target_U, pairs.rows_U, pairs.targets_U)
    else:
        grad_VD.index_add_(0, pairs.targets_U, target_U[:, None] * hidden_TD[pairs.rows_U])


def _add_target_columns_(grad_TD: Tensor, weight_VD: Tensor, target_U: Tensor, pairs: TokenPairs) -> None:
    """The targets' share of the hidden states' gradient."""
    if grad_TD.is_cuda:
        vocabulary_rows_cuda.add_target_columns_(grad_TD, weight_VD, target_U, pairs.starts, pairs.targets_U)
    else:
        grad_TD.index_add_(0, pairs.rows_U, target_U[:, None] * weight_VD[pairs.targets_U])


def _filling_holes(live_T: Tensor) -> Tensor:
    """Indices of the live rows, those beyond their number in the place of rows that are not live."""
    order_L = live_T.nonzero().squeeze(1)
    rows_L = torch.arange(len(order_L), device=live_T.device)
    if len(order_L) == len(live_T):
        return rows_L
    holes = (~live_T[: len(order_L)]).nonzero().squeeze(1)
    rows_L[holes] = order_L[len(order_L) - len(holes) :]
    return rows_L


def stat_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Of statistics and of sums over rows: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_head_inputs(
    op: str,
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    rows_C: Tensor | None,
    temperature: float,
) -> None:
    """Raise ValueError, in the name of ``op``, for what has no right answer.

    On a GPU hidden states that are not finite pass through to the results, so that no check waits for the device, and
    ranges are left to `assert_ranges`.
    """
    shapes = (
        f"hidden {tuple(hidden_RD.shape)}, weight {tuple(weight_VD.shape)}, targets {tuple(targets_C.shape)}"
    )
    if (hidden_RD.dim(), weight_VD.dim(), targets_C.dim()) != (2, 2, 1) or 0 in weight_VD.shape:
        raise ValueError(f"{op}: got {shapes}; give hidden [T, D], weight [V, D] and targets [T]")
    if hidden_RD.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"{op}: got {shapes}; D of hidden and weight differ")
    if rows_C is None and hidden_RD.shape[0] != targets_C.shape[0]:
        raise ValueError(
            f"{op}: got {shapes}; T of hidden and targets differ: give one target a row, or rows_C"
        )
    if hidden_RD.dtype != weight_VD.dtype or not hidden_RD.dtype.is_floating_point:
        raise ValueError(
            f"{op}: got hidden {hidden_RD.dtype}, weight {weight_VD.dtype}; give one float dtype"
        )
    if hidden_RD.dtype == torch.float16:
        raise ValueError(
            f"{op}: got float16, whose range cannot hold exponentials; give bfloat16, float32 or float64"
        )
    if targets_C.dtype != torch.int64:
        raise ValueError(f"{op}: got targets {targets_C.dtype}; give int64")
    if hidden_RD.device != weight_VD.device:
        raise ValueError(
            f"{op}: got hidden on {hidden_RD.device}, weight on {weight_VD.device}; give one device"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{op}: got temperature {temperature}; it must be finite and above 0")
    if hidden_RD.device.type == "cpu" and not bool(hidden_RD.isfinite().all()):
        bad = int((~hidden_RD.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(
            f"{op}: hidden has NaN or infinity, first in row {bad}; look at the model's forward pass"
        )
    if rows_C is not None:
        _check_rows(op, rows_C, targets_C)
    for name, index_C, size, what in _ranges(hidden_RD, weight_VD, targets_C, rows_C):
        if index_C.device.type == "cpu" and index_C.numel():
            low, high = (int(bound) for bound in index_C.aminmax())
            if low < 0 or high >= size:
                raise ValueError(
                    f"{op}: every {name} must be in [0, {size}), {what}; got {name}s from {low} to {high}"
                )


def assert_ranges(
    op: str, hidden_RD: Tensor, weight_VD: Tensor, targets_C: Tensor, rows_C: Tensor | None
) -> None:
    """On CUDA, device-side assertions about the indices; to be called last, so that the device begins with the work."""
    for name, index_C, size, what in _ranges(hidden_RD, weight_VD, targets_C, rows_C):
        if index_C.is_cuda:
            inside = ((index_C >= 0) & (index_C < size)).all()
            torch.ops.aten._assert_async.msg(inside, f"{op}: every {name} must be in [0, {size}), {what}")


def _ranges(
    hidden_RD: Tensor, weight_VD: Tensor, targets_C: Tensor, rows_C: Tensor | None
) -> list[tuple[str, Tensor, int, str]]:
    """Name, values, bound and whose bound it is, of every index."""
    ranges = [("target", targets_C, len(weight_VD), "the vocabulary of weight")]
    if rows_C is not None:
        ranges.append(("row", rows_C, len(hidden_RD), "the rows of hidden"))
    return ranges


def _check_rows(op: str, rows_C: Tensor, targets_C: Tensor) -> None:
    if rows_C.shape != targets_C.shape or rows_C.dtype != torch.int64 or rows_C.device != targets_C.device:
        raise ValueError(
            f"{op}: got rows {rows_C.dtype} {tuple(rows_C.shape)} on {rows_C.device} for targets "
            f"{tuple(targets_C.shape)} on {targets_C.device}; give int64, one a target, on one device"
        )


def _segment_sums(values: Tensor, starts: Tensor) -> Tensor:
    """Sums of neighbours; ``unsafe`` leaves out a check of the offsets that would wait for the device."""
    return torch.segment_reduce(values, "sum", offsets=starts, unsafe=True)


@torch.library.register_fake("omnigrpo::head_exps")
def _head_exps_fake(
    hidden: Tensor, weight: Tensor, pair_rows: Tensor, pair_targets: Tensor, temperature: float, store: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], stat_dtype_of(hidden.dtype)
    per_row = [hidden.new_empty(rows, dtype=dtype) for _ in range(3)]
    if hidden.device.type == "cuda":
        exps = vocabulary_head_cuda.new_exps(hidden, weight.shape[0] if store else 0)
    else:  # In whole panels: csrc/head.h.
        exps = hidden.new_empty(-(-rows // 32) * 32, -(-weight.shape[0] // 2) * 2 if store else 0)
    return exps, per_row[0], per_row[1], per_row[2], hidden.new_empty(len(pair_rows), dtype=dtype)


@torch.library.register_fake("omnigrpo::head_gradients")
def _head_gradients_fake(
    exps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    live: Tensor,
    row_scale: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    grad_weight: Tensor | None,
    accumulate: bool,
    want_hidden: bool,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0] if want_hidden else 0, hidden.shape[1], dtype=row_scale.dtype)
