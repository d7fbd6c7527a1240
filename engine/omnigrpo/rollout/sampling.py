"""Token sampling whose outcome depends on a sample's own seed and logits, never on the batch around it.

Legend: ``S`` rows of logits, ``V`` vocabulary.
"""

import torch
from torch import Tensor

from omnigrpo.rollout.interface import SamplingParams
from omnigrpo_kernels.draw_tokens import draw_tokens, inverse_cdf


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


def uniforms(seeds: Tensor, position: int | Tensor) -> Tensor:
    """One float64 in [0, 1) per int64 seed, for the token at this index of its completion (one for all, or int64)."""
    # Seeds are hashed before the position is added: neighbouring seeds must not be shifted copies of
    # one stream.
    step = torch.as_tensor(position, device=seeds.device) * _INCREMENT
    return _shift_right(mix64(mix64(seeds) + step), 11).to(torch.float64) * 2.0**-53


def sample_tokens(
    logits_SV: Tensor, sampling: SamplingParams, seed_S: Tensor, position: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row by inverse CDF and report its log-prob.

    ``position`` is the index of the token in its completion: int64 ``[S]``, or one for all rows. The log-prob is under
    softmax(logits / temperature) over the whole vocabulary, before top-k and top-p, because that is what the trainer
    computes; greedy decoding reports it at temperature 1. Log-probs are float32 (float64 for float64 logits), sums of
    probabilities float64. Nothing waits for the device.
    """
    logits_SV = logits_SV if logits_SV.dtype == torch.float64 else logits_SV.float()
    if sampling.temperature == 0:
        return _scored(logits_SV.log_softmax(dim=-1), logits_SV.argmax(dim=-1))
    uniform_S = uniforms(seed_S, position)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return draw_tokens(logits_SV, uniform_S, temperature=sampling.temperature)
    logprob_SV = (logits_SV / sampling.temperature).log_softmax(dim=-1)
    probability_SV = _truncate(logprob_SV.to(torch.float64).exp(), sampling)
    return _scored(logprob_SV, inverse_cdf(probability_SV, uniform_S))


def _scored(logprob_SV: Tensor, token_S: Tensor) -> tuple[Tensor, Tensor]:
    return token_S, logprob_SV.gather(-1, token_S[:, None]).squeeze(1)


def _truncate(probability_SV: Tensor, sampling: SamplingParams) -> Tensor:
    """Zero what top-k, then top-p, exclude; ties at the threshold stay, so their order cannot matter."""
    vocab_size = probability_SV.shape[-1]
    keep = min(sampling.top_k or vocab_size, vocab_size)
    largest_SK = probability_SV.topk(keep, dim=-1).values
    threshold_S1 = largest_SK[:, -1:]
    if sampling.top_p < 1:
        before_SK = largest_SK.cumsum(dim=-1) - largest_SK
        inside_SK = before_SK < sampling.top_p * largest_SK.sum(dim=-1, keepdim=True)
        # The largest token is always inside: its `before` is 0.
        threshold_S1 = largest_SK.masked_fill(~inside_SK, float("inf")).amin(dim=-1, keepdim=True)
    return probability_SV.masked_fill(probability_SV < threshold_S1, 0.0)
