"""Group-relative advantages."""

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


def group_advantages(rewards: Sequence[float], config: AdvantageConfig) -> Tensor:
    """Return float64 advantages ``[G]``: ``(r - mean) / (std + epsilon)`` with the unbiased std (DeepSeekMath, eq. 4).

    A group of one sample, or one whose rewards are all equal, gets zeros.
    """
    rewards_G = torch.tensor(rewards, dtype=torch.float64)
    centred_G = rewards_G - rewards_G.mean()
    if len(rewards) < 2 or not config.scale_by_std:
        return centred_G
    return centred_G / (rewards_G.std() + config.epsilon)
