"""What a rollout engine is: prefixes in, sampled completions out."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from omnigrpo.schema import Completion, Prefix


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How tokens are drawn; the same for every sample of one ``generate`` call."""

    temperature: float = 1.0
    """Divisor of the logits; 0 is greedy decoding."""
    top_k: int = 0
    """Draw from the k most probable tokens (and ties of the k-th); 0 is off."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probability reaches top_p (and ties of the last); 1 is off."""
    max_new_tokens: int = 512
    """Tokens of a completion at most, the stop token included."""
    stop_token_ids: tuple[int, ...] = ()
    """A completion ends with the first of these that is drawn."""

    def __post_init__(self) -> None:
        """Reject values that no sampler can honour."""
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature must be a finite number >= 0, got {self.temperature}; 0 decodes greedily"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}; 0 turns it off")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; 1 turns it off")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids must be >= 0, got {self.stop_token_ids}")


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutCounters:
    """Work done by an engine since it was built."""

    prefixes_prefilled: int = 0
    """Prefixes that went through the decoder."""
    prefix_rows: int = 0
    """Rows of those prefixes."""
    decode_steps: int = 0
    """Decoder calls after prefill."""
    decode_rows: int = 0
    """Rows of those calls, finished ones that were not yet released included."""
    tokens_generated: int = 0
    """Tokens of all completions."""

    def since(self, earlier: "RolloutCounters") -> "RolloutCounters":
        """Work done after ``earlier`` was read."""
        return RolloutCounters(
            prefixes_prefilled=self.prefixes_prefilled - earlier.prefixes_prefilled,
            prefix_rows=self.prefix_rows - earlier.prefix_rows,
            decode_steps=self.decode_steps - earlier.decode_steps,
            decode_rows=self.decode_rows - earlier.decode_rows,
            tokens_generated=self.tokens_generated - earlier.tokens_generated,
        )


class RolloutEngine(Protocol):
    """Samples completions of prefixes."""

    @property
    def counters(self) -> RolloutCounters:
        """Totals so far."""
        ...

    def generate(
        self, prefixes: Sequence[Prefix], sampling: SamplingParams, seeds: Sequence[Sequence[int]]
    ) -> list[tuple[Completion, ...]]:
        """Draw ``len(seeds[i])`` completions of ``prefixes[i]``, one per seed and in that order."""
        ...

    def publish(self, version: int) -> None:
        """Make the trainer's current weights the ones that generate, under this version."""
        ...

    def close(self) -> None:
        """Release what the engine holds; it generates nothing afterwards."""
        ...


class Spans(Protocol):
    """Where an engine reports the time of its phases."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """Time the body under this name."""
        ...
