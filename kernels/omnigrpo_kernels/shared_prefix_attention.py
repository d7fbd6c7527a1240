"""Attention over packed groups: a prefix once, then its completions.

Legend: ``T`` packed rows, ``N`` query heads, ``K`` key/value heads, ``H`` head width, ``P`` prefix rows,
``R`` rows of one completion.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j    over j <= i in the group of i with
                                                    j in the prefix, or j in the completion of i

so a prefix row attends causally inside its prefix, and a completion row attends to all of its group's prefix
and causally inside its own completion.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omnigrpo_kernels import shared_prefix_attention_cpu, shared_prefix_attention_cuda
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def group_mask(prefix_length: int, completion_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Bool ``[L, L]`` of one group of L rows: true where the row (first index) attends to the column."""
    lengths = torch.tensor((prefix_length, *completion_lengths), device=device)
    segment = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths)
    same_or_prefix = (segment[:, None] == segment[None, :]) | (segment == 0)[None, :]
    return same_or_prefix.tril()


def shared_prefix_attention_reference(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, *, scale: float | None = None
) -> Tensor:
    """One masked SDPA per group, in the dtype of the inputs; the mask of a group is quadratic in its rows."""
    outputs = []
    query_lengths = [
        length if layout.prefix_queries else length - prefix
        for length, prefix in zip(layout.group_lengths, layout.prefix_lengths, strict=True)
    ]
    for q_LNH, k_LKH, v_LKH, prefix, lengths in zip(
        q_TNH.split(query_lengths),
        k_TKH.split(layout.group_lengths),
        v_TKH.split(layout.group_lengths),
        layout.prefix_lengths,
        layout.completion_lengths,
        strict=True,
    ):
        mask = group_mask(prefix, lengths, q_TNH.device)[0 if layout.prefix_queries else prefix :]
        q_1NLH, k_1KLH, v_1KLH = (rows.transpose(0, 1).unsqueeze(0) for rows in (q_LNH, k_LKH, v_LKH))
        o_1NLH = scaled_dot_product_attention(
            q_1NLH, k_1KLH, v_1KLH, attn_mask=mask, scale=scale, enable_gqa=True
        )
        outputs.append(o_1NLH.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


_LAYOUT = "int[] prefix_lengths, int[] completion_counts, int[] completion_lengths, bool prefix_queries"
torch.library.define(
    "omnigrpo::shared_prefix_attention",
    f"(Tensor q, Tensor k, Tensor v, {_LAYOUT}, float scale) -> (Tensor out, Tensor lse)",
)
torch.library.define(
    "omnigrpo::shared_prefix_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_LAYOUT}, float scale)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
)


def _register(
    device: str,
    attention_forward: Callable[..., tuple[Tensor, Tensor]],
    attention_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Make two functions the kernels of a device; they take tensors, ``layout`` and ``scale``."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *layout_and_scale: Any) -> tuple[Tensor, Tensor]:
        *layout, scale = layout_and_scale
        return attention_forward(q, k, v, _layout(*layout), scale)

    def backward(
        grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *layout_and_scale: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *layout, scale = layout_and_scale
        return attention_backward(grad_out, q, k, v, out, lse, _layout(*layout), scale)

    torch.library.impl("omnigrpo::shared_prefix_attention", device, forward)
    torch.library.impl("omnigrpo::shared_prefix_attention_backward", device, backward)


def _layout(
    prefix_lengths: list[int],
    completion_counts: list[int],
    completion_lengths: list[int],
    prefix_queries: bool,
) -> SharedPrefixLayout:
    ends = accumulate(completion_counts)
    return SharedPrefixLayout(
        prefix_lengths=tuple(prefix_lengths),
        completion_lengths=tuple(
            tuple(completion_lengths[end - count : end])
            for end, count in zip(ends, completion_counts, strict=True)
        ),
        prefix_queries=prefix_queries,
    )


_register(
    "cpu", shared_prefix_attention_cpu.attention_forward, shared_prefix_attention_cpu.attention_backward
)
_register(
    "cuda", shared_prefix_attention_cuda.attention_forward, shared_prefix_attention_cuda.attention_backward
)


@torch.library.register_fake("omnigrpo::shared_prefix_attention")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    if q.device.type == "cuda":
        lse_dtype = shared_prefix_attention_cuda.lse_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


@torch.library.register_fake("omnigrpo::shared_prefix_attention_backward")
def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.layout_and_scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.omnigrpo.shared_prefix_attention_backward(
        grad_out, *ctx.saved_tensors, *ctx.layout_and_scale
    )
    return *grads, *(None for _ in ctx.layout_and_scale)


torch.library.register_autograd(
    "omnigrpo::shared_prefix_attention", _backward, setup_context=_save_for_backward
)


def shared_prefix_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, *, scale: float | None = None
) -> Tensor:
    """Attention of packed groups, ``[T, N, H]`` (the completions' rows where ``prefix_queries`` is off).

    Differentiable in q, k and v, once. ``scale`` defaults to ``H ** -0.5``.
    Raises ValueError when shapes, dtypes, devices and layout disagree.
    """
    _check_inputs(q_TNH, k_TKH, v_TKH, layout)
    out_TNH, _ = torch.ops.omnigrpo.shared_prefix_attention(
        q_TNH,
        k_TKH,
        v_TKH,
        layout.prefix_lengths,
        [len(lengths) for lengths in layout.completion_lengths],
        [length for lengths in layout.completion_lengths for length in lengths],
        layout.prefix_queries,
        q_TNH.shape[2] ** -0.5 if scale is None else scale,
    )
    return out_TNH


def _check_inputs(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout) -> None:
    shapes = f"q {tuple(q_TNH.shape)}, k {tuple(k_TKH.shape)}, v {tuple(v_TKH.shape)}"
    if q_TNH.dim() != 3 or k_TKH.dim() != 3 or k_TKH.shape != v_TKH.shape:
        raise ValueError(
            f"shared_prefix_attention: got {shapes}; give q [T, N, H] and k, v of one shape [T, K, H]"
        )
    if q_TNH.shape[2] != k_TKH.shape[2]:
        raise ValueError(f"shared_prefix_attention: got {shapes}; H of q, k and v must be equal")
    if q_TNH.shape[2] == 0:
        raise ValueError(f"shared_prefix_attention: got {shapes}; H must be at least 1")
    if 0 in (q_TNH.shape[1], k_TKH.shape[1]) or q_TNH.shape[1] % k_TKH.shape[1]:
        raise ValueError(f"shared_prefix_attention: got {shapes}; N must be a multiple of K")
    if (q_TNH.shape[0], k_TKH.shape[0]) != (layout.num_query_rows, layout.num_rows):
        raise ValueError(
            f"shared_prefix_attention: got {shapes} for a layout of {layout.num_query_rows} rows of q and "
            f"{layout.num_rows} of k and v ({layout.num_groups} groups); give one row per token of the layout"
        )
    if len({q_TNH.dtype, k_TKH.dtype, v_TKH.dtype}) > 1 or not q_TNH.dtype.is_floating_point:
        raise ValueError(
            f"shared_prefix_attention: got q {q_TNH.dtype}, k {k_TKH.dtype}, v {v_TKH.dtype}; give one float dtype"
        )
    if q_TNH.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(
            f"shared_prefix_attention: got {q_TNH.dtype}; give bfloat16, float16, float32 or float64"
        )
    if len({q_TNH.device, k_TKH.device, v_TKH.device}) > 1:
        raise ValueError(
            f"shared_prefix_attention: got q on {q_TNH.device}, k on {k_TKH.device}, v on {v_TKH.device}; "
            "give one device"
        )
