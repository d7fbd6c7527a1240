"""Shared-prefix attention on the CPU, through PyTorch's flash kernel for CPUs.

Legend: ``T`` packed rows, ``N`` query heads, ``K`` key/value heads, ``J = N / K``, ``H`` head width, ``C`` completions
of a batch, ``R`` their rows, ``M`` query rows, ``L`` key rows.

Three parts: prefixes causal, all completions of a group over their prefix as one sequence, completions over themselves.
Completions of similar length share a call, padded to the longest. Forward, the last two meet by their log-sum-exps.
Backward, each part is called with the output and log-sum-exp of the whole row, which makes it exact alone, and the
parts' gradients add up:

    P_ij = exp(scale q_i . k_j - lse_i)        dV_j = sum_i P_ij do_i
    dS_ij = P_ij (do_i . v_j - do_i . o_i)     dQ_i = scale sum_j dS_ij k_j     dK_j = scale sum_i dS_ij q_i

The kernel's backward computes masked scores too, and is slow on small products. So there the J query heads of a key
head are folded into its rows, and a causal part is blocks left of its diagonal, without a mask, and on it. On 2 cores
with AMX (bfloat16, heads 14/2/64), 8 completions of 160 rows over themselves take 6 ms so, and 23 ms in one causal call
of 112 small heads; with the prefix of 976 rows everything takes 60 ms, and took 64 ms as blocks of plain products.

In bfloat16 on CPUs with AMX the backward pass is the extension's own kernel, csrc/attention_kernel.inc: 11 ms there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from omnigrpo_kernels import extension
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

AMX_HEAD_WIDTHS = (32, 64, 96, 128)
"""Of the extension's backward pass, in bfloat16."""
DIAGONAL_TOKENS = 256
"""Of a block on the diagonal in the backward pass; half of it is computed for nothing."""
PIECE_TOKENS = 64
"""At least, in a piece of a product that is split for more cores."""
MERGED_ROWS = 256
"""At a time, when the parts of a completion row meet."""
SIMILAR_SHARE, SIMILAR_ROWS = 0.8, 16
"""A completion joins a batch from this share of the longest length on, or when it lacks at most so many rows."""


def attention_forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``[T, N, H]`` and natural log-sum-exp ``[N, T]``, float32 (float64), for the rows of q."""
    q_TNH, k_TKH, v_TKH = (_with_dense_heads(x) for x in (q_TNH, k_TKH, v_TKH))
    o_TNH = torch.empty_like(q_TNH, memory_format=torch.contiguous_format)
    lse_NT = q_TNH.new_empty(q_TNH.shape[1], q_TNH.shape[0], dtype=_wide(q_TNH.dtype))
    own_o, own_lse = _own_forward(q_TNH, k_TKH, v_TKH, layout, scale)
    for group in _groups(layout):
        k_PKH, v_PKH = k_TKH[group.prefix_keys], v_TKH[group.prefix_keys]
        rows = group.prefix_queries
        if rows.stop > rows.start:
            o_TNH[rows], lse_NT[:, rows] = _flash(q_TNH[rows], k_PKH, v_PKH, scale, is_causal=True)
        rows = group.completion_queries
        if rows.stop > rows.start:
            o_TNH[rows], lse_NT[:, rows] = _flash(q_TNH[rows], k_PKH, v_PKH, scale, is_causal=False)
            _merge_(o_TNH[rows], lse_NT[:, rows], own_o[group.completions], own_lse[:, group.completions])
    return o_TNH, lse_NT


def attention_backward(
    do_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their dtype; sums over blocks are float32 (float64)."""
    if runs_on_amx(q_TNH.dtype, q_TNH.shape[2]):
        return _amx_backward(do_TNH, q_TNH, k_TKH, v_TKH, o_TNH, lse_NT, layout, scale)
    num_kv_heads = k_TKH.shape[1]
    q_KTJH, do_KTJH, o_KTJH = (_fold(x, num_kv_heads) for x in (q_TNH, do_TNH, o_TNH))
    queries = _Queries(q_KTJH, do_KTJH, o_KTJH, _fold(lse_NT.T, num_kv_heads))
    k_KTH, v_KTH = (x.transpose(0, 1)[None].contiguous() for x in (k_TKH, v_TKH))
    dq_KTJH = torch.empty_like(q_KTJH)
    dk_KTH, dv_KTH = (torch.zeros_like(x, dtype=lse_NT.dtype) for x in (k_KTH, v_KTH))
    own_dq, own_dk, own_dv = _own_backward(queries, k_KTH, v_KTH, layout, scale)
    for group in _groups(layout):
        keys = group.prefix_keys
        k_KPH, v_KPH = k_KTH[:, :, keys], v_KTH[:, :, keys]
        for rows, part in ((group.prefix_queries, _causal_backward), (group.completion_queries, _backward)):
            if rows.stop > rows.start:
                dq_KTJH[:, :, rows], dk, dv = part(queries.at(rows), k_KPH, v_KPH, scale)
                dk_KTH[:, :, keys] += dk
                dv_KTH[:, :, keys] += dv
        dq_KTJH[:, :, group.completion_queries] += own_dq[:, :, group.completions]
        dk_KTH[:, :, group.completion_keys] = own_dk[:, :, group.completions]
        dv_KTH[:, :, group.completion_keys] = own_dv[:, :, group.completions]
    dq_TNH = dq_KTJH[0].transpose(0, 1).flatten(1, 2)
    dk_TKH, dv_TKH = (x[0].transpose(0, 1).to(q_TNH.dtype).contiguous() for x in (dk_KTH, dv_KTH))
    return dq_TNH, dk_TKH, dv_TKH


def runs_on_amx(dtype: torch.dtype, head_width: int) -> bool:
    """Whether the backward pass is the extension's, in C++."""
    return dtype == torch.bfloat16 and head_width in AMX_HEAD_WIDTHS and _active_isa() == "amx_bf16"


def _active_isa() -> str | None:
    module = _extension()
    return None if module is None else module.cpu_isa()


@lru_cache(maxsize=1)
def _extension() -> ModuleType | None:
    """Attention needs no extension, so one that is not built is no error here."""
    try:
        return extension.load()
    except ImportError:
        return None


def _amx_backward(
    do_TNH: Tensor,
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    o_TNH: Tensor,
    lse_NT: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = (_with_dense_heads(x) for x in (do_TNH, q_TNH, k_TKH, v_TKH, o_TNH))
    return torch.ops.omnigrpo.shared_prefix_attention_backward_amx(
        *rows,
        lse_NT,
        layout.prefix_lengths,
        [len(lengths) for lengths in layout.completion_lengths],
        [length for lengths in layout.completion_lengths for length in lengths],
        layout.prefix_queries,
        scale,
        torch.get_num_threads(),
    )


@dataclass(frozen=True, slots=True)
class _Group:
    """Where the rows of a group are."""

    prefix_keys: slice
    """Rows of k and v."""
    prefix_queries: slice
    """Rows of q; none where the layout leaves them out."""
    completion_keys: slice
    completion_queries: slice
    completions: slice
    """Among the rows of all groups' completions."""


def _groups(layout: SharedPrefixLayout) -> Iterator[_Group]:
    key = query = completion = 0
    for prefix, length in zip(layout.prefix_lengths, layout.group_lengths, strict=True):
        query_prefix = prefix if layout.prefix_queries else 0
        rows = length - prefix
        yield _Group(
            prefix_keys=slice(key, key + prefix),
            prefix_queries=slice(query, query + query_prefix),
            completion_keys=slice(key + prefix, key + length),
            completion_queries=slice(query + query_prefix, query + query_prefix + rows),
            completions=slice(completion, completion + rows),
        )
        key, query, completion = key + length, query + query_prefix + rows, completion + rows


@dataclass(frozen=True, slots=True)
class _Batch:
    """Completions of similar length, padded to the longest by repeating their last row."""

    keys_CR: Tensor
    """int64: row of k and v."""
    queries_CR: Tensor
    """int64: row of q."""
    is_padding_CR: Tensor
    """bool"""


@lru_cache(maxsize=8)
def _batches(layout: SharedPrefixLayout) -> tuple[list[_Batch], Tensor]:
    """All completions that have rows, and where among the batches' padded rows each of these rows is, int64.

    Kept, because every layer asks for the same, twice.
    """
    spans: list[tuple[int, int, int]] = []
    prefix_rows = 0
    for prefix, starts, lengths in zip(
        layout.prefix_lengths, layout.completion_starts, layout.completion_lengths, strict=True
    ):
        prefix_rows += prefix
        for start, length in zip(starts, lengths, strict=True):
            if length:
                spans.append((length, start, start - prefix_rows))
    spans.sort(key=lambda span: -span[0])
    batches: list[_Batch] = []
    places = torch.empty(sum(length for length, *_ in spans), dtype=torch.int64, device="cpu")
    num_padded = 0
    while spans:
        longest = spans[0][0]
        shortest = min(SIMILAR_SHARE * longest, longest - SIMILAR_ROWS)
        size = sum(1 for length, *_ in spans if length >= shortest)
        lengths_C1, starts_C1, completions_C1 = torch.tensor(spans[:size], device="cpu")[..., None].unbind(1)
        del spans[:size]
        row_R = torch.arange(longest, device="cpu")
        row_CR = torch.minimum(row_R, lengths_C1 - 1)
        keys_CR, completions_CR = starts_C1 + row_CR, completions_C1 + row_CR
        queries_CR = keys_CR if layout.prefix_queries else completions_CR
        batches.append(_Batch(keys_CR, queries_CR, row_R >= lengths_C1))
        places[completions_CR] = num_padded + torch.arange(size, device="cpu")[:, None] * longest + row_CR
        num_padded += size * longest
    return batches, places


def _flash(
    q_MNH: Tensor, k_LKH: Tensor, v_LKH: Tensor, scale: float, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """``(o_MNH, lse_NM)``; no length may be 0."""
    q_1NMH, k_1KLH, v_1KLH = (rows.transpose(0, 1)[None] for rows in (q_MNH, k_LKH, v_LKH))
    o_1NMH, lse_1NM = _flash_forward(q_1NMH, k_1KLH, v_1KLH, 0.0, is_causal, scale=scale)
    return o_1NMH[0].transpose(0, 1), lse_1NM[0]


def _own_forward(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, layout: SharedPrefixLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Completions over themselves: output and log-sum-exp of all completion rows."""
    batches, places = _batches(layout)
    if not batches:
        return q_TNH[:0], q_TNH.new_empty(q_TNH.shape[1], 0)
    outputs, lses = [], []
    for batch in batches:
        heads = (
            x.index_select(0, rows_CR.flatten()).unflatten(0, rows_CR.shape).transpose(1, 2)
            for x, rows_CR in ((q_TNH, batch.queries_CR), (k_TKH, batch.keys_CR), (v_TKH, batch.keys_CR))
        )
        o_CNRH, lse_CNR = _flash_forward(*heads, 0.0, True, scale=scale)
        outputs.append(o_CNRH.transpose(1, 2).flatten(0, 1))
        lses.append(lse_CNR.transpose(0, 1).flatten(1))
    return torch.cat(outputs).index_select(0, places), torch.cat(lses, dim=1).index_select(1, places)


def _merge_(o_MNH: Tensor, lse_NM: Tensor, own_o_MNH: Tensor, own_lse_NM: Tensor) -> None:
    """Add keys to an output and its log-sum-exp, in place; few rows at a time, for the float32 ones to stay in L2."""
    total_NM = torch.logaddexp(lse_NM, own_lse_NM)
    weight_MN1 = (own_lse_NM - total_NM).exp_().T[..., None].contiguous()
    lse_NM.copy_(total_NM)
    for o, own_o, weight in zip(*(x.split(MERGED_ROWS) for x in (o_MNH, own_o_MNH, weight_MN1)), strict=True):
        o.copy_(o.to(weight.dtype).lerp_(own_o.to(weight.dtype), weight))


@dataclass(frozen=True, slots=True)
class _Queries:
    """Query rows of the backward pass, folded: ``[C, K, M, J, ...]``."""

    q: Tensor
    do: Tensor
    o: Tensor
    lse: Tensor

    def at(self, rows: slice) -> "_Queries":
        return _Queries(*(x[:, :, rows] for x in (self.q, self.do, self.o, self.lse)))

    def gather(self, batch: _Batch) -> "_Queries":
        """Rows of padding get P = 0."""
        q, do, o, lse = (_gather(x, batch.queries_CR) for x in (self.q, self.do, self.o, self.lse))
        return _Queries(q, do, o, lse.masked_fill(batch.is_padding_CR[:, None, :, None], torch.inf))


def _fold(x: Tensor, num_kv_heads: int) -> Tensor:
    """``[T, N, ...]`` to ``[1, K, T, J, ...]``."""
    return x.unflatten(1, (num_kv_heads, -1)).transpose(0, 1)[None].contiguous()


def _gather(x: Tensor, rows_CR: Tensor) -> Tensor:
    """``[1, K, T, ...]`` to ``[C, K, R, ...]``."""
    return x[0].index_select(1, rows_CR.flatten()).unflatten(1, rows_CR.shape).transpose(0, 1)


def _own_backward(
    queries: _Queries, k_KTH: Tensor, v_KTH: Tensor, layout: SharedPrefixLayout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Completions over themselves: gradients ``[1, K, rows of all completions, ...]`` of q, k and v."""
    batches, places = _batches(layout)
    if not batches:
        return queries.q[:, :, :0], k_KTH[:, :, :0], v_KTH[:, :, :0]
    parts = []
    for batch in batches:
        k_CKRH, v_CKRH = (_gather(x, batch.keys_CR) for x in (k_KTH, v_KTH))
        grads = _causal_backward(queries.gather(batch), k_CKRH, v_CKRH, scale)
        parts.append([grad.transpose(0, 1).flatten(1, 2) for grad in grads])
    dq, dk, dv = (torch.cat(grads, dim=1).index_select(1, places)[None] for grads in zip(*parts, strict=True))
    return dq, dk, dv


def _causal_backward(
    queries: _Queries, k_CKRH: Tensor, v_CKRH: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (in its dtype), k and v (sums: float32 or float64), where row i attends to the keys up to i."""
    num_rows, num_folded = queries.q.shape[2:4]
    tokens = min(num_rows, DIAGONAL_TOKENS)
    mask = queries.q.new_full((tokens, tokens), -torch.inf).triu_(1).repeat_interleave(num_folded, dim=0)
    dq = torch.empty_like(queries.q)
    dk, dv = (torch.zeros_like(x, dtype=queries.lse.dtype) for x in (k_CKRH, v_CKRH))
    for first in range(0, num_rows, tokens):
        rows, left = slice(first, min(first + tokens, num_rows)), slice(0, first)
        block, length = queries.at(rows), rows.stop - first
        diagonal = mask[: length * num_folded, :length]
        dq[:, :, rows], dk_rows, dv_rows = _backward(
            block, k_CKRH[:, :, rows], v_CKRH[:, :, rows], scale, diagonal
        )
        dk[:, :, rows] += dk_rows
        dv[:, :, rows] += dv_rows
        if first:
            dq_left, dk_left, dv_left = _backward(block, k_CKRH[:, :, left], v_CKRH[:, :, left], scale)
            dq[:, :, rows] += dq_left
            dk[:, :, left] += dk_left
            dv[:, :, left] += dv_left
    return dq, dk, dv


def _backward(
    queries: _Queries, k_CKLH: Tensor, v_CKLH: Tensor, scale: float, mask_ML: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (in its dtype), k and v (sums over pieces: float32 or float64).

    The kernel gives whole heads to a core, so with more cores than heads the query rows are split into pieces.
    """
    num_batch, num_heads, num_rows, num_folded = queries.q.shape[:4]
    pieces = torch.get_num_threads() // (num_batch * num_heads)
    pieces = max(1, min(pieces, num_rows // PIECE_TOKENS))
    even = num_rows - num_rows % pieces
    grads = _backward_in_pieces(queries.at(slice(0, even)), k_CKLH, v_CKLH, scale, mask_ML, pieces)
    if even == num_rows:
        return grads
    rest_mask = None if mask_ML is None else mask_ML[even * num_folded :]
    rest = _backward_in_pieces(queries.at(slice(even, num_rows)), k_CKLH, v_CKLH, scale, rest_mask, 1)
    return torch.cat([grads[0], rest[0]], dim=2), grads[1] + rest[1], grads[2] + rest[2]


def _backward_in_pieces(
    queries: _Queries, k_CKLH: Tensor, v_CKLH: Tensor, scale: float, mask_ML: Tensor | None, pieces: int
) -> tuple[Tensor, Tensor, Tensor]:
    num_batch, _, num_rows, num_folded = queries.q.shape[:4]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(2, (pieces, -1)).transpose(1, 2).flatten(0, 1).flatten(2, 3)

    q, do, o, lse = (split(x) for x in (queries.q, queries.do, queries.o, queries.lse))
    k, v = (x[:, None].expand(-1, pieces, -1, -1, -1).flatten(0, 1) for x in (k_CKLH, v_CKLH))
    mask = None
    if mask_ML is not None:
        mask = mask_ML[: num_rows * num_folded].unflatten(0, (pieces, -1))[:, None]
        mask = mask.repeat(num_batch, 1, 1, 1) if pieces > 1 else mask
    dq, dk, dv = _flash_backward(do, q, k, v, o, lse, 0.0, False, attn_mask=mask, scale=scale)
    dq = dq.unflatten(0, (-1, pieces)).transpose(1, 2).unflatten(3, (-1, num_folded)).flatten(2, 3)
    dk, dv = (x.unflatten(0, (-1, pieces)).sum(1, dtype=queries.lse.dtype) for x in (dk, dv))
    return dq, dk, dv


def _with_dense_heads(x_TNH: Tensor) -> Tensor:
    """With the elements of a head next to each other, which the kernels take for granted."""
    return x_TNH if x_TNH.stride(2) == 1 else x_TNH.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
