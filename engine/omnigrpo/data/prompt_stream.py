"""Which prompts a step sees: a pure function of seed and step, so a run resumes at any point."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from omnigrpo.schema import Prompt


@dataclass(frozen=True, kw_only=True)
class PromptStream:
    """An endless sequence of shuffled epochs, cut into batches."""

    prompts: Sequence[Prompt]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not self.prompts or self.batch_size < 1:
            raise ValueError(
                f"a prompt stream needs prompts and a batch size of at least 1, got {len(self.prompts)} prompts "
                f"and batch size {self.batch_size}"
            )

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """Return the prompts of a step (from 0); every epoch visits each prompt once, in a new order."""
        first = step * self.batch_size
        places = (divmod(at, len(self.prompts)) for at in range(first, first + self.batch_size))
        return tuple(
            self.prompts[_epoch_order(len(self.prompts), self.seed, epoch)[at]] for epoch, at in places
        )


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return tuple(torch.randperm(size, generator=generator).tolist())
