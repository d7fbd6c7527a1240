"""Tokens by inverse CDF, and their log-probs, from float32 logits on the CPU.

Legend: ``S`` rows, ``V`` vocabulary.

    p_v = exp(z_v / temperature) / sum_w exp(z_w / temperature)
    token = the first v with p_0 + ... + p_v > uniform        logprob = log p_token

Two passes over a row: its maximum, and its exponentials (float32, relative error 1e-7) summed in float64 over runs of
1024 tokens, of which one is looked at token by token. [8, 151936] takes 0.8 ms on one core, where PyTorch's
``log_softmax``, ``exp`` and ``cumsum`` in float64 take 7 to 15 ms.
"""

import torch
from torch import Tensor

from omnigrpo_kernels import extension


def draw_tokens_reference(
    logits_SV: Tensor, uniform_S: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same with float64 probabilities of float32 log-probs, on any device."""
    logprob_SV = (logits_SV / temperature).log_softmax(dim=-1)
    token_S = inverse_cdf(logprob_SV.to(torch.float64).exp(), uniform_S)
    return token_S, logprob_SV.gather(-1, token_S[:, None]).squeeze(1)


def inverse_cdf(probability_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The first token whose cumulative float64 probability exceeds ``uniform`` times the row's sum."""
    cumulative_SV = probability_SV.cumsum(dim=-1)
    total_S1 = cumulative_SV[:, -1:]
    below_total_S1 = torch.nextafter(total_S1, torch.zeros_like(total_S1))
    target_S1 = torch.minimum(uniform_S[:, None] * total_S1, below_total_S1)
    token_S = torch.searchsorted(cumulative_SV, target_S1, right=True).squeeze(1)
    # Only a row with NaN gets past its end; its log-prob is NaN too, and the caller sees that.
    return token_S.clamp(max=probability_SV.shape[-1] - 1)


def draw_tokens(logits_SV: Tensor, uniform_S: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Token (int64) and natural log-prob (of the logits' dtype) of each row; NaN in a row makes its log-prob NaN.

    Float32 on the CPU is C++; other dtypes, and CUDA, are the reference. Where ``uniform`` is within a rounding (1e-7)
    of a token's end, the two may differ by one token.

    Args:
        logits_SV: float32 or float64.
        uniform_S: float64 in [0, 1).
        temperature: above 0.
    """
    if logits_SV.dtype == torch.float32 and logits_SV.device.type == "cpu":
        extension.load()
        return torch.ops.omnigrpo.draw_tokens(logits_SV.contiguous(), uniform_S.contiguous(), temperature)
    return draw_tokens_reference(logits_SV, uniform_S, temperature=temperature)


extension.load()


@torch.library.register_fake("omnigrpo::draw_tokens")
def _draw_tokens_fake(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows)
