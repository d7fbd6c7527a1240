"""What engines on SGLang refuse before any call: what it would fail on, or shorten in silence."""

from omnigrpo.model.config import DecoderConfig
from omnigrpo.rollout.interface import GroupRequest, SamplingParams

ROWS_KEPT_BACK = 2
"""Rows of context and cache that SGLang gives to nobody; beyond them it would shorten a completion in silence."""
INPUT_KEPT_BACK = 7
"""The same for a prompt alone."""


def check_stop_tokens(sampling: SamplingParams, decoder: DecoderConfig) -> None:
    """Raise ValueError for a stop token that the decoder cannot draw."""
    for token in sampling.stop_token_ids:
        if token >= decoder.vocab_size:
            raise ValueError(f"stop token {token} is outside the vocabulary of {decoder.vocab_size} tokens")


def check_prompt(
    request: GroupRequest, sampling: SamplingParams, decoder: DecoderConfig, *, limit_rows: int, limit: str
) -> None:
    """Raise ValueError for a prompt that the decoder cannot read, or that does not fit with its new tokens.

    ``limit_rows`` are those of context and cache, whichever is less; ``limit`` is what to call them.
    """
    shape, ids_P = tuple(request.prefix.embeddings_PD.shape), request.prefix.inputs.token_ids_P
    if shape != (len(ids_P), decoder.width) or len(ids_P) == 0:
        raise ValueError(
            f"{request.name} has embeddings of shape {shape} for {len(ids_P)} rows; expected [P, {decoder.width}] "
            "with one per row and P >= 1"
        )
    if request.prefix.inputs.positions_3P is not None:
        raise ValueError(f"{request.name} has M-RoPE positions; SGLang's decoder here takes plain ones")
    rows, new = len(ids_P), sampling.max_new_tokens
    if rows + new > limit_rows - ROWS_KEPT_BACK or rows > limit_rows - INPUT_KEPT_BACK:
        raise ValueError(
            f"{request.name} has {rows} rows, and with {new} new tokens it does not fit {limit}, of which SGLang keeps "
            f"{ROWS_KEPT_BACK} (and for a prompt alone {INPUT_KEPT_BACK}): shorten the prompt, or lower max_new_tokens"
        )
    if bool((ids_P >= decoder.vocab_size).any()):
        raise ValueError(
            f"{request.name} has token {int(ids_P.max())}, outside the vocabulary of {decoder.vocab_size}"
        )
