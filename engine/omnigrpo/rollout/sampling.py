"""Token sampling whose outcome depends on a sample's own seed and logits, never on the batch around it.

Legend: ``S`` rows of logits, ``M`` draws from one row, ``V`` vocabulary.
"""

import torch
from torch import Tensor

from omnigrpo.rollout.interface import SamplingParams


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit constant."""
    return value - (1 << 64) if value >= 1 << 63 else value


_INCREMENT = _signed(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = _signed(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = _signed(0x94D049BB133111EB)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical shift of int64 (torch's ``>>`` copies the sign bit)."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def mix64(counter: Tensor) -> Tensor:
    """Output function of splitmix64 (Steele, Lea and Flood 2014) on int64 bits, element by element."""
    bits = counter + _INCREMENT
    bits = (bits ^ _shift_right(bits, 30)) * _MULTIPLIER_1
    bits = (bits ^ _shift_right(bits, 27)) * _MULTIPLIER_2
    return bits ^ _shift_right(bits, 31)


def uniforms(seeds: Tensor, position: int) -> Tensor:
    """One float64 in [0, 1) per int64 seed, for the token at this index of the completion."""
    # Seeds are hashed before the position is added: neighbouring seeds must not be shifted copies of
    # one stream.
    bits = mix64(mix64(seeds) + _signed(position * (_INCREMENT % (1 << 64)) % (1 << 64)))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


def sample_tokens(
    logits_SV: Tensor, sampling: SamplingParams, seeds: Tensor, position: int
) -> tuple[Tensor, Tensor]:
    """Draw tokens by inverse CDF and report the log-prob of each.

    ``seeds`` is int64 ``[S]``, or ``[S, M]`` for M draws from the same row of logits; tokens and log-probs
    have its shape. ``position`` is the index of the token in its completion. The log-prob is under
    softmax(logits / temperature) over the whole vocabulary, before top-k and top-p, because that is what
    the trainer computes; greedy decoding reports it at temperature 1. Log-probs are float32 (float64 for
    float64 logits), the CDF is float64. Nothing waits for the device.
    """
    logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    seeds_SM = seeds if seeds.ndim == 2 else seeds[:, None]
    if sampling.temperature == 0:
        logprob_SV = logits_SV.log_softmax(dim=-1)
        token_SM = logits_SV.argmax(dim=-1, keepdim=True).expand_as(seeds_SM)
    else:
        logprob_SV = (logits_SV / sampling.temperature).log_softmax(dim=-1)
        probability_SV = _truncate(logprob_SV.to(torch.float64).exp(), sampling)
        token_SM = _inverse_cdf(probability_SV, uniforms(seeds_SM, position))
    logprob_SM = logprob_SV.gather(-1, token_SM)
    return token_SM.reshape(seeds.shape), logprob_SM.reshape(seeds.shape)


def _truncate(probability_SV: Tensor, sampling: SamplingParams) -> Tensor:
    """Zero what top-k, then top-p, exclude; ties at the threshold stay, so their order cannot matter."""
    vocab_size = probability_SV.shape[-1]
    keep = min(sampling.top_k or vocab_size, vocab_size)
    if keep == vocab_size and sampling.top_p == 1:
        return probability_SV
    largest_SK = probability_SV.topk(keep, dim=-1).values
    threshold_S1 = largest_SK[:, -1:]
    if sampling.top_p < 1:
        before_SK = largest_SK.cumsum(dim=-1) - largest_SK
        inside_SK = before_SK < sampling.top_p * largest_SK.sum(dim=-1, keepdim=True)
        # The largest token is always inside: its `before` is 0.
        threshold_S1 = largest_SK.masked_fill(~inside_SK, float("inf")).amin(dim=-1, keepdim=True)
    return probability_SV.masked_fill(probability_SV < threshold_S1, 0.0)


def _inverse_cdf(probability_SV: Tensor, uniform_SM: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds ``uniform`` times the row's sum."""
    cumulative_SV = probability_SV.cumsum(dim=-1)
    total_S1 = cumulative_SV[:, -1:]
    below_total_S1 = torch.nextafter(total_S1, torch.zeros_like(total_S1))
    target_SM = torch.minimum(uniform_SM * total_S1, below_total_S1)
    token_SM = torch.searchsorted(cumulative_SV, target_SM.contiguous(), right=True)
    # Only a row with NaN gets past its end; its log-prob is NaN too, and the caller sees that.
    return token_SM.clamp(max=probability_SV.shape[-1] - 1)
