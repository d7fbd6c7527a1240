"""How a packed row of groups is cut into tiles of attention: lists of work for kernels that know ranges, not masks.

Legend: ``T`` packed rows (those of keys and values), ``N`` query heads, ``K`` key/value heads. Rows are packed rows;
a row of q is a packed row less its tile's ``shift``, the prefix rows before it that q does not have.

A region is what one tile may cover: the prefix of a group, or all of its completions. The longest work comes first,
so that the last programs to run are short. All lists are functions of the lengths alone, built from a few numbers per
segment and without a loop over tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

MIN_BLOCKS = 16
"""A part of a tile's query blocks is at least this many: shorter ones cost more in partial sums than they spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyTiles:
    """Work of kernels that keep keys and stream queries, in parts where a tile has many queries."""

    table: Tensor
    """int32 ``[parts, 12]``: key, key_end, shift, full, full_end, causal, causal_end, block, block_end, masked,
    masked_end, slot. The tile's keys are [key, key_end). Queries of [full, full_end) see all of them, those of
    [causal, causal_end) the ones in their own segment up to themselves. The part takes so many of the blocks that
    all heads' whole blocks of the first range make, head after head, and of those of the rest; its sums go to
    ``slot``, or where -1 they are the result."""
    sums: Tensor
    """int32 ``[split tiles, 4]``: key, key_end, first slot, slots."""
    num_slots: int
    """Partial sums of a tile, for each of K."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segments:
    """Where groups and segments lie; int64 on the CPU."""

    start: Tensor
    """``[groups]``: first prefix row."""
    prefix_end: Tensor
    """``[groups]``: first row of completions."""
    end: Tensor
    """``[groups]``."""
    shift: Tensor
    """``[groups]``: what a completion's row of k and v is above its row of q."""
    first_T: Tensor
    """Where the segment of each row begins."""
    end_T: Tensor
    """Where it ends."""
    past_T: Tensor
    """The row after the last one that sees the row: its segment's end, or of a prefix row its group's."""


def find_segments(layout: SharedPrefixLayout) -> Segments:
    """From lengths to rows."""
    prefix = torch.tensor(layout.prefix_lengths, device="cpu")
    group = torch.tensor(layout.group_lengths, device="cpu")
    end = group.cumsum(0)
    groups = zip(layout.prefix_lengths, layout.completion_lengths, strict=True)
    lengths = torch.tensor([length for first, rest in groups for length in (first, *rest)], device="cpu")
    ends = lengths.cumsum(0)
    first_T, end_T = (ends - lengths).repeat_interleave(lengths), ends.repeat_interleave(lengths)
    group_end_T, prefix_end_T = end.repeat_interleave(group), (end - group + prefix).repeat_interleave(group)
    return Segments(
        start=end - group,
        prefix_end=end - group + prefix,
        end=end,
        shift=torch.zeros_like(prefix) if layout.prefix_queries else prefix.cumsum(0),
        first_T=first_T,
        end_T=end_T,
        past_T=torch.where(end_T == prefix_end_T, group_end_T, end_T),
    )


def query_tiles(layout: SharedPrefixLayout, segments: Segments, *, heads_per_kv: int, rows: int) -> Tensor:
    """Work of kernels that keep queries and stream keys, in tiles of ``rows`` pairs of a row and a head.

    Of a row all ``heads_per_kv`` heads come in turn: they share keys, and together they fill tiles.

    Returns:
        int32 ``[tiles, 9]``: region, region_rows, offset, shift, prefix, prefix_length, own, own_full, own_end.
        The region begins at that row and has so many pairs; the tile's begin at ``offset``. All of the tile's rows
        see the ``prefix_length`` rows from ``prefix`` on, and [own, own_full); of [own, own_end) each sees its
        segment up to itself.
    """
    prefix_length = segments.prefix_end - segments.start
    region = torch.cat([segments.start, segments.prefix_end])
    region_end = torch.cat([segments.prefix_end if layout.prefix_queries else segments.start, segments.end])
    seen = torch.cat([torch.zeros_like(prefix_length), prefix_length])
    region_rows = (region_end - region) * heads_per_kv
    tile, part = _repeat(_blocks(region_rows, rows))
    offset = part * rows
    region, region_rows, seen = region[tile], region_rows[tile], seen[tile]
    first = region + offset // heads_per_kv
    last = region + ((offset + rows).minimum(region_rows) - 1) // heads_per_kv
    own = segments.first_T[first]
    own_full = torch.where(segments.first_T[last] == own, first + 1, own)
    table = torch.stack(
        [
            region,
            region_rows,
            offset,
            segments.shift.repeat(2)[tile],
            segments.start.repeat(2)[tile],
            seen,
            own,
            own_full,
            last + 1,
        ],
        dim=1,
    )
    return _longest_first(table, seen + last - own)


def key_tiles(
    layout: SharedPrefixLayout,
    segments: Segments,
    *,
    heads_per_kv: int,
    num_kv_heads: int,
    rows: int,
    block: int,
    num_parts: int,
) -> KeyTiles:
    """Tiles of ``rows`` keys, cut so that all parts times ``num_kv_heads`` are about ``num_parts`` of equal work.

    A part goes through whole blocks of ``block`` queries of one head.
    """
    ranges = _key_ranges(layout, segments, rows, block)
    key, key_end, _, full, full_end, causal, causal_end = ranges
    whole = (full_end - full) // block * heads_per_kv
    tail = ((full_end - full) % block != 0).long()
    masked = (tail + (causal_end - causal) // block) * heads_per_kv
    work = whole + masked
    most = max(MIN_BLOCKS, -(-int(work.sum()) * num_kv_heads // num_parts))
    parts = _blocks(work, most).clamp_min(1)
    split = parts > 1
    first_slot = torch.where(split, parts, 0).cumsum(0) - parts

    tile, part = _repeat(parts)
    begins, ends = (
        [blocks[tile] * (part + step) // parts[tile] for blocks in (whole, masked)] for step in (0, 1)
    )
    slot = torch.where(split[tile], first_slot[tile] + part, -1)
    columns = [column[tile] for column in ranges]
    table = torch.stack([*columns, begins[0], ends[0], begins[1], ends[1], slot], dim=1)
    return KeyTiles(
        table=_longest_first(table, ends[0] - begins[0] + ends[1] - begins[1]),
        sums=torch.stack([key, key_end, first_slot, parts], dim=1)[split].to(torch.int32),
        num_slots=int(parts[split].sum()),
    )


def _key_ranges(layout: SharedPrefixLayout, segments: Segments, rows: int, block: int) -> tuple[Tensor, ...]:
    """The first seven columns of `KeyTiles.table`, a tile each."""
    region = torch.cat([segments.start, segments.prefix_end])
    region_end = torch.cat([segments.prefix_end, segments.end])
    tile, part = _repeat(_blocks(region_end - region, rows))
    key = region[tile] + part * rows
    key_end = (key + rows).minimum(region_end[tile])
    in_prefix, group = tile < layout.num_groups, tile % layout.num_groups
    last_end = segments.end_T[key_end - 1]
    straddles = segments.first_T[key] != segments.first_T[key_end - 1]
    # Whole blocks across the diagonal: what they hold beyond it is masked like the rest of them.
    causal_end = key + _blocks(torch.where(straddles, last_end, key_end) - key, block) * block
    full_end = torch.where(in_prefix, segments.end[group], last_end)
    full, causal = causal_end.minimum(full_end), key
    if not layout.prefix_queries:
        first = segments.prefix_end[group]
        full, causal, causal_end = (
            torch.where(in_prefix, first, column) for column in (full, causal, causal_end)
        )
    return key, key_end, segments.shift[group], full, full_end, causal, causal_end


def _blocks(length: Tensor, size: int) -> Tensor:
    return (length + size - 1) // size


def _repeat(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each index ``counts`` times, and which of those times it is."""
    index = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    return index, torch.arange(len(index), device=counts.device) - (counts.cumsum(0) - counts)[index]


def _longest_first(table: Tensor, work: Tensor) -> Tensor:
    return table[work.argsort(descending=True, stable=True)].to(torch.int32).contiguous()
