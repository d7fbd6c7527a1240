"""The packed forward pass: log-probs of completion tokens, everything shared computed once."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from omnigrpo.schema import PackedGroups, PrefixInputs
from omnigrpo_kernels.linear_logprob import LogProbs, linear_logprob
from omnigrpo_kernels.shared_prefix_attention import SharedPrefixLayout


class PolicyModel(Protocol):
    """What the packed forward needs of a model."""

    @property
    def decoder(self) -> Callable[[Tensor, Tensor, SharedPrefixLayout], Tensor]:
        """Packed decoder: embeddings ``[T, D]``, positions ``[T]``, layout to final hidden states ``[T, D]``."""
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


def completion_logprobs(model: PolicyModel, pack: PackedGroups, *, temperature: float = 1.0) -> LogProbs:
    """Return log-prob, entropy and log-sum-exp of every completion token, ``[C]`` each.

    Equal to running each of the S sequences alone, but each prefix passes through the decoder once and only rows
    that predict a completion token meet the vocabulary. Differentiable unless gradients are off.
    """
    device = model.head_weight_VD.device
    ids_C = pack.completion_ids_C.to(device)
    rows_T = torch.cat([pack.prefix_rows, pack.completion_rows_C]).to(device)
    unordered_TD = torch.cat([model.embed_prefixes(pack.inputs), model.embed_tokens(ids_C)])
    embeddings_TD = torch.empty_like(unordered_TD).index_copy(0, rows_T, unordered_TD)
    hidden_TD = model.decoder(embeddings_TD, pack.positions_T.to(device), pack.layout)
    hidden_CD = hidden_TD[pack.predictor_rows_C.to(device)]
    return linear_logprob(hidden_CD, model.head_weight_VD, ids_C, temperature=temperature)
