"""Deterministic initial weights for a model that starts from nothing."""

import math

import torch
from torch import Tensor, nn

from omnigrpo.model.projectors import ChannelNorm
from omnigrpo.model.qwen2 import RMSNorm

TRANSFORMER_STD = 0.02


@torch.no_grad()
def initialize(module: nn.Module, *, transformer: bool) -> None:
    """Draw every weight below ``module`` from torch's global generator.

    ``transformer`` draws linear and embedding weights from N(0, 0.02) with zero biases, as Qwen2 and BERT do;
    otherwise they get PyTorch's own initialisation, which keeps the scale of convolutions.
    """
    for child in module.modules():
        if isinstance(child, RMSNorm | ChannelNorm | nn.LayerNorm):
            child.weight.fill_(1.0)
            if not isinstance(child, RMSNorm):
                child.bias.zero_()
        elif isinstance(child, nn.MultiheadAttention):
            child._reset_parameters()
        elif transformer and isinstance(child, nn.Linear | nn.Embedding):
            child.weight.normal_(std=TRANSFORMER_STD)
            if isinstance(child, nn.Linear) and child.bias is not None:
                child.bias.zero_()
        elif isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            child.reset_parameters()
        elif isinstance(child, nn.Embedding):
            child.weight.normal_(std=TRANSFORMER_STD)


def sinusoids(num_positions: int, width: int) -> Tensor:
    """Whisper's position table ``[positions, width]``: sines then cosines, wavelengths from 1 to 10,000."""
    half = width // 2
    rates = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half, dtype=torch.float64))
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
