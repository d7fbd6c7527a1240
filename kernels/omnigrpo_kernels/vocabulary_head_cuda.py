"""The low-level ops of the vocabulary head on CUDA: a Triton product that emits exponentials, and cuBLAS.

Legend: ``T`` rows of a chunk, ``D`` width, ``V`` vocabulary, ``U`` pairs of a row and one of its targets, ``L`` live
rows. With z = hidden weight^T / temperature, a row's offset k and y = z log2(e) - k:

    E = 2^y, 0 at the row's targets        others = sum_j E_j        weighted = sum_j E_j y_j, over the same columns
    dX = row_scale (M W)        dW = M^T (row_scale X)        with M = E, or E (alpha + beta log2 E)

Of the two ways to E, writing float32 logits and reading them twice moves some 17 GB at T = 8192, V = 151,936 and
costs a third of the time of all three products, so E leaves the product's own epilogue. There k must be known before
the row's maximum is. It is the first target's logit: E then overflows only for a target of probability below 2^-60.
Such a row is crowded. One program takes its row of tiles again, first for the maxima and then with k at the maximum.
It is launched for every row of tiles, and looks for crowded rows itself: nothing waits for the device.

Sums are taken inside a tile in a fixed order, over the tiles in float64: neither the rows of the chunk nor the number
of multiprocessors changes a bit of a row's result.
"""

import ctypes
import importlib
import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from omnigrpo_kernels.triton_launch import launch

CROWDED = 2.0**60
"""Rows whose ``others`` reach it get an offset at their maximum: room for the products of E in float32."""

BAND_BYTES = 16 << 20
"""Hidden states that stay in L2 (50 MB on sm_90) while the vocabulary streams past."""

SWEEP_COLUMNS = 4096
"""What a sweep over a row of logits holds in registers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tiling:
    """How a product is cut into tiles; the bits of a row depend on columns and depth alone."""

    rows: int
    columns: int
    depth: int
    """Summed per step of the pipeline."""
    num_warps: int
    num_stages: int
    programs: int
    """Programs per multiprocessor."""


WIDE = Tiling(rows=128, columns=256, depth=64, num_warps=8, num_stages=4, programs=1)
"""bfloat16 on sm_90: one program takes 224 of the 227 KiB of shared memory and all registers, without spills."""
NARROW = Tiling(rows=128, columns=128, depth=32, num_warps=8, num_stages=3, programs=1)
"""bfloat16 elsewhere: at most 99 KiB, which every GPU since sm_80 has."""
FLOAT32 = Tiling(rows=64, columns=64, depth=16, num_warps=4, num_stages=3, programs=2)
"""IEEE products, without tensor cores."""


def register() -> None:
    """Makes these functions the CUDA kernels of ``omnigrpo::head_exps`` and ``head_gradients``, whose schemas exist."""
    torch.library.register_kernel("omnigrpo::head_exps", "cuda", head_exps_cuda)
    torch.library.register_kernel("omnigrpo::head_gradients", "cuda", head_gradients_cuda)


def head_exps_cuda(
    hidden: Tensor, weight: Tensor, pair_rows: Tensor, pair_targets: Tensor, temperature: float, store: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """E, offset, others, weighted and the pairs' logits in nats; never waits for the device.

    Args:
        hidden: ``[T, D]`` bfloat16, float32 or float64.
        weight: ``[V, D]`` of the same dtype.
        pair_rows: int64 ``[U]``, ascending, every row at least once.
        pair_targets: int64 ``[U]``, distinct within a row; the logit of one outside the vocabulary is NaN.
        temperature: divides the logits.
        store: whether E is wanted.

    Returns:
        E ``[T, V]`` in the dtype of ``hidden``, its rows 16-byte aligned, or ``[T, 0]``; offset, others and weighted
        ``[T]`` and the logits ``[U]`` in float32 (float64 for float64). Raises ValueError for what does not fit.
    """
    _check_head(hidden, weight, pair_rows, pair_targets, temperature)
    if hidden.dtype == torch.float64 or 0 in hidden.shape:
        return head_exps_from_logits(hidden, weight, pair_rows, pair_targets, temperature, store)
    with torch.cuda.device_of(hidden):
        head = _tiled_head(hidden, weight, pair_rows, pair_targets, temperature, store)
        head.set_first_offsets()
        head.run_tiles()
        head.merge()
        head.run_crowded_rows()
    exps = hidden.new_empty((len(hidden), 0)) if head.exps_TV is None else head.exps_TV
    return exps, head.offset_T, head.others_T, head.weighted_T, head.pair_logits_U


def head_exps_from_logits(
    hidden: Tensor, weight: Tensor, pair_rows: Tensor, pair_targets: Tensor, temperature: float, store: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same from logits in memory: one cuBLAS product to float32, then two sweeps over each row."""
    _check_head(hidden, weight, pair_rows, pair_targets, temperature)
    scale = math.log2(math.e) / temperature
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        logits_TV = _product(hidden, weight.T)
        at_pairs_U = logits_TV[pair_rows, pair_targets]
        # Assigning the number itself would copy it from the host, and wait.
        logits_TV.index_put_((pair_rows, pair_targets), logits_TV.new_full((), -math.inf))
        offset_T = (at_pairs_U[_pair_starts(pair_rows, len(hidden))[:-1]] * scale).round()
        exps_TV = new_exps(hidden, len(weight)) if store else None
        sweep = _sweep_float64 if hidden.dtype == torch.float64 else _sweep_triton
        others_T, weighted_T = sweep(logits_TV, exps_TV, offset_T, scale)
    exps = hidden.new_empty((len(hidden), 0)) if exps_TV is None else exps_TV
    return exps, offset_T, others_T, weighted_T, at_pairs_U / temperature


def _sweep_triton(
    logits_TV: Tensor, exps_TV: Tensor | None, offset_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    others_T, weighted_T = torch.empty_like(offset_T), torch.empty_like(offset_T)
    num_rows, vocabulary = logits_TV.shape
    if num_rows:
        launch(
            _kernels().sum_rows,
            num_rows,
            logits_TV,
            offset_T,
            others_T,
            weighted_T,
            logits_TV.stride(0),
            vocabulary,
            scale,
            BLOCK=SWEEP_COLUMNS,
            num_warps=8,
        )
    if num_rows and exps_TV is not None:
        launch(
            _kernels().exp_rows,
            num_rows,
            logits_TV,
            exps_TV,
            offset_T,
            logits_TV.stride(0),
            exps_TV.stride(0),
            vocabulary,
            scale,
            BLOCK=SWEEP_COLUMNS,
            num_warps=8,
        )
    return others_T, weighted_T


def _sweep_float64(
    logits_TV: Tensor, exps_TV: Tensor | None, offset_T: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    y_TV = logits_TV.mul_(scale)
    torch.maximum(offset_T, y_TV.amax(dim=1).round(), out=offset_T)
    y_TV -= offset_T[:, None]
    e_TV = y_TV.exp2()
    if exps_TV is not None:
        exps_TV.copy_(e_TV)
    return e_TV.sum(dim=1), (e_TV * y_TV.clamp_min(-1e300)).sum(dim=1)


def head_gradients_cuda(
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
    """Puts M^T (row_scale X) into ``grad_weight`` and returns row_scale (M W); ``exps`` is overwritten.

    The products are cuBLAS's, with float32 results and sums; those of float32 operands follow
    ``torch.backends.cuda.matmul.fp32_precision``, which is IEEE unless it was changed.

    Args:
        exps: ``[T, V]`` from `head_exps_cuda`.
        hidden: ``[L, D]``, the live rows alone, as are the vectors below.
        weight: ``[V, D]``.
        live: int64 ``[L]``: which rows of ``exps`` these are, ``live[i] >= i``.
        row_scale: ``[L]`` float32 (float64 for float64).
        alpha: ``[L]``, or None together with ``beta``: then M = E.
        beta: ``[L]`` or None.
        grad_weight: ``[V, D]`` float32 (float64), overwritten or added to in place; None: no product for it.
        accumulate: whether ``grad_weight`` is added to.
        want_hidden: whether dX is computed.

    Returns:
        dX ``[L, D]`` float32 (float64), or ``[0, D]``. Raises ValueError for what does not fit.
    """
    _check_gradients(exps, hidden, weight, live, row_scale, alpha, beta, grad_weight)
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        matrix_LV = _live_rows_(exps, live, alpha, beta)
        if grad_weight is not None:
            scaled_LD = (hidden * row_scale[:, None]).to(hidden.dtype)
            _product_into_(grad_weight, matrix_LV.T, scaled_LD, accumulate=accumulate)
        if not want_hidden:
            return row_scale.new_empty((0, hidden.shape[1]))
        return _product(matrix_LV, weight).mul_(row_scale[:, None])


def _live_rows_(exps_TV: Tensor, live_L: Tensor, alpha_L: Tensor | None, beta_L: Tensor | None) -> Tensor:
    """The live rows as the first L of ``exps_TV``, in place: a copy of them would be the largest buffer of a step."""
    num_live = len(live_L)
    moves, reweights = num_live < len(exps_TV), alpha_L is not None
    if num_live and (moves or reweights):
        columns = 256
        launch(
            _kernels().gather_rows,
            -(-exps_TV.shape[1] // columns),
            exps_TV,
            live_L,
            live_L if alpha_L is None else alpha_L,
            live_L if beta_L is None else beta_L,
            exps_TV.stride(0),
            num_live,
            exps_TV.shape[1],
            MOVE=moves,
            REWEIGHT=reweights,
            ROWS=16,
            COLUMNS=columns,
            num_warps=4,
        )
    return exps_TV[:num_live]


@dataclass(frozen=True, kw_only=True, slots=True)
class _TiledHead:
    """The buffers that the launches of one forward share."""

    tiling: Tiling
    hidden_TD: Tensor
    """What a tensor descriptor can describe, as `weight_VD`."""
    weight_VD: Tensor
    pair_starts: Tensor
    """int32 [T + 1]: where the pairs of each row begin."""
    pair_targets_U: Tensor
    scale: float
    """log2(e) / temperature, a float32."""
    exps_TV: Tensor | None
    offset_T: Tensor
    pair_logits_U: Tensor
    others_T: Tensor
    weighted_T: Tensor
    partials: Tensor
    """float32 [2, columns of tiles, T]."""

    def set_first_offsets(self) -> None:
        num_rows, width = self.hidden_TD.shape
        launch(
            _kernels().target_offsets,
            num_rows,
            self.hidden_TD,
            self.weight_VD,
            self.pair_starts,
            self.pair_targets_U,
            self.offset_T,
            width,
            self.weight_VD.shape[0],
            len(self.pair_targets_U),
            self.scale,
            BLOCK=1024,
        )

    def run_tiles(self) -> None:
        """E and its sums of all rows, whose offsets are known."""
        kernels, tiling = _kernels(), self.tiling
        num_rows, width = self.hidden_TD.shape
        exps_TV = self.hidden_TD if self.exps_TV is None else self.exps_TV
        launch(
            kernels.exp_tiles,
            tiling.programs * _num_multiprocessors(self.hidden_TD),
            kernels.describe(self.hidden_TD, [tiling.rows, tiling.depth]),
            kernels.describe(self.weight_VD, [tiling.columns, tiling.depth]),
            kernels.describe(exps_TV, [tiling.rows, tiling.columns // 2]),
            self.offset_T,
            self.pair_starts,
            self.pair_targets_U,
            self.pair_logits_U,
            self.partials,
            num_rows,
            self.weight_VD.shape[0],
            width,
            -(-num_rows // tiling.rows),
            self.partials.shape[1],
            max(1, BAND_BYTES // (tiling.rows * width * self.hidden_TD.element_size())),
            *self._scales(),
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            DEPTH=tiling.depth,
            STORE=self.exps_TV is not None,
            UPCAST=kernels.INTERPRETED,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            enable_fp_fusion=True,  # log2 E is rounded once
        )

    def merge(self) -> None:
        """The rows' sums."""
        num_rows = len(self.offset_T)
        launch(
            _kernels().merge_partials,
            -(-num_rows // 16),
            self.partials,
            self.others_T,
            self.weighted_T,
            num_rows,
            self.partials.shape[1],
            ROWS=16,
            TILES=64,
        )

    def run_crowded_rows(self) -> None:
        """Rows whose sum is not below `CROWDED`, with another offset."""
        kernels, tiling = _kernels(), self.tiling
        num_rows, width = self.hidden_TD.shape
        exps_TV = self.hidden_TD if self.exps_TV is None else self.exps_TV
        launch(
            kernels.crowded_rows,
            -(-num_rows // tiling.rows),
            kernels.describe(self.hidden_TD, [tiling.rows, tiling.depth]),
            kernels.describe(self.weight_VD, [tiling.columns, tiling.depth]),
            exps_TV,
            self.offset_T,
            self.pair_starts,
            self.pair_targets_U,
            self.pair_logits_U,
            self.others_T,
            self.weighted_T,
            num_rows,
            self.weight_VD.shape[0],
            width,
            self.partials.shape[1],
            exps_TV.stride(0),
            *self._scales(),
            CROWDED,
            ROWS=tiling.rows,
            COLUMNS=tiling.columns,
            DEPTH=tiling.depth,
            STORE=self.exps_TV is not None,
            UPCAST=kernels.INTERPRETED,
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
            enable_fp_fusion=True,
        )

    def _scales(self) -> tuple[float, float, float, float]:
        """From a product to log2 E and, as a sum of two floats, to nats; and a product of which exp2 leaves nothing."""
        to_nats = self.scale * math.log(2)
        return self.scale, _float32(to_nats), to_nats - _float32(to_nats), -1e30 / self.scale


def _tiled_head(
    hidden: Tensor, weight: Tensor, pair_rows: Tensor, pair_targets: Tensor, temperature: float, store: bool
) -> _TiledHead:
    tiling, num_rows = _tiling(hidden), len(hidden)
    offset_T, others_T, weighted_T = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    return _TiledHead(
        tiling=tiling,
        hidden_TD=_aligned(hidden),
        weight_VD=_aligned(weight),
        pair_starts=_pair_starts(pair_rows, num_rows),
        pair_targets_U=pair_targets.contiguous(),
        scale=_float32(math.log2(math.e) / temperature),
        exps_TV=new_exps(hidden, len(weight)) if store else None,
        offset_T=offset_T,
        pair_logits_U=hidden.new_full(pair_rows.shape, math.nan, dtype=torch.float32),
        others_T=others_T,
        weighted_T=weighted_T,
        partials=hidden.new_empty((2, -(-len(weight) // tiling.columns), num_rows), dtype=torch.float32),
    )


def _tiling(hidden: Tensor) -> Tiling:
    if hidden.dtype == torch.float32:
        return FLOAT32
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device)[0] != 9:
        return NARROW
    return WIDE


def _num_multiprocessors(hidden: Tensor) -> int:
    """On the CPU, where the interpreter runs the kernels, any number does."""
    return torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 2


def _pair_starts(pair_rows_U: Tensor, num_rows: int) -> Tensor:
    """int32 [T + 1]: the first pair of each row, and their number."""
    rows = torch.arange(num_rows + 1, device=pair_rows_U.device)
    return torch.searchsorted(pair_rows_U, rows, out_int32=True)


def new_exps(hidden: Tensor, vocabulary: int) -> Tensor:
    """``[T, V]``, its rows 16 bytes apart as a tensor descriptor needs them."""
    step = 16 // hidden.element_size()
    return hidden.new_empty((len(hidden), -(-vocabulary // step) * step))[:, :vocabulary]


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix itself, or a copy whose rows a tensor descriptor can describe: widened by zeros, 16-byte aligned."""
    missing = -matrix.shape[1] % (16 // matrix.element_size())
    if missing:
        return functional.pad(matrix, (0, missing))
    matrix = matrix.contiguous()
    strided = matrix.stride() != (matrix.shape[1], 1)  # Contiguous all the same where a dimension is 1.
    return (
        matrix.clone(memory_format=torch.contiguous_format) if strided or matrix.data_ptr() % 16 else matrix
    )


def _float32(value: float) -> float:
    return ctypes.c_float(value).value


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 (float64 for float64)."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _product_into_(total: Tensor, left: Tensor, right: Tensor, *, accumulate: bool) -> None:
    """total = left @ right, or +=, summed in the dtype of ``total`` and without a buffer of its size."""
    if not left.is_cuda or left.dtype == total.dtype:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=int(accumulate))
    elif accumulate:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        torch.mm(left, right, out_dtype=total.dtype, out=total)


@cache
def _kernels() -> ModuleType:
    """The kernels, and triton with them, at the first use: the package imports without triton."""
    try:
        return importlib.import_module("omnigrpo_kernels.vocabulary_head_triton")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise ImportError(
            "the vocabulary head on CUDA needs triton >= 3.6, which is not installed: "
            "pip install 'triton>=3.6' (CUDA builds of torch for Linux bring it along)",
            name="triton",
        ) from error


def _check_head(
    hidden: Tensor, weight: Tensor, pair_rows: Tensor, pair_targets: Tensor, temperature: float
) -> None:
    shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or len(weight) == 0:
        raise ValueError(f"head_exps: got {shapes}; give hidden [T, D] and weight [V, D] with V at least 1")
    _check_dtype("head_exps", hidden, weight)
    pairs = f"pair_rows {pair_rows.dtype} {tuple(pair_rows.shape)}, pair_targets {pair_targets.dtype} "
    pairs += f"{tuple(pair_targets.shape)}"
    if pair_rows.dim() != 1 or pair_rows.shape != pair_targets.shape or len(pair_rows) < len(hidden):
        raise ValueError(f"head_exps: got {pairs} for {shapes}; give both [U], and each row at least once")
    if pair_rows.dtype != torch.int64 or pair_targets.dtype != torch.int64:
        raise ValueError(f"head_exps: got {pairs}; give int64")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"head_exps: got temperature {temperature}; it must be finite and above 0")


def _check_dtype(op: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dtype == torch.float16:
        raise ValueError(
            f"{op}: got float16, whose exponents cannot hold the exponentials; give bfloat16 or float32"
        )
    if hidden.dtype not in (torch.bfloat16, torch.float32, torch.float64) or weight.dtype != hidden.dtype:
        raise ValueError(
            f"{op}: got hidden {hidden.dtype}, weight {weight.dtype}; give one of bfloat16, float32 and float64"
        )


def _check_gradients(
    exps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    live: Tensor,
    row_scale: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    _check_dtype("head_gradients", hidden, weight)
    stat_dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    num_live = len(live)
    if exps.dtype != hidden.dtype or exps.dim() != 2 or exps.shape[1] != len(weight) or exps.stride(1) != 1:
        raise ValueError(
            f"head_gradients: got exps {exps.dtype} {tuple(exps.shape)} for weight {tuple(weight.shape)} of "
            f"{weight.dtype}; give the exponentials of head_exps, stored"
        )
    if hidden.shape != (num_live, weight.shape[1]) or num_live > len(exps) or live.dtype != torch.int64:
        raise ValueError(
            f"head_gradients: got hidden {tuple(hidden.shape)} and {num_live} live rows ({live.dtype}) of "
            f"{len(exps)}; give the live rows of hidden and their int64 indices"
        )
    if (alpha is None) != (beta is None):
        raise ValueError("head_gradients: got one of alpha and beta; give both or neither")
    vectors = {"row_scale": row_scale, "alpha": alpha, "beta": beta}
    for name, vector in vectors.items():
        if vector is not None and (vector.shape != (num_live,) or vector.dtype != stat_dtype):
            raise ValueError(
                f"head_gradients: got {name} {vector.dtype} {tuple(vector.shape)}; give {stat_dtype} [{num_live}]"
            )
    if grad_weight is not None and (grad_weight.shape != weight.shape or grad_weight.dtype != stat_dtype):
        raise ValueError(
            f"head_gradients: got grad_weight {grad_weight.dtype} {tuple(grad_weight.shape)}; give {stat_dtype} "
            f"{tuple(weight.shape)}"
        )
