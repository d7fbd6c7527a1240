"""What a reward is."""

from collections.abc import Sequence
from typing import Protocol

from omnigrpo.reward.context import GroupContext
from omnigrpo.schema import Group


class Reward(Protocol):
    """A function of a whole group: one finite number per completion, in order.

    It may compare the completions of the group with each other (diversity, rank); what it returns for one
    must depend on nothing outside the group.
    """

    def __call__(self, group: Group) -> Sequence[float]:
        """Score every completion of ``group``."""
        ...


class ContextReward(Protocol):
    """A reward that reads the model: its second parameter must be called ``context``."""

    def __call__(self, group: Group, context: GroupContext) -> Sequence[float]:
        """Score every completion of ``group``."""
        ...


class RewardError(ValueError):
    """A reward failed or returned something unusable; names the reward, the prompt and the completion."""
