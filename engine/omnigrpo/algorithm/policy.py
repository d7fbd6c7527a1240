"""The packed forward pass up to the vocabulary head: everything shared computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from omnigrpo.schema import PackedGroups, PrefixInputs, PrefixStates
from omnigrpo_kernels.linear_logprob import LogProbs, linear_logprob
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


class PolicyDecoder(Protocol):
    """What the packed forward needs of a decoder."""

    def __call__(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> Tensor:
        """Packed groups to final hidden states ``[T, D]``."""
        ...

    def prefill(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> PrefixStates:
        """Packed groups to what rows after them need."""
        ...

    def extend(
        self, prefix: PrefixStates, embeddings_CD: Tensor, positions_C: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        """Completions of one prefix to final hidden states ``[C, D]``."""
        ...


class PolicyModel(Protocol):
    """What the packed forward needs of a model."""

    @property
    def decoder(self) -> PolicyDecoder:
        """The decoder."""
        ...

    @property
    def head_weight_VD(self) -> Tensor:
        """Weight of the vocabulary head ``[V, D]``."""
        ...

    def embed_prefixes(self, inputs: Sequence[PrefixInputs]) -> Tensor:
        """Embed all prefixes, packed in order, ``[sum P, D]``."""
        ...

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        """Embed text tokens, ``[..., D]``."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CompletionRows:
    """What the vocabulary head needs of a pack, or of some of its completions."""

    hidden_RD: Tensor
    """``[R, D]``: final hidden states of the rows that predict a completion token, each row once."""
    targets_C: Tensor
    """int64 ``[C]``, on the CPU: the completion tokens."""
    rows_C: Tensor
    """int64 ``[C]``, on the CPU: which of the R rows predicts each token."""
    tokens: slice
    """Which of the pack's completion tokens these are."""


def completion_rows(model: PolicyModel, pack: PackedGroups) -> CompletionRows:
    """Run the decoder on a pack; equal to running each of its S sequences alone, each prefix once."""
    device = model.head_weight_VD.device
    rows_T = torch.cat([pack.prefix_rows, pack.completion_rows_C]).to(device)
    unordered_TD = torch.cat(
        [model.embed_prefixes(pack.inputs), model.embed_tokens(pack.completion_ids_C.to(device))]
    )
    embeddings_TD = torch.empty_like(unordered_TD).index_copy(0, rows_T, unordered_TD)
    hidden_TD = model.decoder(embeddings_TD, pack.positions_T.to(device), pack.layout)
    return select_rows(hidden_TD, pack, slice(0, len(pack.completion_ids_C)), pack.predictor_rows_C)


def select_rows(
    hidden_TD: Tensor, pack: PackedGroups, tokens: slice, predictor_rows_C: Tensor
) -> CompletionRows:
    """Take the rows of ``hidden_TD`` that predict these tokens of the pack."""
    predictors_R, rows_C = predictor_rows_C.unique(return_inverse=True)
    return CompletionRows(
        hidden_RD=hidden_TD[predictors_R.to(hidden_TD.device)],
        targets_C=pack.completion_ids_C[tokens],
        rows_C=rows_C,
        tokens=tokens,
    )


def completion_logprobs(model: PolicyModel, pack: PackedGroups, *, temperature: float = 1.0) -> LogProbs:
    """Return log-prob, entropy and log-sum-exp of every completion token, ``[C]`` each.

    Differentiable unless gradients are off; for a loss that is known, ``completion_rows`` and a fused head are cheaper.
    """
    return rows_logprobs(model, completion_rows(model, pack), temperature=temperature)


def rows_logprobs(model: PolicyModel, rows: CompletionRows, *, temperature: float) -> LogProbs:
    """The head's statistics of tokens whose decoder pass is done."""
    return linear_logprob(
        rows.hidden_RD, model.head_weight_VD, rows.targets_C, rows_C=rows.rows_C, temperature=temperature
    )
