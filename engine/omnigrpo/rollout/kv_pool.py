"""Paged memory of keys and values: prefixes and rows take blocks of it and give them back.

Legend: ``X`` blocks, ``n`` blocks of one run of tokens, ``T`` tokens, ``K`` key/value heads, ``H`` head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from omnigrpo_kernels.decode_attention import BLOCK_TOKENS

DUMP_BLOCK = 0
"""Nobody's: rows that only fill up a captured batch write there."""
_FIRST_BLOCKS = 64


class KVPool:
    """Blocks of every layer's keys ``[X, K, H, 32]`` and values ``[X, K, 32, H]``, in the decoder's dtype.

    A block has the same number in all layers. The pool grows to twice its size when it is empty, which moves it.
    """

    def __init__(
        self, *, num_layers: int, num_kv_heads: int, head_width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        key_shape = (_FIRST_BLOCKS, num_kv_heads, head_width, BLOCK_TOKENS)
        value_shape = (_FIRST_BLOCKS, num_kv_heads, BLOCK_TOKENS, head_width)
        self.keys = [torch.empty(key_shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.empty(value_shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.generation = 0
        """Goes up whenever the pool moves."""
        self._num_blocks = _FIRST_BLOCKS
        self._free = [block for block in range(_FIRST_BLOCKS) if block != DUMP_BLOCK]

    @property
    def num_blocks(self) -> int:
        """Blocks in memory, taken or not."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be taken before the pool grows."""
        return len(self._free)

    def take(self, num_tokens: int) -> list[int]:
        """Blocks for so many tokens."""
        count = blocks_for(num_tokens)
        while count > len(self._free):
            self._grow()
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: Sequence[int]) -> None:
        """Let others take these blocks."""
        self._free.extend(blocks)

    def write(self, layer_index: int, blocks: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> None:
        """Fill blocks (int64 ``[n]``) with consecutive tokens, from the first block's first place on."""
        rows = len(blocks) * BLOCK_TOKENS
        for pool, tokens_TKH, order in (
            (self.keys[layer_index], k_TKH, (0, 2, 3, 1)),
            (self.values[layer_index], v_TKH, (0, 2, 1, 3)),
        ):
            whole = tokens_TKH.new_zeros(rows, *tokens_TKH.shape[1:])
            whole[: len(tokens_TKH)] = tokens_TKH
            pool[blocks] = whole.unflatten(0, (-1, BLOCK_TOKENS)).permute(order)

    def _grow(self) -> None:
        before = self.num_blocks
        self.generation += 1  # First: a graph must not touch what a failed attempt has moved.
        for layers in (self.keys, self.values):
            # One layer at a time in place, so that only one layer exists twice.
            for layer_index, pool in enumerate(layers):
                if len(pool) > before:
                    continue  # Grown by an attempt that ran out of memory on the way.
                grown = pool.new_empty(2 * before, *pool.shape[1:])
                grown[:before] = pool
                layers[layer_index] = grown
        self._free.extend(range(before, 2 * before))
        self._num_blocks = 2 * before


def blocks_for(num_tokens: int) -> int:
    """Blocks that so many tokens fill."""
    return -(-num_tokens // BLOCK_TOKENS)
