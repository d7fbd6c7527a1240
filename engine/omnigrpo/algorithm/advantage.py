"""Group-relative advantages."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AdvantageConfig:
    """How rewards of a group become advantages."""

    scale_by_std: bool = True
    """Divide by the group's standard deviation (GRPO); False is Dr.GRPO's choice."""
    epsilon: float = 1e-4
    """Added to the standard deviation."""

    def __post_init__(self) -> None:
        """Reject what would blow advantages up."""
        if not (math.isfinite(self.epsilon) and self.epsilon >= 0):
            raise ValueError(f"advantage.epsilon must be a finite number >= 0, got {self.epsilon}")


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> Tensor:
    """Return float64 advantages ``[G]``: ``(r - mean) / (std + epsilon)`` with the unbiased std (DeepSeekMath, eq. 4).

    A group of one sample, or one whose rewards are all equal, gets zeros.
    """
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    if len(set(rewards)) < 2:
        return torch.zeros_like(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    if not config.scale_by_std:
        return centred_G
    return centred_G / (rewards_G.std() + config.epsilon)
