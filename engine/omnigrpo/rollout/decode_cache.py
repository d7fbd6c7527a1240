"""The decode KV cache: each group's prefix once, and each live row's own tokens.

Legend: ``S`` live rows, ``B`` groups, ``W`` slots of a group (cells of the grid are ``B * W``), ``P`` longest
prefix, ``R`` own tokens, ``N`` query heads, ``K`` key/value heads, ``H`` head width, ``T`` packed rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_BLOCK_TOKENS = 32
"""Own K/V grow by this many tokens at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """Where each live row sits among the groups, so that attention to prefixes is one batched matmul."""

    group_S: Tensor
    """int64, ascending: the group of each row."""
    cell_S: Tensor | None
    """int64: ``group * num_slots + slot``; None when every cell is taken, in order."""
    num_groups: int
    num_slots: int
    """Live rows of the largest group."""

    @classmethod
    def of_counts(cls, counts: Sequence[int], device: torch.device) -> "Grid":
        """Build the grid of groups that have this many live rows each."""
        num_slots = max(counts)
        counts_B = torch.tensor(counts)
        group_S = torch.repeat_interleave(torch.arange(len(counts)), counts_B)
        first_row_B = counts_B.cumsum(0) - counts_B
        slot_S = torch.arange(len(group_S)) - first_row_B[group_S]
        full = len(group_S) == len(counts) * num_slots
        return cls(
            group_S=group_S.to(device),
            cell_S=None if full else (group_S * num_slots + slot_S).to(device),
            num_groups=len(counts),
            num_slots=num_slots,
        )

    def scatter(self, rows_SNH: Tensor) -> Tensor:
        """Rows to cells; empty cells are 0."""
        if self.cell_S is None:
            return rows_SNH
        cells = rows_SNH.new_zeros(self.num_groups * self.num_slots, *rows_SNH.shape[1:])
        return cells.index_copy_(0, self.cell_S, rows_SNH)

    def gather(self, cells: Tensor) -> Tensor:
        """Cells back to rows."""
        return cells if self.cell_S is None else cells.index_select(0, self.cell_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixCache:
    """Prefix K/V of every group, padded to the longest prefix; never repeated over a group's rows."""

    keys: list[Tensor]
    """Per layer ``[B, K, P, H]``."""
    values: list[Tensor]
    """Per layer ``[B, K, P, H]``."""
    lengths: tuple[int, ...]
    """Rows of each group's prefix."""
    bias_B1P: Tensor | None
    """Added to scores: 0 inside a prefix, -inf in its padding; None without padding."""

    @classmethod
    def from_packed(
        cls,
        keys_LTKH: Sequence[Tensor] | Tensor,
        values_LTKH: Sequence[Tensor] | Tensor,
        lengths: Sequence[int],
    ) -> "PrefixCache":
        """Copy the K/V of packed prefixes into one padded block per layer."""
        device, dtype = keys_LTKH[0].device, cache_dtype(keys_LTKH[0])
        starts_B1 = torch.tensor(lengths).cumsum(0)[:, None] - torch.tensor(lengths)[:, None]
        offset_P = torch.arange(max(lengths))
        inside_BP = offset_P < torch.tensor(lengths)[:, None]
        # Padding repeats row 0: finite values that the bias takes out of the softmax.
        row_BP = torch.where(inside_BP, starts_B1 + offset_P, 0).to(device)

        def padded(packed_TKH: Tensor) -> Tensor:
            rows = packed_TKH.to(dtype).index_select(0, row_BP.flatten())
            return rows.unflatten(0, row_BP.shape).transpose(1, 2).contiguous()

        return cls(
            keys=[padded(packed_TKH) for packed_TKH in keys_LTKH],
            values=[padded(packed_TKH) for packed_TKH in values_LTKH],
            lengths=tuple(lengths),
            bias_B1P=_padding_bias(lengths, _score_dtype(dtype), device),
        )

    @classmethod
    def joined(cls, parts: Sequence["PrefixCache"]) -> "PrefixCache":
        """Join the groups of all parts, in order, padded to the longest of them."""
        if len(parts) == 1:
            return parts[0]
        lengths = tuple(length for part in parts for length in part.lengths)

        def stacked(blocks: Sequence[Tensor]) -> Tensor:
            padding = [(0, 0, 0, max(lengths) - block.shape[2]) for block in blocks]
            return torch.cat([pad(block, amount) for block, amount in zip(blocks, padding, strict=True)])

        num_layers, first = len(parts[0].keys), parts[0].keys[0]
        return cls(
            keys=[stacked([part.keys[layer] for part in parts]) for layer in range(num_layers)],
            values=[stacked([part.values[layer] for part in parts]) for layer in range(num_layers)],
            lengths=lengths,
            bias_B1P=_padding_bias(lengths, _score_dtype(first.dtype), first.device),
        )

    def select(self, groups: Sequence[int]) -> "PrefixCache":
        """Only these groups, padded to the longest of them."""
        lengths = tuple(self.lengths[group] for group in groups)
        index = torch.tensor(groups, device=self.keys[0].device)
        # One layer at a time in place, so that only one layer exists twice.
        for blocks in (self.keys, self.values):
            for layer_index, block in enumerate(blocks):
                blocks[layer_index] = block[:, :, : max(lengths)].index_select(0, index)
        bias = _padding_bias(lengths, _score_dtype(self.keys[0].dtype), index.device)
        return PrefixCache(keys=self.keys, values=self.values, lengths=lengths, bias_B1P=bias)


def cache_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of cached K/V: the model's, but float32 for half precision on a CPU."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and tensor.device.type == "cpu" else tensor.dtype


def matmul_float32(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product (2-D, or 3-D batched) with a float32 result from half precision; CUDA only then."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    product = torch.mm if left.ndim == 2 else torch.bmm
    return product(left, right, out_dtype=torch.float32)


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _padding_bias(lengths: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
    if min(lengths) == max(lengths):
        return None
    outside_BP = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    return torch.zeros(outside_BP.shape, dtype=dtype).masked_fill(outside_BP, -torch.inf)[:, None].to(device)


class OwnCache:
    """K/V of the tokens that each live row generated itself; all rows have the same number of them."""

    def __init__(self, num_layers: int, *, max_tokens: int) -> None:
        """Hold at most ``max_tokens`` tokens of each row; memory is taken in blocks as they are written."""
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._max_tokens = max_tokens
        self.length = 0
        """Tokens complete in every layer."""

    def append(self, layer_index: int, k_SKH: Tensor, v_SKH: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token's K/V and return the layer's ``[S, K, length + 1, H]`` views."""
        views = []
        for blocks, new_SKH in ((self._keys, k_SKH), (self._values, v_SKH)):
            block = self._with_room(blocks[layer_index], new_SKH)
            blocks[layer_index] = block
            block[:, :, self.length] = new_SKH
            views.append(block[:, :, : self.length + 1])
        return views[0], views[1]

    def _with_room(self, block: Tensor | None, new_SKH: Tensor) -> Tensor:
        if block is not None and block.shape[2] > self.length:
            return block
        rows, heads, width = new_SKH.shape
        capacity = min(self.length + _BLOCK_TOKENS, self._max_tokens)
        grown = new_SKH.new_empty(rows, heads, capacity, width, dtype=cache_dtype(new_SKH))
        if block is not None:
            grown[:, :, : self.length] = block
        return grown

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for blocks in (self._keys, self._values):
            for layer_index, block in enumerate(blocks):
                if block is not None:
                    blocks[layer_index] = block.index_select(0, rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefixAttention:
    """Attention of one decode step: a row's group's prefix, read in place, and the row's own tokens."""

    prefix: PrefixCache
    own: OwnCache
    grid: Grid

    def __call__(self, layer_index: int, q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
        """Cache this token's K/V and attend; both softmax parts are merged by their maxima and sums."""
        k_SKRH, v_SKRH = self.own.append(layer_index, k_SKH, v_SKH)
        scaled_SNH = q_SNH.to(k_SKRH.dtype) * q_SNH.shape[-1] ** -0.5
        prefix = self._prefix_part(layer_index, scaled_SNH)
        own = _own_part(scaled_SNH, k_SKRH, v_SKRH)
        return _merge(prefix, own).to(q_SNH.dtype)

    def _prefix_part(self, layer_index: int, scaled_SNH: Tensor) -> "_SoftmaxPart":
        """Rows of one group and key/value head are one matrix, so the group's K/V are read once."""
        k_BKPH, v_BKPH = self.prefix.keys[layer_index], self.prefix.values[layer_index]
        groups, kv_heads, _, width = k_BKPH.shape
        slots, repeat = self.grid.num_slots, scaled_SNH.shape[1] // kv_heads
        cells = self.grid.scatter(scaled_SNH).view(groups, slots, kv_heads, repeat, width)
        queries = cells.transpose(1, 2).reshape(groups * kv_heads, slots * repeat, width)
        scores = matmul_float32(queries, k_BKPH.flatten(0, 1).mT)
        if self.prefix.bias_B1P is not None:
            scores.unflatten(0, (groups, kv_heads)).add_(self.prefix.bias_B1P[:, None])
        part = _softmax_part(scores, v_BKPH.flatten(0, 1))

        def rows(batched: Tensor) -> Tensor:
            split = batched.view(groups, kv_heads, slots, repeat, -1).transpose(1, 2)
            return self.grid.gather(split.reshape(groups * slots, kv_heads * repeat, -1))

        return _SoftmaxPart(maximum=rows(part.maximum), total=rows(part.total), weighted=rows(part.weighted))


@dataclass(frozen=True, kw_only=True, slots=True)
class _SoftmaxPart:
    """A softmax over some of the keys, not yet divided by its sum."""

    maximum: Tensor
    """``[..., 1]``: largest score."""
    total: Tensor
    """``[..., 1]``: sum of exp(score - maximum)."""
    weighted: Tensor
    """``[..., H]``: the same sum with each value as weight."""


def _softmax_part(scores: Tensor, values: Tensor) -> _SoftmaxPart:
    maximum = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(maximum).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    return _SoftmaxPart(
        maximum=maximum, total=total, weighted=matmul_float32(weights.to(values.dtype), values)
    )


def _own_part(scaled_SNH: Tensor, k_SKRH: Tensor, v_SKRH: Tensor) -> _SoftmaxPart:
    rows, heads, width = scaled_SNH.shape
    kv_heads = k_SKRH.shape[1]
    queries = scaled_SNH.reshape(rows * kv_heads, heads // kv_heads, width)
    part = _softmax_part(matmul_float32(queries, k_SKRH.flatten(0, 1).mT), v_SKRH.flatten(0, 1))
    return _SoftmaxPart(
        maximum=part.maximum.view(rows, heads, 1),
        total=part.total.view(rows, heads, 1),
        weighted=part.weighted.view(rows, heads, width),
    )


def _merge(first: _SoftmaxPart, second: _SoftmaxPart) -> Tensor:
    maximum = torch.maximum(first.maximum, second.maximum)
    scale_first = (first.maximum - maximum).exp_()
    scale_second = (second.maximum - maximum).exp_()
    weighted = first.weighted * scale_first + second.weighted * scale_second
    return weighted / (first.total * scale_first + second.total * scale_second)
