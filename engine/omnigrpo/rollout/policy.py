"""The model as the native engine calls it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Attend
from omnigrpo.schema import PrefixStates, SharedPrefixLayout


class PolicyDecoder(Protocol):
    """The decoder as the engine calls it."""

    @property
    def config(self) -> DecoderConfig:
        """Its geometry."""
        ...

    def prefill(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> PrefixStates:
        """Hidden rows after the final norm, and each layer's keys, with rotary applied, and values."""
        ...

    def decode(self, embeddings_SD: Tensor, positions_S: Tensor, attend: Attend) -> Tensor:
        """Hidden rows after the final norm of one token per sample."""
        ...


class PolicyModel(Protocol):
    """The model as the engine calls it."""

    @property
    def decoder(self) -> PolicyDecoder:
        """The decoder."""
        ...

    @property
    def head_weight_VD(self) -> Tensor:
        """The vocabulary projection."""
        ...

    def embed_tokens(self, token_ids: Tensor, /) -> Tensor:
        """Text embeddings of token ids."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Every submodule; an ``nn.Module`` has it."""
        ...


@contextmanager
def evaluating(model: PolicyModel) -> Iterator[None]:
    """Evaluation mode inside; afterwards exactly the modules that trained train again."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def weight_addresses(model: PolicyModel) -> tuple[int, ...]:
    """Where every parameter lies; what a captured CUDA graph relies on."""
    return tuple(
        parameter.data_ptr() for module in model.modules() for parameter in module.parameters(recurse=False)
    )
