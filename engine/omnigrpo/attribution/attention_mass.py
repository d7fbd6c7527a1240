"""Where the rows of a completion look: attention mass on each kind of row, exact, without dense attention.

Legend: ``C`` rows of one completion, ``P`` rows of its prefix, ``N`` query heads, ``K`` key/value heads, ``H`` head
width, ``X`` kinds of rows (`ROW_KINDS`), ``T`` packed rows.

    mass[c, x] = mean over heads of the sum over rows s of kind x of softmax_s(q_c . k_s / sqrt(H))

over the prefix's rows and the completion's own up to c. A token's row is the one that its embedding enters, which
predicts the token after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW
from omnigrpo_kernels.shared_prefix_attention import shared_prefix_attention
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

ROW_KINDS = ("video", "audio", "text", "completion")
"""Rows of a modality, the prompt's text, and the completion itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Watched:
    """A completion of a pack whose attention is measured."""

    group: int
    completion: int
    token_ids_P: Tensor
    """int64: of its prefix, with VIDEO_ROW and AUDIO_ROW."""


class AttentionObserver:
    """A decoder's attention over packed groups that also notes the mass of the watched completions.

    An `omnigrpo.model.qwen2.Attend`: per layer it holds C x (P + C) scores of one completion at a time, never those
    of the prefix's own rows.
    """

    def __init__(self, layout: SharedPrefixLayout, watched: Sequence[Watched]) -> None:
        self._layout, self._watched = layout, watched
        self.masses: list[list[Tensor]] = [[] for _ in watched]
        """By watched completion and layer ``[C, X]``, on the CPU, at least float32."""

    def __call__(self, layer_index: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        """Attend as usual; q and k are rotated."""
        for watched, masses in zip(self._watched, self.masses, strict=True):
            assert len(masses) == layer_index
            prefix, own = self._rows(watched)
            keys_SKH = torch.cat([k_TKH[prefix], k_TKH[own]])
            masses.append(attention_mass(q_TNH[own], keys_SKH, row_kinds(watched.token_ids_P)).cpu())
        return shared_prefix_attention(q_TNH, k_TKH, v_TKH, self._layout)

    def _rows(self, watched: Watched) -> tuple[slice, slice]:
        layout, group = self._layout, watched.group
        start = layout.group_starts[group]
        first = layout.completion_starts[group][watched.completion]
        length = layout.completion_lengths[group][watched.completion]
        return slice(start, start + layout.prefix_lengths[group]), slice(first, first + length)


def attention_mass(q_CNH: Tensor, keys_SKH: Tensor, kinds_P: Tensor) -> Tensor:
    """``[C, X]`` of the rows q, whose keys are the last C of ``keys_SKH``; at the decoder's scale, 1 / sqrt(H)."""
    wide = torch.promote_types(q_CNH.dtype, torch.float32)
    rows, heads, width = q_CNH.shape
    kv_heads = keys_SKH.shape[1]
    q_CKGH = q_CNH.to(wide).view(rows, kv_heads, heads // kv_heads, width)
    scores_KGCS = torch.einsum("ckgh,skh->kgcs", q_CKGH, keys_SKH.to(wide)) * width**-0.5
    future_CC = torch.ones(rows, rows, dtype=torch.bool, device=q_CNH.device).triu(1)
    scores_KGCS[..., len(keys_SKH) - rows :].masked_fill_(future_CC, -torch.inf)
    kinds_S = torch.cat([kinds_P.to(q_CNH.device), kinds_P.new_full((rows,), 3).to(q_CNH.device)])
    members_SX = torch.nn.functional.one_hot(kinds_S, len(ROW_KINDS)).to(wide)
    return (scores_KGCS.softmax(-1) @ members_SX).mean((0, 1))


def row_kinds(token_ids_P: Tensor) -> Tensor:
    """int64 ``[P]``: index in ROW_KINDS of each row of a prefix."""
    kinds_P = torch.full_like(token_ids_P, ROW_KINDS.index("text"))
    kinds_P[token_ids_P == VIDEO_ROW] = ROW_KINDS.index("video")
    kinds_P[token_ids_P == AUDIO_ROW] = ROW_KINDS.index("audio")
    return kinds_P


def visible_shares(token_ids_P: Tensor, num_rows: int) -> Tensor:
    """``[C, X]``: what the mass would be if every visible row got the same, for C rows of a completion."""
    counts_X = torch.bincount(row_kinds(token_ids_P), minlength=len(ROW_KINDS)).double()
    visible_CX = counts_X.repeat(num_rows, 1)
    visible_CX[:, ROW_KINDS.index("completion")] = torch.arange(1, num_rows + 1)
    return visible_CX / visible_CX.sum(1, keepdim=True)
