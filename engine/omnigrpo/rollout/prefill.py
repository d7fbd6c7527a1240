"""Prefill of groups: each prefix once, behind it what its samples have begun, and the first new token of every sample.

Legend: ``T`` packed rows, ``S`` samples that draw, ``U`` rows that they draw from, ``D`` width, ``V`` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnigrpo.rollout.group_state import LiveGroup, Sample
from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.rollout.kv_pool import KVPool
from omnigrpo.rollout.policy import PolicyModel
from omnigrpo.rollout.sampling import sample_tokens
from omnigrpo.schema import PrefixStates, SharedPrefixLayout, joined_positions
from omnigrpo_kernels.skinny_linear import wide_linear


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPrefill:
    """Groups as one packed row."""

    groups: tuple[LiveGroup, ...]
    continued: tuple[tuple[Sample, ...], ...]
    """Of each group, the samples whose begun tokens follow the prefix."""

    @classmethod
    def of_groups(cls, groups: Sequence[LiveGroup]) -> "PackedPrefill":
        """In this order."""
        continued = tuple(tuple(s for s in group.active() if s.tokens) for group in groups)
        return cls(groups=tuple(groups), continued=continued)

    @property
    def layout(self) -> SharedPrefixLayout:
        """Who attends to whom."""
        return SharedPrefixLayout(
            prefix_lengths=tuple(group.prefix_rows for group in self.groups),
            completion_lengths=tuple(tuple(len(s.tokens) for s in samples) for samples in self.continued),
        )

    def run(self, model: PolicyModel) -> PrefixStates:
        """Hidden rows, keys and values of all rows."""
        embeddings: list[Tensor] = []
        positions: list[Tensor] = []
        for group, samples in zip(self.groups, self.continued, strict=True):
            prefix = group.request.prefix
            embeddings.append(prefix.embeddings_PD)
            positions.append(prefix.inputs.positions)
            for sample in samples:
                ids = torch.tensor(sample.tokens, device=prefix.embeddings_PD.device)
                embeddings.append(model.embed_tokens(ids))
                positions.append(prefix.inputs.next_position + torch.arange(len(sample.tokens)))
        embeddings_TD = torch.cat(embeddings)
        positions_T = joined_positions(positions).to(embeddings_TD.device)
        return model.decoder.prefill(embeddings_TD, positions_T, self.layout)

    def store(self, states: PrefixStates, pool: KVPool) -> None:
        """Move keys and values to blocks of their owners."""
        start = 0
        for group, samples in zip(self.groups, self.continued, strict=True):
            owners = [(group.prefix_blocks, group.prefix_rows), *((s.blocks, len(s.tokens)) for s in samples)]
            for blocks, length in owners:
                blocks.extend(pool.take(length))
                block_ids = torch.tensor(blocks, device=states.hidden_TD.device)
                rows = slice(start, start + length)
                for layer, (keys, values) in enumerate(zip(states.keys, states.values, strict=True)):
                    pool.write(layer, block_ids, keys[rows], values[rows])
                start += length

    def predictors(self) -> tuple[list[int], list[int]]:
        """Packed rows that predict a new token, and of each sample that draws which of them is its own.

        Fresh samples of a group share the last row of its prefix; others have the row of their last token.
        """
        rows_U: list[int] = []
        row_S: list[int] = []
        start = 0
        for group in self.groups:
            last_prefix_row = start + group.prefix_rows - 1
            start += group.prefix_rows
            shared: int | None = None
            for sample in group.active():
                if not sample.tokens and shared is None:
                    shared = len(rows_U)
                    rows_U.append(last_prefix_row)
                if sample.tokens:
                    start += len(sample.tokens)
                    row_S.append(len(rows_U))
                    rows_U.append(start - 1)
                else:
                    assert shared is not None
                    row_S.append(shared)
        return rows_U, row_S


def prefill(
    model: PolicyModel, pool: KVPool, groups: Sequence[LiveGroup], sampling: SamplingParams
) -> tuple[Tensor, Tensor]:
    """Run and store the groups, and draw one token of every sample, in order: ``token_S, logprob_S``."""
    packed = PackedPrefill.of_groups(groups)
    states = packed.run(model)
    packed.store(states, pool)
    rows_U, row_S = packed.predictors()
    device = states.hidden_TD.device
    logits_UV = wide_linear(states.hidden_TD[torch.tensor(rows_U, device=device)], model.head_weight_VD)
    samples = [sample for group in groups for sample in group.active()]
    seed_S = torch.tensor([sample.seed for sample in samples], device=device)
    index_S = torch.tensor([len(sample.tokens) for sample in samples], device=device)
    logits_SV = logits_UV[torch.tensor(row_S, device=device)]
    return sample_tokens(logits_SV, sampling, seed_S, index_S)
