"""The rows of a decode step on their device, and the step itself.

Legend: ``S`` rows, ``B`` groups, ``P`` blocks of the longest prefix, ``R`` blocks of the longest row, ``V`` vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.rollout.kv_pool import DUMP_BLOCK, KVPool
from omnigrpo.rollout.policy import PolicyModel
from omnigrpo.rollout.sampling import sample_tokens
from omnigrpo_kernels.decode_attention import DecodeLayout, decode_attention
from omnigrpo_kernels.skinny_linear import wide_linear


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeRows:
    """What a step reads of each row, int64; `step` moves token and index on, in place."""

    token_S: Tensor
    """The last token, which the step feeds."""
    index_S: Tensor
    """Index of the token that the step draws; so many own tokens are cached when it has fed the last one."""
    advance_S: Tensor
    """1, or 0 for a row that only fills up the batch."""
    seed_S: Tensor
    first_position_S: Tensor
    """Position of the row's first own token."""
    groups_S: Tensor
    """Row of the prefix tables."""
    prefix_blocks_BP: Tensor
    prefix_lengths_B: Tensor
    own_blocks_SR: Tensor

    def padded(self, *, rows: int, groups: int, prefix_blocks: int, own_blocks: int) -> "DecodeRows":
        """The same beside rows that draw for nobody, in tensors of these sizes."""

        def grown(tensor: Tensor, value: int, *sizes: int) -> Tensor:
            whole = tensor.new_full(sizes, value)
            whole[tuple(slice(size) for size in tensor.shape)] = tensor
            return whole

        return DecodeRows(
            token_S=grown(self.token_S, 0, rows),
            index_S=grown(self.index_S, 1, rows),
            advance_S=grown(self.advance_S, 0, rows),
            seed_S=grown(self.seed_S, 0, rows),
            first_position_S=grown(self.first_position_S, 0, rows),
            groups_S=grown(self.groups_S, groups - 1, rows),
            prefix_blocks_BP=grown(self.prefix_blocks_BP, DUMP_BLOCK, groups, prefix_blocks),
            prefix_lengths_B=grown(self.prefix_lengths_B, 0, groups),
            own_blocks_SR=grown(self.own_blocks_SR, DUMP_BLOCK, rows, own_blocks),
        )

    def copy_(self, other: "DecodeRows") -> None:
        """Take over the values of rows of the same sizes."""
        for field in fields(self):
            getattr(self, field.name).copy_(getattr(other, field.name))

    def step(self, model: PolicyModel, pool: KVPool, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
        """Feed each row its last token and draw the next one: ``token_S, logprob_S``. Nothing waits for the device."""
        layout = DecodeLayout(
            groups_S=self.groups_S,
            prefix_blocks_BP=self.prefix_blocks_BP,
            prefix_lengths_B=self.prefix_lengths_B,
            own_blocks_SR=self.own_blocks_SR,
            own_lengths_S=self.index_S,
        )

        def attend(layer_index: int, q_SNH: Tensor, k_SKH: Tensor, v_SKH: Tensor) -> Tensor:
            keys, values = pool.keys[layer_index], pool.values[layer_index]
            return decode_attention(q_SNH, k_SKH, v_SKH, keys, values, layout, scale=q_SNH.shape[-1] ** -0.5)

        position_S = self.first_position_S + self.index_S - 1
        hidden_SD = model.decoder.decode(model.embed_tokens(self.token_S), position_S, attend)
        logits_SV = wide_linear(hidden_SD, model.head_weight_VD)
        token_S, logprob_S = sample_tokens(logits_SV, sampling, self.seed_S, self.index_S)
        self.token_S.copy_(token_S)
        self.index_S.add_(self.advance_S)
        return token_S, logprob_S


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 ``[n]``, without waiting for a GPU."""
    tensor = torch.tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Lists of blocks, int64, as wide as the longest and at least 1; what is beyond a list is the dump block."""
    width = max(1, *(len(row) for row in rows))
    flat = [block for row in rows for block in (*row, *((DUMP_BLOCK,) * (width - len(row))))]
    return to_device(flat, device).view(len(rows), width)
