"""Puts groups into packed rows: each prefix once, then its completions, no padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from omnigrpo.schema import Group, PackedGroups
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def group_rows(group: Group) -> int:
    """Packed rows that a group takes: its prefix and all of its completions."""
    return len(group.inputs.token_ids_P) + sum(len(c.token_ids) for c in group.completions)


def split_by_budget(groups: Sequence[Group], budget_rows: int) -> list[list[Group]]:
    """Cut groups, in order, into runs of at most ``budget_rows`` packed rows each.

    A group stays whole; one that alone exceeds the budget raises ValueError.
    """
    runs: list[list[Group]] = []
    filled = budget_rows
    for group in groups:
        rows = group_rows(group)
        if rows > budget_rows:
            raise ValueError(
                f"the group of prompt {group.inputs.prompt.prompt_id!r} needs {rows} packed rows, but "
                f"trainer.budget_rows is {budget_rows}: raise it, or lower rollout.samples or rollout.max_new_tokens"
            )
        if filled + rows > budget_rows:
            runs.append([])
            filled = 0
        runs[-1].append(group)
        filled += rows
    return runs


def pack(groups: Sequence[Group]) -> PackedGroups:
    """Lay groups out in one packed row, in the order given; index tensors are on the CPU."""
    if not groups:
        raise ValueError("pack needs at least one group, got none")
    prefix_lengths = torch.tensor([len(g.inputs.token_ids_P) for g in groups])
    samples = torch.tensor([len(g.completions) for g in groups])
    completions = [c for g in groups for c in g.completions]
    lengths_S = torch.tensor([len(c.token_ids) for c in completions], dtype=torch.int64)
    group_S = torch.arange(len(groups)).repeat_interleave(samples)

    completion_starts_S = _starts(lengths_S) + prefix_lengths.cumsum(0)[group_S]
    group_sizes = prefix_lengths + torch.zeros_like(prefix_lengths).index_add(0, group_S, lengths_S)
    prefix_starts = _starts(group_sizes)

    completion_rows_C = _ranges(completion_starts_S, lengths_S)
    sequence_C = torch.arange(len(completions)).repeat_interleave(lengths_S)
    within_C = completion_rows_C - completion_starts_S[sequence_C]
    last_prefix_row_C = (prefix_starts + prefix_lengths - 1)[group_S[sequence_C]]
    prefix_rows = _ranges(prefix_starts, prefix_lengths)

    positions_T = torch.empty(int(group_sizes.sum()), dtype=torch.int64)
    positions_T[prefix_rows] = _ranges(torch.zeros_like(prefix_lengths), prefix_lengths)
    positions_T[completion_rows_C] = within_C + prefix_lengths[group_S[sequence_C]]

    return PackedGroups(
        layout=SharedPrefixLayout(
            prefix_lengths=tuple(prefix_lengths.tolist()),
            completion_lengths=tuple(tuple(len(c.token_ids) for c in g.completions) for g in groups),
        ),
        inputs=tuple(g.inputs for g in groups),
        positions_T=positions_T,
        prefix_rows=prefix_rows,
        completion_rows_C=completion_rows_C,
        completion_ids_C=torch.tensor([t for c in completions for t in c.token_ids], dtype=torch.int64),
        predictor_rows_C=torch.where(within_C == 0, last_prefix_row_C, completion_rows_C - 1),
        sequence_C=sequence_C,
        rollout_logprob_C=torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float32),
    )


def _starts(lengths: Tensor) -> Tensor:
    """Exclusive prefix sum."""
    return lengths.cumsum(0) - lengths


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenate ``start .. start + length - 1`` of every segment."""
    offsets = torch.arange(int(lengths.sum())) - _starts(lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + offsets
