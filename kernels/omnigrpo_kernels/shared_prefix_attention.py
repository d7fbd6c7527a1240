"""Attention over packed groups: a prefix once, then its completions.

Legend: ``T`` packed rows, ``N`` query heads, ``K`` key/value heads, ``H`` head width, ``P`` prefix rows,
``R`` rows of one completion.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j    over j <= i in the group of i with
                                                    j in the prefix, or j in the completion of i

so a prefix row attends causally inside its prefix, and a completion row attends to all of its group's prefix
and causally inside its own completion.
"""

from functools import lru_cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def group_mask(prefix_length: int, completion_lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Bool ``[L, L]`` of one group of L rows: true where the row (first index) attends to the column."""
    lengths = torch.tensor((prefix_length, *completion_lengths), device=device)
    segment = torch.repeat_interleave(torch.arange(lengths.numel(), device=device), lengths)
    same_or_prefix = (segment[:, None] == segment[None, :]) | (segment == 0)[None, :]
    return same_or_prefix.tril()


_KEPT_LAYOUTS = 2
_KEPT_BYTES_PER_LAYOUT = 32 * 2**20
_biases_in_use: WeakValueDictionary[tuple[object, ...], Tensor] = WeakValueDictionary()


def _group_biases(
    layout: SharedPrefixLayout, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, ...]:
    """Additive masks of each group, or None where plain causal attention is the same thing.

    Kept for the last layouts because every decoder layer asks for the same ones, 64 MiB in all. Masks of a
    layout that take more than its share live as long as a graph holds them: a forward pass with gradients
    shares one set over its layers (the backward needs it), one without builds them in each call.
    """
    num_bytes = dtype.itemsize * sum(
        length**2
        for length, lengths in zip(layout.group_lengths, layout.completion_lengths, strict=True)
        if _needs_mask(layout, lengths)
    )
    build = _build_group_biases if num_bytes > _KEPT_BYTES_PER_LAYOUT else _kept_group_biases
    return build(layout, dtype, device)


def _build_group_biases(
    layout: SharedPrefixLayout, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor | None, ...]:
    """Never inference tensors: one that a rollout made may be saved for an update's backward."""
    with torch.inference_mode(False), torch.no_grad():
        return tuple(
            _group_bias(layout, prefix, lengths, dtype, device)
            for prefix, lengths in zip(layout.prefix_lengths, layout.completion_lengths, strict=True)
        )


_kept_group_biases = lru_cache(maxsize=_KEPT_LAYOUTS)(_build_group_biases)


def _needs_mask(layout: SharedPrefixLayout, completion_lengths: tuple[int, ...]) -> bool:
    """Whether the group is anything but one causal sequence."""
    return not layout.prefix_queries or sum(1 for length in completion_lengths if length) > 1


def _group_bias(
    layout: SharedPrefixLayout,
    prefix_length: int,
    completion_lengths: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    if not _needs_mask(layout, completion_lengths):
        return None
    key = (layout.prefix_queries, prefix_length, completion_lengths, dtype, device)
    bias = _biases_in_use.get(key)
    if bias is None:
        mask = group_mask(prefix_length, completion_lengths, device)[
            0 if layout.prefix_queries else prefix_length :
        ]
        bias = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, -torch.inf)
        _biases_in_use[key] = bias
    return bias


def shared_prefix_attention_reference(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, *, scale: float | None = None
) -> Tensor:
    """One masked SDPA per group, in the dtype of the inputs; the mask of a group is quadratic in its rows."""
    outputs = []
    query_lengths = [
        length if layout.prefix_queries else length - prefix
        for length, prefix in zip(layout.group_lengths, layout.prefix_lengths, strict=True)
    ]
    for q_LNH, k_LKH, v_LKH, bias in zip(
        q_TNH.split(query_lengths),
        k_TKH.split(layout.group_lengths),
        v_TKH.split(layout.group_lengths),
        _group_biases(layout, q_TNH.dtype, q_TNH.device),
        strict=True,
    ):
        q_1NLH, k_1KLH, v_1KLH = (rows.transpose(0, 1).unsqueeze(0) for rows in (q_LNH, k_LKH, v_LKH))
        o_1NLH = scaled_dot_product_attention(
            q_1NLH, k_1KLH, v_1KLH, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=True
        )
        outputs.append(o_1NLH.squeeze(0).transpose(0, 1))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0].contiguous()


def shared_prefix_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, *, scale: float | None = None
) -> Tensor:
    """Attention of packed groups, ``[T, N, H]`` (the completions' rows where ``prefix_queries`` is off).

    Differentiable in q, k and v. ``scale`` defaults to ``H ** -0.5``.
    Raises ValueError when shapes, dtypes, devices and layout disagree.
    """
    _check_inputs(q_TNH, k_TKH, v_TKH, layout)
    return shared_prefix_attention_reference(q_TNH, k_TKH, v_TKH, layout, scale=scale)


def _check_inputs(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout) -> None:
    shapes = f"q {tuple(q_TNH.shape)}, k {tuple(k_TKH.shape)}, v {tuple(v_TKH.shape)}"
    if q_TNH.dim() != 3 or k_TKH.dim() != 3 or k_TKH.shape != v_TKH.shape:
        raise ValueError(
            f"shared_prefix_attention: got {shapes}; give q [T, N, H] and k, v of one shape [T, K, H]"
        )
    if q_TNH.shape[2] != k_TKH.shape[2]:
        raise ValueError(f"shared_prefix_attention: got {shapes}; H of q, k and v must be equal")
    if k_TKH.shape[1] == 0 or q_TNH.shape[1] % k_TKH.shape[1]:
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
    if len({q_TNH.device, k_TKH.device, v_TKH.device}) > 1:
        raise ValueError(
            f"shared_prefix_attention: got q on {q_TNH.device}, k on {k_TKH.device}, v on {v_TKH.device}; "
            "give one device"
        )
