"""Puts groups into packed rows: each prefix once, then its completions, no padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from omnigrpo.schema import Group, PackedGroups, joined_positions
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def group_rows(group: Group) -> int:
    """Packed rows that a group takes: its prefix and all of its completions."""
    return len(group.inputs.token_ids_P) + sum(len(c.token_ids) for c in group.completions)


def split_by_budget(groups: Sequence[Group], budget_rows: int) -> list[list[Group]]:
    """Cut groups, in order, into runs of at most ``budget_rows`` packed rows each.

    A group that alone exceeds the budget is a run of its own; its completions pass in parts
    (``algorithm.split_group``).
    Raises ValueError where even a prefix with one of its completions exceeds it.
    """
    runs: list[list[Group]] = []
    filled = budget_rows
    for group in groups:
        rows = group_rows(group)
        if filled + rows > budget_rows:
            runs.append([])
            filled = 0
        _check_fits(group, budget_rows)
        runs[-1].append(group)
        filled += rows
    return runs


def _check_fits(group: Group, budget_rows: int) -> None:
    prefix = len(group.inputs.token_ids_P)
    longest = max((len(c.token_ids) for c in group.completions), default=0)
    if prefix + longest > budget_rows:
        raise ValueError(
            f"prompt {group.inputs.prompt.prompt_id!r} has a prefix of {prefix} rows and a completion of {longest}, "
            f"but trainer.budget_rows is {budget_rows}: raise it to {prefix + longest} at least, or shorten them"
        )


def pack(groups: Sequence[Group]) -> PackedGroups:
    """Lay groups out in one packed row, in the order given; index tensors are on the CPU."""
    if not groups:
        raise ValueError("pack needs at least one group, got none")
    layout = SharedPrefixLayout(
        prefix_lengths=tuple(len(g.inputs.token_ids_P) for g in groups),
        completion_lengths=tuple(tuple(len(c.token_ids) for c in g.completions) for g in groups),
    )
    completions = [c for g in groups for c in g.completions]
    prefix_lengths, prefix_starts = torch.tensor(layout.prefix_lengths), torch.tensor(layout.group_starts)
    lengths_S, starts_S = (
        torch.tensor([n for lengths in nested for n in lengths], dtype=torch.int64)
        for nested in (layout.completion_lengths, layout.completion_starts)
    )
    group_S = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g.completions) for g in groups]))

    prefix_rows = _ranges(prefix_starts, prefix_lengths)
    completion_rows_C = _ranges(starts_S, lengths_S)
    sequence_C = torch.arange(len(completions)).repeat_interleave(lengths_S)
    within_C = completion_rows_C - starts_S[sequence_C]
    last_prefix_row_C = (prefix_starts + prefix_lengths - 1)[group_S[sequence_C]]
    first_position_C = torch.tensor([g.inputs.next_position for g in groups])[group_S[sequence_C]]

    positions = joined_positions([*(g.inputs.positions for g in groups), first_position_C + within_C])
    positions_T = torch.empty_like(positions)
    positions_T[..., torch.cat([prefix_rows, completion_rows_C])] = positions
    return PackedGroups(
        layout=layout,
        inputs=tuple(g.inputs for g in groups),
        positions_T=positions_T,
        prefix_rows=prefix_rows,
        completion_rows_C=completion_rows_C,
        completion_ids_C=_joined([c.token_ids for c in completions], torch.int64),
        predictor_rows_C=torch.where(within_C == 0, last_prefix_row_C, completion_rows_C - 1),
        sequence_C=sequence_C,
        rollout_logprob_C=_joined([c.logprobs for c in completions], torch.float32),
    )


def _joined(parts: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    """All elements as one vector."""
    return torch.cat([torch.empty(0, dtype=dtype), *(torch.tensor(part, dtype=dtype) for part in parts)])


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenate ``start .. start + length - 1`` of every segment."""
    offsets = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + offsets
