"""Attention of a decode step: one new token per row, over its group's prefix and over its own tokens, both paged.

Legend: ``S`` rows, ``N`` query heads, ``K`` key/value heads, ``H`` head width, ``B`` groups, ``P`` blocks of the
longest prefix, ``R`` blocks of the longest row, ``X`` blocks of the pool.

    o_s = sum_t softmax_t(scale * q_s . k_t) v_t    over t in its group's prefix, then its own tokens

Keys and values lie in blocks of BLOCK_TOKENS tokens: keys ``[X, K, H, 32]`` with tokens innermost, as scores are
summed, values ``[X, K, 32, H]``. A prefix has its blocks once, whatever its rows; the CPU kernel passes over 256 of its
tokens for all rows of a group before it goes on, so that they come from memory once. The softmax is float32 (float64).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from omnigrpo_kernels import decode_attention_cuda, extension

BLOCK_TOKENS = 32
"""Tokens of a block of cached keys and values."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeLayout:
    """Which blocks each row reads; int64, contiguous, on the pool's device."""

    groups_S: Tensor
    """Row of the prefix tables; rows of one group should be neighbours."""
    prefix_blocks_BP: Tensor
    prefix_lengths_B: Tensor
    """Tokens; 0 for none."""
    own_blocks_SR: Tensor
    """The last of a row's blocks takes the new token."""
    own_lengths_S: Tensor
    """Tokens, the new one included; at least 1."""


def decode_attention_reference(
    q_SNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: DecodeLayout,
    *,
    scale: float,
) -> Tensor:
    """The same row by row in plain PyTorch."""
    wide = torch.promote_types(q_SNH.dtype, torch.float32)
    outputs = []
    for row in range(len(q_SNH)):
        group, own = int(layout.groups_S[row]), int(layout.own_lengths_S[row])
        block = layout.own_blocks_SR[row, (own - 1) // BLOCK_TOKENS]
        keys[block, :, :, (own - 1) % BLOCK_TOKENS] = k_SKH[row]
        values[block, :, (own - 1) % BLOCK_TOKENS] = v_SKH[row]
        parts = (
            (layout.prefix_blocks_BP[group], int(layout.prefix_lengths_B[group])),
            (layout.own_blocks_SR[row], own),
        )
        blocks = [(ids[: -(-length // BLOCK_TOKENS)], length) for ids, length in parts]
        k_KHT = torch.cat(
            [keys[ids].permute(1, 2, 0, 3).flatten(2)[..., :length] for ids, length in blocks], dim=2
        )
        v_KTH = torch.cat(
            [values[ids].transpose(0, 1).flatten(1, 2)[:, :length] for ids, length in blocks], dim=1
        )
        q_KJH = q_SNH[row].unflatten(0, (k_KHT.shape[0], -1))
        weights_KJT = (q_KJH.to(wide) @ k_KHT.to(wide) * scale).softmax(dim=-1)
        outputs.append((weights_KJT @ v_KTH.to(wide)).flatten(0, 1).to(q_SNH.dtype))
    return torch.stack(outputs)


def decode_attention(
    q_SNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: DecodeLayout,
    *,
    scale: float,
) -> Tensor:
    """Write each row's new key and value into its last block, and attend; ``[S, N, H]`` in the dtype of q.

    bfloat16, float32 or float64 on the CPU, with C++; bfloat16, float16 or float32 on CUDA, with Triton. q, k, v and
    the pools have one dtype, and the pools are contiguous. On the CPU a length or block outside the tables or the pool
    raises RuntimeError; on CUDA nothing waits for the device, and nothing is checked.
    """
    extension.load()
    return torch.ops.omnigrpo.decode_attention(
        q_SNH.contiguous(),
        k_SKH.contiguous(),
        v_SKH.contiguous(),
        keys,
        values,
        layout.groups_S,
        layout.prefix_blocks_BP,
        layout.prefix_lengths_B,
        layout.own_blocks_SR,
        layout.own_lengths_S,
        scale,
    )


extension.load()
torch.library.register_kernel(
    "omnigrpo::decode_attention", "cuda", decode_attention_cuda.decode_attention_cuda
)


@torch.library.register_fake("omnigrpo::decode_attention")
def _decode_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    groups: Tensor,
    prefix_blocks: Tensor,
    prefix_lengths: Tensor,
    own_blocks: Tensor,
    own_lengths: Tensor,
    scale: float,
) -> Tensor:
    return torch.empty_like(q)
