"""Groups larger than the row budget: the prefix once, its completions in micro-batches (arXiv:2606.01143).

    forward   prefix, with its graph
    forward   micro-batch 1, over the prefix's keys, values and last hidden state          backward, into leaves
    ...
    forward   micro-batch m, over the same states, this time with their graph              backward, through the prefix

Every micro-batch but the last reads the states as leaves, which add up its gradients; the last one's backward takes
them along into the prefix. So the prefix passes once in each direction, and what is alive at once is its activations
and those of one micro-batch, however large the group.
"""

from collections.abc import Iterator
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from omnigrpo.algorithm.policy import (
    CompletionRows,
    PolicyModel,
    completion_rows,
    rows_logprobs,
    select_rows,
)
from omnigrpo.schema import PackedGroups, PrefixStates
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def completion_passes(model: PolicyModel, pack: PackedGroups, budget_rows: int) -> Iterator[CompletionRows]:
    """Run the decoder on a pack: in one pass within the budget, else a prefix and its completions in micro-batches.

    The rows of all items make up those of ``completion_rows``. With gradients, call backward on what comes of an item
    before taking the next one: the last item's backward goes on through the prefix. Losses that are sums over
    completions, their denominators known beforehand, then leave the gradients of one pass.
    """
    if pack.num_rows <= budget_rows:
        yield completion_rows(model, pack)
        return
    prefix = _prefill(model, pack)
    collecting = _leaves(prefix)
    *parts, last = micro_batches(pack.layout, budget_rows)
    for tokens, lengths in parts:
        yield _micro_batch_rows(model, pack, collecting, tokens, lengths)
    _join_gradients(prefix, collecting)
    yield _micro_batch_rows(model, pack, prefix, *last)


@torch.no_grad()
def frozen_logprobs(
    model: PolicyModel, pack: PackedGroups, budget_rows: int, *, temperature: float
) -> Tensor:
    """Log-prob of every completion token ``[C]`` under a model that is not trained, over the same passes."""
    parts = [
        rows_logprobs(model, rows, temperature=temperature).logprob_T
        for rows in completion_passes(model, pack, budget_rows)
    ]
    return torch.cat(parts)


def micro_batches(layout: SharedPrefixLayout, budget_rows: int) -> list[tuple[slice, tuple[int, ...]]]:
    """Runs of whole completions of a layout of one group, in order: their tokens, and their lengths.

    Prefix and completions of a run are at most ``budget_rows`` rows: the prefix counts in each, because its
    activations stay until its backward. Raises ValueError where the prefix and one completion exceed the budget.
    """
    (prefix,), (lengths,) = layout.prefix_lengths, layout.completion_lengths
    if prefix + max(lengths) > budget_rows:
        raise ValueError(
            f"a prefix of {prefix} rows and a completion of {max(lengths)} exceed the budget of {budget_rows} rows"
        )
    runs: list[list[int]] = [[]]
    for length in lengths:
        if prefix + sum(runs[-1]) + length > budget_rows:
            runs.append([])
        runs[-1].append(length)
    ends = list(accumulate((sum(run) for run in runs), initial=0))
    return [(slice(*ends[at : at + 2]), tuple(run)) for at, run in enumerate(runs)]


def _prefill(model: PolicyModel, pack: PackedGroups) -> PrefixStates:
    embeddings_PD = model.embed_prefixes(pack.inputs)
    positions_P = pack.positions_T[..., pack.prefix_rows].to(embeddings_PD.device)
    layout = SharedPrefixLayout(prefix_lengths=pack.layout.prefix_lengths, completion_lengths=((),))
    return model.decoder.prefill(embeddings_PD, positions_P, layout)


def _micro_batch_rows(
    model: PolicyModel,
    pack: PackedGroups,
    prefix: PrefixStates,
    tokens: slice,
    lengths: tuple[int, ...],
) -> CompletionRows:
    rows_C = pack.completion_rows_C[tokens]
    device = model.head_weight_VD.device
    hidden_CD = model.decoder.extend(
        prefix,
        model.embed_tokens(pack.completion_ids_C[tokens].to(device)),
        pack.positions_T[..., rows_C].to(device),
        lengths,
    )
    # The last prefix row first, then the completions' rows: the row before a token's own, or that one.
    predictor_rows_C = (pack.predictor_rows_C[tokens] - (rows_C[:1] - 1)).clamp(min=0)
    return select_rows(torch.cat([prefix.hidden_TD[-1:], hidden_CD]), pack, tokens, predictor_rows_C)


def _leaves(states: PrefixStates) -> PrefixStates:
    """The same values as leaves; without gradients they are as good as the states themselves."""
    return PrefixStates(
        hidden_TD=_leaf(states.hidden_TD),
        keys=tuple(_leaf(k_PKH) for k_PKH in states.keys),
        values=tuple(_leaf(v_PKH) for v_PKH in states.values),
    )


def _leaf(tensor: Tensor) -> Tensor:
    leaf = tensor.detach().requires_grad_(tensor.requires_grad)
    if leaf.requires_grad:
        leaf.grad_dtype = torch.promote_types(leaf.dtype, torch.float32)
    return leaf


def _join_gradients(states: PrefixStates, leaves: PrefixStates) -> None:
    """Let the backward through the states take along what the leaves have collected."""
    own = (states.hidden_TD, *states.keys, *states.values)
    for state, leaf in zip(own, (leaves.hidden_TD, *leaves.keys, *leaves.values), strict=True):
        if leaf.grad is not None:
            state.register_hook(partial(_add, leaf.grad))


def _add(collected: Tensor, grad: Tensor) -> Tensor:
    return (collected + grad).to(grad.dtype)
