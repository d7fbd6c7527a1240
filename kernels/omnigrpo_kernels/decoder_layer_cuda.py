"""A whole decoder layer on CUDA as one autograd node, for hosts that would launch slower than the GPU computes.

Legend: ``T`` rows of keys and values, ``Q`` rows of the layer (T, or T less the prefix of `LayerCall.prefix`), ``D``
width, ``N`` query heads, ``K`` key/value heads, ``H`` head width, ``F`` feed-forward width, ``M`` outputs of several
projections.

    n = norm(x)    q, k, v = turn(n W + b)    h = x + attention(q, k, v) Wo
    m = norm(h)    g, u = m Wg, m Wu          y = h + (silu(g) u) Wd

q, k and v lie side by side in one buffer, as do gate and up, and so do their gradients: a rotation is one launch in
place, and the weights' gradients of neighbours are one product, handed out as its rows. Kept for the backward are x, h,
q, k, v, the attention's output and log-sum-exp, gate, up and a number a row of each norm. The norms' outputs and
silu(g) u come out again of the kernels that compute their gradients.

That is 12 launches forward and 19 backward, of which 7 and 11 are products, where all weights are trained and some
tile of keys is cut into parts; vectors whose gradients are of half precision add one.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from omnigrpo_kernels.shared_prefix_attention_cuda import AttentionPlan, num_multiprocessors
from omnigrpo_kernels.triton_launch import launch

PROGRAMS_PER_MULTIPROCESSOR = 4
"""Of kernels whose programs each leave a partial sum: enough to hide the latency of a row after another."""
TURNED_ROWS = 2
TURNED_PAIRS = 512
"""Rows, and pairs of columns, that a program of the rotation takes at a time."""
GATED_COLUMNS = 1024
"""Of a row, per program of the gate."""


class LayerParameters(NamedTuple):
    """Weights ``[out, in]`` and biases of one layer, all of one dtype and on one device."""

    attention_norm_D: Tensor
    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    v_weight: Tensor
    v_bias: Tensor | None
    o_weight: Tensor
    mlp_norm_D: Tensor
    gate_weight: Tensor
    up_weight: Tensor
    down_weight: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCall:
    """What a call of the layer is besides its tensors."""

    plan: AttentionPlan
    scale: float
    """Of the scores."""
    attention_norm_eps: float
    mlp_norm_eps: float
    keep_states: bool
    """Whether to return k and v."""


def decoder_layer(
    rows_QD: Tensor,
    cos_Q1F: Tensor,
    sin_Q1F: Tensor,
    parameters: LayerParameters,
    call: LayerCall,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One layer of packed groups; differentiable once, in rows, prefix and parameters.

    Args:
        rows_QD: bfloat16, float16 or float32; at least one row.
        cos_Q1F: float32 ``[Q, 1, H / 2]``.
        sin_Q1F: likewise.
        parameters: of the rows' dtype and device; the three biases are all there or all None.
        call: its plan is of this dtype, device, ``N``, ``K`` and ``H``.
        prefix: rotated k and v ``[P, K, H]`` of the rows before the first; the plan's layout has no ``prefix_queries``.

    Returns:
        rows ``[Q, D]``, and with ``keep_states`` k (rotated) and v of these rows, ``[Q, K, H]``, which are views of
        the buffer that also holds q. Raises ValueError for other rows than the layout's.
    """
    num_rows = len(rows_QD) + (len(prefix[0]) if prefix else 0)
    if (len(rows_QD), num_rows) != (call.plan.num_query_rows, call.plan.num_rows):
        raise ValueError(
            f"decoder_layer: got {len(rows_QD)} rows and {num_rows} with the prefix for a layout of "
            f"{call.plan.num_query_rows} and {call.plan.num_rows}; give one row per token of the layout"
        )
    return _DecoderLayer.apply(rows_QD, cos_Q1F, sin_Q1F, *(prefix or (None, None)), call, *parameters)


class GradDtypes(NamedTuple):
    """Of the parameters' gradients, in their order; None for one that has none."""

    attention_norm_D: torch.dtype | None
    q_weight: torch.dtype | None
    q_bias: torch.dtype | None
    k_weight: torch.dtype | None
    k_bias: torch.dtype | None
    v_weight: torch.dtype | None
    v_bias: torch.dtype | None
    o_weight: torch.dtype | None
    mlp_norm_D: torch.dtype | None
    gate_weight: torch.dtype | None
    up_weight: torch.dtype | None
    down_weight: torch.dtype | None


class _Kept(NamedTuple):
    """Tensors from forward to backward."""

    rows_QD: Tensor
    cos_Q1F: Tensor
    sin_Q1F: Tensor
    qkv_QM: Tensor
    keys_TKH: Tensor | None
    """With a prefix, else k is in qkv."""
    values_TKH: Tensor | None
    o_QNH: Tensor
    lse_NQ: Tensor
    middle_QD: Tensor
    gate_up_QM: Tensor
    attention_scale_Q: Tensor
    mlp_scale_Q: Tensor


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_QD: Tensor,
        cos_Q1F: Tensor,
        sin_Q1F: Tensor,
        prefix_k_PKH: Tensor | None,
        prefix_v_PKH: Tensor | None,
        call: LayerCall,
        *parameters: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        p, plan = LayerParameters(*parameters), call.plan
        rows_QD, cos_Q1F, sin_Q1F = rows_QD.contiguous(), cos_Q1F.contiguous(), sin_Q1F.contiguous()
        with torch.cuda.device_of(rows_QD):
            normal_QD, attention_scale_Q = _norm(rows_QD, p.attention_norm_D, call.attention_norm_eps)
            qkv_QM = _projected(normal_QD, p.q_weight, p.k_weight, p.v_weight)
            _turn_(qkv_QM, p, cos_Q1F, sin_Q1F, plan)
            q_QNH, k_QKH, v_QKH = _heads(qkv_QM, plan)
            keys_TKH = values_TKH = None
            if prefix_k_PKH is not None and prefix_v_PKH is not None:
                keys_TKH = torch.cat([prefix_k_PKH, k_QKH])
                values_TKH = torch.cat([prefix_v_PKH, v_QKH])
            o_QNH, lse_NQ = plan.forward(
                q_QNH,
                k_QKH if keys_TKH is None else keys_TKH,
                v_QKH if values_TKH is None else values_TKH,
                call.scale,
            )
            delta_QD = torch.mm(o_QNH.flatten(1), p.o_weight.t())
            middle_QD, mlp_scale_Q = _add_and_norm(
                rows_QD, delta_QD, normal_QD, p.mlp_norm_D, call.mlp_norm_eps
            )
            gate_up_QM = _projected(normal_QD, p.gate_weight, p.up_weight)
            out_QD = torch.addmm(middle_QD, _gated(gate_up_QM), p.down_weight.t())
        kept = _Kept(
            rows_QD, cos_Q1F, sin_Q1F, qkv_QM, keys_TKH, values_TKH, o_QNH, lse_NQ, middle_QD, gate_up_QM,
            attention_scale_Q, mlp_scale_Q,
        )  # fmt: skip
        ctx.save_for_backward(*kept, *p)
        ctx.call, ctx.grad_dtypes = call, GradDtypes(*(_grad_dtype(parameter) for parameter in p))
        ctx.set_materialize_grads(False)
        return (out_QD, k_QKH, v_QKH) if call.keep_states else (out_QD, None, None)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_QD: Tensor | None, grad_k_QKH: Tensor | None, grad_v_QKH: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # A checkpoint unpacks them once.
        kept, p = _Kept(*saved[:-12]), LayerParameters(*saved[-12:])
        dtypes, call = ctx.grad_dtypes, ctx.call
        grad_QD = torch.zeros_like(kept.rows_QD) if grad_QD is None else grad_QD.contiguous()
        with torch.cuda.device_of(grad_QD):
            sums = _RowSums(kept.rows_QD, kept.qkv_QM.shape[1])
            grad_middle_QD, mlp_grads = _feed_forward_gradient(grad_QD, kept, p, dtypes, sums)
            grad_o_QM = torch.mm(grad_middle_QD, p.o_weight)
            o_grads = _weight_gradients(grad_middle_QD, kept.o_QNH.flatten(1), [dtypes.o_weight])
            grad_qkv_QM, prefix_grads = _attention_gradient(
                grad_o_QM.view(kept.o_QNH.shape), grad_k_QKH, grad_v_QKH, kept, call
            )
            grad_rows_QD, qkv_grads = _projection_gradient(
                grad_qkv_QM, grad_middle_QD, kept, p, dtypes, sums, call.plan
            )
            mlp_norm, attention_norm, *biases = sums.gradients(p, dtypes)
        (q, k, v), (q_bias, k_bias, v_bias), (gate, up, down) = qkv_grads, biases, mlp_grads
        attention = attention_norm, q, q_bias, k, k_bias, v, v_bias, *o_grads
        return grad_rows_QD, None, None, *prefix_grads, None, *attention, mlp_norm, gate, up, down


def _feed_forward_gradient(
    grad_QD: Tensor, kept: _Kept, p: LayerParameters, dtypes: GradDtypes, sums: "_RowSums"
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradients of h, and of gate, up and down."""
    gated_QF = torch.mm(grad_QD, p.down_weight)
    grad_gate_up_QM = _gate_gradient_(gated_QF, kept.gate_up_QM)
    down_grads = _weight_gradients(grad_QD, gated_QF, [dtypes.down_weight])
    grad_normal_QD = _input_gradient(grad_gate_up_QM, p.gate_weight, p.up_weight)
    normal_QD = sums.norm_gradient_(
        grad_normal_QD, kept.middle_QD, kept.mlp_scale_Q, p.mlp_norm_D, grad_QD, first=0
    )
    gate_up_grads = _weight_gradients(grad_gate_up_QM, normal_QD, [dtypes.gate_weight, dtypes.up_weight])
    return grad_normal_QD, [*gate_up_grads, *down_grads]


def _attention_gradient(
    grad_o_QNH: Tensor,
    grad_k_QKH: Tensor | None,
    grad_v_QKH: Tensor | None,
    kept: _Kept,
    call: LayerCall,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Gradients of rotated q, k and v, with what comes of k and v as outputs, and of the prefix's k and v."""
    plan = call.plan
    grad_qkv_QM = torch.empty_like(kept.qkv_QM)
    q_QNH, k_QKH, v_QKH = _heads(kept.qkv_QM, plan)
    dq_QNH, dk_QKH, dv_QKH = _heads(grad_qkv_QM, plan)
    prefix_grads = None, None
    if kept.keys_TKH is None or kept.values_TKH is None:
        given = grad_o_QNH, q_QNH, k_QKH, v_QKH, kept.o_QNH, kept.lse_NQ
        plan.backward(*given, call.scale, dq_QNH, dk_QKH, dv_QKH)
    else:
        given = grad_o_QNH, q_QNH, kept.keys_TKH, kept.values_TKH, kept.o_QNH, kept.lse_NQ
        dk_TKH, dv_TKH = torch.empty_like(kept.keys_TKH), torch.empty_like(kept.values_TKH)
        plan.backward(*given, call.scale, dq_QNH, dk_TKH, dv_TKH)
        prefix = len(dk_TKH) - len(dk_QKH)
        dk_QKH.copy_(dk_TKH[prefix:])
        dv_QKH.copy_(dv_TKH[prefix:])
        prefix_grads = dk_TKH[:prefix], dv_TKH[:prefix]
    if grad_k_QKH is not None:
        dk_QKH.add_(grad_k_QKH)
    if grad_v_QKH is not None:
        dv_QKH.add_(grad_v_QKH)
    return grad_qkv_QM, prefix_grads


def _projection_gradient(
    grad_qkv_QM: Tensor,
    grad_middle_QD: Tensor,
    kept: _Kept,
    p: LayerParameters,
    dtypes: GradDtypes,
    sums: "_RowSums",
    plan: AttentionPlan,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of x, and of the weights of q, k and v; turns ``grad_qkv_QM`` back."""
    sums.turn_back_(grad_qkv_QM, p, kept.cos_Q1F, kept.sin_Q1F, plan)
    grad_normal_QD = _input_gradient(grad_qkv_QM, p.q_weight, p.k_weight, p.v_weight)
    normal_QD = sums.norm_gradient_(
        grad_normal_QD,
        kept.rows_QD,
        kept.attention_scale_Q,
        p.attention_norm_D,
        grad_middle_QD,
        first=grad_middle_QD.shape[1],
    )
    weights = [dtypes.q_weight, dtypes.k_weight, dtypes.v_weight]
    sizes = [p.q_weight.shape[0], p.k_weight.shape[0], p.v_weight.shape[0]]
    return grad_normal_QD, _weight_gradients(grad_qkv_QM, normal_QD, weights, sizes)


class _RowSums:
    """Partial sums over rows, for the gradients of both norms' weights and of the biases, in one float32 buffer.

    Its columns are D of the feed-forward network's norm, D of the attention's, and those of qkv.
    """

    def __init__(self, rows_QD: Tensor, qkv_width: int) -> None:
        self._num_rows, self._width = rows_QD.shape
        most = PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors(rows_QD.device)
        self._rows_per_program = -(-self._num_rows // (most * TURNED_ROWS)) * TURNED_ROWS
        self._num_programs = -(-self._num_rows // self._rows_per_program)
        self._partials = torch.empty(
            (self._num_programs, 2 * self._width + qkv_width), dtype=torch.float32, device=rows_QD.device
        )

    def norm_gradient_(
        self,
        grad_QD: Tensor,
        rows_QD: Tensor,
        scale_Q: Tensor,
        weight_D: Tensor,
        residual_grad_QD: Tensor,
        *,
        first: int,
    ) -> Tensor:
        """Turn the gradient of a norm's output into its input's plus the residual's; return the norm's output."""
        normal_QD = torch.empty_like(rows_QD)
        tensors = grad_QD, rows_QD, scale_Q, weight_D, residual_grad_QD, grad_QD, normal_QD, self._partials
        width, block, num_warps = _row_block(rows_QD)
        launch(
            _kernels().norm_gradient_rows,
            self._num_programs,
            *tensors,
            self._num_rows,
            self._rows_per_program,
            self._partials.shape[1],
            first,
            WIDTH=width,
            BLOCK=block,
            num_warps=num_warps,
        )
        return normal_QD

    def turn_back_(
        self, grad_qkv_QM: Tensor, p: LayerParameters, cos_Q1F: Tensor, sin_Q1F: Tensor, plan: AttentionPlan
    ) -> None:
        """Turn the gradients of rotated q and k into those from before the rotation."""
        sums = self._partials, self._num_programs, self._rows_per_program
        _launch_turn(grad_qkv_QM, p, cos_Q1F, sin_Q1F, plan, *sums, first=2 * self._width, back=True)

    def gradients(self, p: LayerParameters, dtypes: GradDtypes) -> list[Tensor | None]:
        """Of the norms of the feed-forward network and of the attention, and of the biases of q, k and v."""
        wanted = [dtypes.mlp_norm_D, dtypes.attention_norm_D, dtypes.q_bias, dtypes.k_bias, dtypes.v_bias]
        sizes = [self._width, self._width]
        if p.q_bias is not None:
            sizes += [p.q_weight.shape[0], p.k_weight.shape[0], p.v_weight.shape[0]]
        kinds = {dtype for dtype in wanted if dtype is not None}
        if not kinds:
            return [None] * len(wanted)
        sums = self._partials[:, : sum(sizes)].sum(0)
        if len(kinds) == 1:
            sums = sums.to(next(iter(kinds)))  # One launch for all.
        parts = [*sums.split(sizes), *[None] * (len(wanted) - len(sizes))]
        return [
            None if part is None or dtype is None else part.to(dtype)
            for part, dtype in zip(parts, wanted, strict=True)
        ]


def _norm(rows_QD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm's output, and what it multiplied each row by."""
    normal_QD = torch.empty_like(rows_QD)
    scale_Q = torch.empty(len(rows_QD), dtype=torch.float32, device=rows_QD.device)
    _launch_norm(rows_QD, rows_QD, weight_D, rows_QD, normal_QD, scale_Q, eps, add=False)
    return normal_QD, scale_Q


def _add_and_norm(
    rows_QD: Tensor, delta_QD: Tensor, normal_QD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``rows + delta``, which takes the memory of delta, and the scales of its norm, which goes to ``normal_QD``."""
    scale_Q = torch.empty(len(rows_QD), dtype=torch.float32, device=rows_QD.device)
    _launch_norm(rows_QD, delta_QD, weight_D, delta_QD, normal_QD, scale_Q, eps, add=True)
    return delta_QD, scale_Q


def _launch_norm(rows_QD: Tensor, *tensors_and_eps: Any, add: bool) -> None:
    width, block, num_warps = _row_block(rows_QD)
    launch(
        _kernels().norm_rows,
        len(rows_QD),
        rows_QD,
        *tensors_and_eps,
        ADD=add,
        WIDTH=width,
        BLOCK=block,
        num_warps=num_warps,
    )


def _row_block(rows_QD: Tensor) -> tuple[int, int, int]:
    """Width, the power of two that holds it, and warps for 8 columns a thread."""
    width = rows_QD.shape[1]
    block = 1 << (width - 1).bit_length()
    return width, block, min(16, max(1, block // 256))


def _projected(rows_QD: Tensor, *weights: Tensor) -> Tensor:
    """The products of the rows and some weights side by side."""
    sizes = [weight.shape[0] for weight in weights]
    out_QM = torch.empty((len(rows_QD), sum(sizes)), dtype=rows_QD.dtype, device=rows_QD.device)
    for weight, part in zip(weights, out_QM.split(sizes, dim=1), strict=True):
        torch.mm(rows_QD, weight.t(), out=part)
    return out_QM


def _turn_(qkv_QM: Tensor, p: LayerParameters, cos_Q1F: Tensor, sin_Q1F: Tensor, plan: AttentionPlan) -> None:
    """Add the biases and rotate q and k."""
    num_programs = -(-len(qkv_QM) // TURNED_ROWS)
    _launch_turn(qkv_QM, p, cos_Q1F, sin_Q1F, plan, cos_Q1F, num_programs, TURNED_ROWS, first=0, back=False)


def _launch_turn(
    qkv_QM: Tensor,
    p: LayerParameters,
    cos_Q1F: Tensor,
    sin_Q1F: Tensor,
    plan: AttentionPlan,
    partials: Tensor,
    num_programs: int,
    rows_per_program: int,
    *,
    first: int,
    back: bool,
) -> None:
    has_bias = p.q_bias is not None
    biases = (p.q_bias, p.k_bias, p.v_bias) if has_bias else (qkv_QM, qkv_QM, qkv_QM)
    num_rows, columns = qkv_QM.shape
    launch(
        _kernels().turn_heads,
        num_programs * -(-columns // (2 * TURNED_PAIRS)),
        qkv_QM,
        *biases,
        cos_Q1F,
        sin_Q1F,
        partials,
        num_rows,
        rows_per_program,
        partials.shape[1],
        first,
        BACK=back,
        BIAS=has_bias,
        QUERIES=plan.num_heads,
        KEYS=plan.num_kv_heads,
        WIDTH=plan.width,
        ROWS=TURNED_ROWS,
        PAIRS=TURNED_PAIRS,
    )


def _heads(qkv_QM: Tensor, plan: AttentionPlan) -> tuple[Tensor, ...]:
    """q, k and v of the buffer, as heads."""
    heads = qkv_QM.view(len(qkv_QM), -1, plan.width)
    return heads.split((plan.num_heads, plan.num_kv_heads, plan.num_kv_heads), dim=1)


def _gated(gate_up_QM: Tensor) -> Tensor:
    num_rows, width = len(gate_up_QM), gate_up_QM.shape[1] // 2
    out_QF = torch.empty((num_rows, width), dtype=gate_up_QM.dtype, device=gate_up_QM.device)
    num_programs = num_rows * -(-width // GATED_COLUMNS)
    launch(_kernels().gate_rows, num_programs, gate_up_QM, out_QF, WIDTH=width, BLOCK=GATED_COLUMNS)
    return out_QF


def _gate_gradient_(grad_QF: Tensor, gate_up_QM: Tensor) -> Tensor:
    """The gradient of gate and up; turns that of ``silu(gate) * up`` into ``silu(gate) * up``."""
    grad_gate_up_QM, width = torch.empty_like(gate_up_QM), grad_QF.shape[1]
    num_programs = len(grad_QF) * -(-width // GATED_COLUMNS)
    launch(
        _kernels().gate_gradient_rows,
        num_programs,
        gate_up_QM,
        grad_QF,
        grad_gate_up_QM,
        WIDTH=width,
        BLOCK=GATED_COLUMNS,
    )
    return grad_gate_up_QM


def _input_gradient(grad_QM: Tensor, *weights: Tensor) -> Tensor:
    """Of the input of several projections, the sum over them."""
    first, *rest = grad_QM.split([weight.shape[0] for weight in weights], dim=1)
    total_QD = torch.mm(first, weights[0])
    for part, weight in zip(rest, weights[1:], strict=True):
        total_QD.addmm_(part, weight)
    return total_QD


def _weight_gradients(
    grad_QM: Tensor, rows_QD: Tensor, dtypes: list[torch.dtype | None], sizes: list[int] | None = None
) -> list[Tensor | None]:
    """Of projections of the same rows, ``sizes`` wide (or equally): one product, where all are wanted in one dtype."""
    sizes = sizes or [grad_QM.shape[1] // len(dtypes)] * len(dtypes)
    if dtypes[0] is not None and len(set(dtypes)) == 1:
        whole_MD = _product(grad_QM.t(), rows_QD, dtypes[0])
        return [whole_MD] if len(sizes) == 1 else list(whole_MD.split(sizes))
    return [
        None if dtype is None else _product(part.t(), rows_QD, dtype)
        for part, dtype in zip(grad_QM.split(sizes, dim=1), dtypes, strict=True)
    ]


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32 without rounding in between, where that is the dtype."""
    if dtype == left.dtype:
        return torch.mm(left, right)
    if dtype == torch.float32 and left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.float(), right.float()).to(dtype)


def _grad_dtype(parameter: Tensor | None) -> torch.dtype | None:
    """Of a parameter's gradient; None where it has none."""
    if parameter is None or not parameter.requires_grad:
        return None
    return (parameter.grad_dtype if parameter.is_leaf else None) or parameter.dtype


@cache
def _kernels() -> ModuleType:
    """The kernels, and triton with them, at the first use; a plan has said before if there is no triton."""
    return importlib.import_module("omnigrpo_kernels.layer_ops_triton")
