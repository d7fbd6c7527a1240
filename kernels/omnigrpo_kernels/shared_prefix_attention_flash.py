"""Shared-prefix attention composed of FlashAttention calls: an opponent of the kernels, and a second implementation.

Legend: ``T`` packed rows, ``Q`` rows of q, ``N`` query heads, ``K`` key/value heads, ``H`` head width.

Three calls with sequences of their own lengths: the prefixes, causal; all completions of a group as one sequence over
its prefix, without a mask; each completion, causal. Where two of them see the same query, their outputs merge by
log-sum-exp. The backward calls each with the merged output and log-sum-exp, for then its probabilities are those of
the whole row: dq adds up over the calls, and so do dk and dv of the prefixes.

Rows that do not lie together are copied together; with one group they do. Nothing here runs without a CUDA device.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

Ranges = tuple[tuple[int, int], ...]
"""Rows, as [begin, end) in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlashCall:
    """Sequences of one call; an empty one is in none, because not every build takes it."""

    queries: Ranges
    """Rows of q, a sequence after the other."""
    keys: Ranges
    """Rows of k and v."""
    query_lengths: tuple[int, ...]
    """By sequence."""
    key_lengths: tuple[int, ...]
    causal: bool
    merges: bool
    """Whether a call before it has the same queries."""


@lru_cache(maxsize=8)
def flash_calls(layout: SharedPrefixLayout) -> tuple[FlashCall, ...]:
    """The calls that have sequences: prefixes, completions over prefixes, completions over themselves."""
    prefixes: list[tuple[int, int]] = []
    shared: list[tuple[int, int]] = []
    keys: list[tuple[int, int]] = []
    queries: list[tuple[int, int]] = []
    missing = 0
    for start, prefix, length in zip(
        layout.group_starts, layout.prefix_lengths, layout.group_lengths, strict=True
    ):
        prefixes.append((start, start + prefix))
        missing += 0 if layout.prefix_queries else prefix
        if length > prefix:
            shared.append((start, start + prefix))
            keys.append((start + prefix, start + length))
            queries.append((start + prefix - missing, start + length - missing))
    own_lengths = tuple(length for lengths in layout.completion_lengths for length in lengths if length)
    of_prefixes = tuple(prefixes) if layout.prefix_queries else ()
    calls = (
        FlashCall(
            queries=of_prefixes,
            keys=of_prefixes,
            query_lengths=_lengths(of_prefixes),
            key_lengths=_lengths(of_prefixes),
            causal=True,
            merges=False,
        ),
        FlashCall(
            queries=tuple(queries),
            keys=tuple(shared),
            query_lengths=_lengths(queries),
            key_lengths=_lengths(shared),
            causal=False,
            merges=False,
        ),
        FlashCall(
            queries=tuple(queries),
            keys=tuple(keys),
            query_lengths=own_lengths,
            key_lengths=own_lengths,
            causal=True,
            merges=True,
        ),
    )
    return tuple(call for call in calls if call.query_lengths)


def _lengths(ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(end - begin for begin, end in ranges)


def take(rows: Tensor, ranges: Ranges, dim: int = 0) -> Tensor:
    """The ranges' rows: a view of one range, a copy of several."""
    parts = [rows.narrow(dim, begin, end - begin) for begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def put_(rows: Tensor, ranges: Ranges, values: Tensor, *, add: bool, dim: int = 0) -> None:
    """rows[ranges] = values, or +=."""
    for (begin, end), part in zip(ranges, values.split(_lengths(ranges), dim), strict=True):
        target = rows.narrow(dim, begin, end - begin)
        if add:
            target.add_(part)
        else:
            target.copy_(part)


def merge_(o_TNH: Tensor, lse_NT: Tensor, ranges: Ranges, part_TNH: Tensor, part_lse_NT: Tensor) -> None:
    """Merges attention over further keys into rows of the whole, summed in float32."""
    lengths = _lengths(ranges)
    parts = zip(ranges, part_TNH.split(lengths), part_lse_NT.split(lengths, dim=1), strict=True)
    for (begin, end), part_LNH, part_lse_NL in parts:
        lse_NL = torch.logaddexp(lse_NT[:, begin:end], part_lse_NL)
        weight_LN1, part_weight_LN1 = (
            (old_NL - lse_NL).exp().T.unsqueeze(2) for old_NL in (lse_NT[:, begin:end], part_lse_NL)
        )
        o_TNH[begin:end] = weight_LN1 * o_TNH[begin:end] + part_weight_LN1 * part_LNH
        lse_NT[:, begin:end] = lse_NL


def flash_forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """o ``[Q, N, H]`` and the log-sum-exp ``[N, Q]``, float32 nats; q, k, v in float16 or bfloat16."""
    forward, _ = _library()
    o_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    lse_NT = q_TNH.new_empty((q_TNH.shape[1], q_TNH.shape[0]), dtype=torch.float32)
    for call in flash_calls(layout):
        k_LKH, v_LKH = take(k_TKH, call.keys), take(v_TKH, call.keys)
        offsets = _offsets(call, q_TNH.device)
        part_LNH, part_lse_NL = forward(take(q_TNH, call.queries), k_LKH, v_LKH, offsets, call, scale)
        if call.merges:
            merge_(o_TNH, lse_NT, call.queries, part_LNH, part_lse_NL)
        else:
            put_(o_TNH, call.queries, part_LNH, add=False)
            put_(lse_NT, call.queries, part_lse_NL, add=False, dim=1)
    return o_TNH, lse_NT


def flash_backward(
    do_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq ``[Q, N, H]``, dk and dv ``[T, K, H]``; parts are added in the inputs' dtype, in which they come."""
    _, backward = _library()
    dq_TNH, dk_TKH, dv_TKH = torch.empty_like(q_TNH), torch.zeros_like(k_TKH), torch.zeros_like(v_TKH)
    for call in flash_calls(layout):
        do_LNH, q_LNH, o_LNH = (take(rows, call.queries) for rows in (do_TNH, q_TNH, o_TNH))
        k_LKH, v_LKH = take(k_TKH, call.keys), take(v_TKH, call.keys)
        lse_NL = take(lse_NT, call.queries, dim=1).contiguous()
        offsets = _offsets(call, q_TNH.device)
        dq_LNH, dk_LKH, dv_LKH = backward(do_LNH, q_LNH, k_LKH, v_LKH, o_LNH, lse_NL, offsets, call, scale)
        put_(dq_TNH, call.queries, dq_LNH, add=call.merges)
        put_(dk_TKH, call.keys, dk_LKH, add=True)
        put_(dv_TKH, call.keys, dv_LKH, add=True)
    return dq_TNH, dk_TKH, dv_TKH


@lru_cache(maxsize=24)
def _offsets(call: FlashCall, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 ``[sequences + 1]`` of queries and of keys."""
    query_offsets, key_offsets = (
        torch.tensor(tuple(accumulate(lengths, initial=0)), dtype=torch.int32, device=device)
        for lengths in (call.query_lengths, call.key_lengths)
    )
    return query_offsets, key_offsets


@lru_cache(maxsize=1)
def _library() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor, Tensor]]]:
    """Forward and backward of one call: flash-attn's where it is installed, else torch's own FlashAttention 2."""
    try:
        importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return _torch_forward, _torch_backward
    return _package_forward, _package_backward


def _torch_forward(
    q_LNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    offsets: tuple[Tensor, Tensor],
    call: FlashCall,
    scale: float,
) -> tuple[Tensor, Tensor]:
    longest = max(call.query_lengths), max(call.key_lengths)
    o_LNH, lse_NL, *_ = torch.ops.aten._flash_attention_forward(
        q_LNH, k_LKH, v_LKH, *offsets, *longest, 0.0, call.causal, False, scale=scale
    )
    return o_LNH, lse_NL


def _torch_backward(
    do_LNH: Tensor,
    q_LNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    o_LNH: Tensor,
    lse_NL: Tensor,
    offsets: tuple[Tensor, Tensor],
    call: FlashCall,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    longest = max(call.query_lengths), max(call.key_lengths)
    no_dropout = q_LNH.new_zeros(2, dtype=torch.uint64), q_LNH.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        do_LNH, q_LNH, k_LKH, v_LKH, o_LNH, lse_NL, *offsets, *longest, 0.0, call.causal, *no_dropout, scale=scale
    )  # fmt: skip


def _package_forward(
    q_LNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    offsets: tuple[Tensor, Tensor],
    call: FlashCall,
    scale: float,
) -> tuple[Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    longest = max(call.query_lengths), max(call.key_lengths)
    o_LNH, lse_NL, *_ = interface._flash_attn_varlen_forward(
        q_LNH, k_LKH, v_LKH, *offsets, *longest, dropout_p=0.0, softmax_scale=scale, causal=call.causal
    )
    return o_LNH, lse_NL


def _package_backward(
    do_LNH: Tensor,
    q_LNH: Tensor,
    k_LKH: Tensor,
    v_LKH: Tensor,
    o_LNH: Tensor,
    lse_NL: Tensor,
    offsets: tuple[Tensor, Tensor],
    call: FlashCall,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    interface = importlib.import_module("flash_attn.flash_attn_interface")
    longest = max(call.query_lengths), max(call.key_lengths)
    gradients = torch.empty_like(q_LNH), torch.empty_like(k_LKH), torch.empty_like(v_LKH)
    interface._flash_attn_varlen_backward(
        do_LNH.contiguous(), q_LNH, k_LKH, v_LKH, o_LNH, lse_NL, *gradients, *offsets, *longest, dropout_p=0.0,
        softmax_scale=scale, causal=call.causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
        alibi_slopes=None, deterministic=False,
    )  # fmt: skip
    return gradients
