"""What the native engine refuses before any work."""

from collections.abc import Sequence

from omnigrpo.rollout.interface import GroupRequest, SamplingParams
from omnigrpo.rollout.policy import PolicyModel


def check_requests(model: PolicyModel, requests: Sequence[GroupRequest], sampling: SamplingParams) -> None:
    """Raise ValueError for what cannot be served."""
    vocab_size, width = model.head_weight_VD.shape
    for token in sampling.stop_token_ids:
        if token >= vocab_size:
            raise ValueError(f"stop token {token} is outside the vocabulary of {vocab_size} tokens")
    positions = model.decoder.config.max_positions
    for index, request in enumerate(requests):
        name = f"prefix {index} ({request.name})"
        shape = tuple(request.prefix.embeddings_PD.shape)
        if shape[0] == 0 or shape[1:] != (width,):
            raise ValueError(f"{name} has embeddings of shape {shape}; expected [P, {width}] with P >= 1")
        if shape[0] > positions - sampling.max_new_tokens:
            raise ValueError(
                f"{name} has {shape[0]} rows, and {sampling.max_new_tokens} new tokens exceed the decoder's "
                f"{positions} positions; shorten the prompt or lower max_new_tokens"
            )
        for sample, seed in enumerate(request.seeds):
            if not -(1 << 63) <= seed < 1 << 63:
                raise ValueError(f"seed {seed} of {name} does not fit 64 bits, signed")
            begun = request.begun_by(sample)
            outside = [t for t in begun.token_ids if not 0 <= t < vocab_size] if begun else []
            if outside:
                raise ValueError(
                    f"sample {sample} of {name} has begun with token {outside[0]}, outside the vocabulary of "
                    f"{vocab_size} tokens"
                )
