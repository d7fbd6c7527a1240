"""Cuts the tokens of a head into chunks whose exponentials fit a byte budget."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from omnigrpo_kernels.vocabulary_head import TokenPairs, pairs_to, token_pairs

CHUNK_BYTES = {"cpu": 160 << 20, "cuda": 900 << 20}
"""Exponentials of one chunk, in the inputs' dtype. Fewer chunks read the weight and its gradient less often."""
WHOLE_BYTES = {"cpu": 32 << 20, "cuda": 900 << 20}
"""A pass whose exponentials take more is cut in two at least, so that they never exist for all rows."""
FORWARD_ROWS = 8192
"""Rows of a chunk whose exponentials are not kept: what is left are a few numbers per row and run of columns."""
ROWS_MULTIPLE = {"cpu": 32, "cuda": 128}
"""Rows of a chunk are a multiple of it, where there are as many: whole panels and tiles of the kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenChunk:
    """Tokens that go through the vocabulary together."""

    tokens: slice
    """Their range."""
    hidden_TD: Tensor
    """``[T, D]``: the rows that predict them, each once, contiguous."""
    pairs: TokenPairs
    """Which of these rows predicts which token."""
    rows_T: Tensor | slice
    """Where the rows stand among all R."""

    def add_to(self, grad_RD: Tensor, grad_TD: Tensor) -> None:
        """Add the rows' gradients to those of all rows."""
        if isinstance(self.rows_T, slice):
            grad_RD[self.rows_T] += grad_TD
        else:
            grad_RD.index_add_(0, self.rows_T, grad_TD)  # Each row comes once, so no order matters.


def token_chunks(
    hidden_RD: Tensor,
    weight_VD: Tensor,
    targets_C: Tensor,
    rows_C: Tensor | None,
    keep_whole_C: Tensor | None = None,
    *,
    keep: bool = True,
) -> Iterator[TokenChunk]:
    """Chunks in token order, each built when it is asked for; a row that predicts tokens of two chunks is in both.

    ``keep_whole_C`` (int64 ``[C]``) names a sequence per token that no chunk may cut; each sequence's tokens must be
    neighbours, and a chunk grows to hold a sequence that is longer than the budget. Without ``keep`` the exponentials
    are not kept, and the budget does not bind.
    """
    num_tokens = len(targets_C)
    budget = hidden_RD.device.type if hidden_RD.device.type in CHUNK_BYTES else "cpu"
    multiple = ROWS_MULTIPLE[budget]
    row_bytes = weight_VD.shape[0] * hidden_RD.element_size()
    limit = max(1, CHUNK_BYTES[budget] // row_bytes) if keep else FORWARD_ROWS
    if keep and num_tokens * row_bytes > WHOLE_BYTES[budget]:
        limit = min(limit, _round_up(-(-num_tokens // 2), multiple))
    if keep_whole_C is None:
        ends = _even_ends(num_tokens, limit, multiple)
    else:
        ends = _sequence_ends(keep_whole_C.cpu(), limit)
    for start, end in pairwise([0, *ends]):
        yield _chunk(hidden_RD, targets_C, rows_C, slice(start, end))


def _even_ends(num_tokens: int, limit: int, multiple: int) -> list[int]:
    """Ends of chunks of equal size."""
    if num_tokens == 0:
        return []
    chunks = -(-num_tokens // limit)
    size = -(-num_tokens // chunks)
    if size > multiple:
        size = min(_round_up(size, multiple), max(limit, multiple))
    return [min(start + size, num_tokens) for start in range(0, num_tokens, size)]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _sequence_ends(sequence_C: Tensor, limit: int) -> list[int]:
    """Ends of chunks that each hold as many whole sequences as fit the limit, and at least one."""
    ids, lengths = torch.unique_consecutive(sequence_C, return_counts=True)
    if len(ids.unique()) != len(ids):
        raise ValueError("the tokens of a sequence must be neighbours, but some sequence comes in two places")
    ends: list[int] = []
    start = end = 0
    for length in lengths.tolist():
        if end > start and end + length - start > limit:
            ends.append(end)
            start = end
        end += length
    return [*ends, end] if end else []


def _chunk(hidden_RD: Tensor, targets_C: Tensor, rows_C: Tensor | None, tokens: slice) -> TokenChunk:
    device = hidden_RD.device
    targets_C = targets_C[tokens]
    if rows_C is None:
        pairs = token_pairs(targets_C.contiguous(), None)
        return TokenChunk(
            tokens=tokens,
            hidden_TD=hidden_RD[tokens].contiguous(),
            pairs=pairs_to(pairs, device),
            rows_T=tokens,
        )
    rows_T, chunk_rows_C = torch.unique(rows_C[tokens], return_inverse=True)
    pairs = token_pairs(targets_C, chunk_rows_C)
    rows_T = rows_T.to(device)
    return TokenChunk(
        tokens=tokens,
        hidden_TD=hidden_RD.index_select(0, rows_T),
        pairs=pairs_to(pairs, device),
        rows_T=rows_T,
    )
