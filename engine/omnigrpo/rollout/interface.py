"""What a rollout engine is: prefixes in, sampled completions out."""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

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
    token_budget: int | None = None
    """Tokens that one call adds to a completion at most; what needs more ends with ``budget`` and can be continued."""

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
        if self.token_budget is not None and self.token_budget < 1:
            raise ValueError(f"token_budget must be >= 1, or None for no limit, got {self.token_budget}")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRequest:
    """One prompt and the samples that are wanted of it."""

    prefix: Prefix
    seeds: tuple[int, ...]
    """One per sample. Engines that say so draw the same tokens for the same seed; the others ignore the values."""
    begun: tuple[Completion | None, ...] = ()
    """What an earlier call left unfinished, per sample: its tokens and log-probs are kept and sampling goes on after
    them; a finished one is handed back as it is; None starts at the prefix. Empty for None everywhere."""

    def __post_init__(self) -> None:
        """Raises ValueError when ``begun`` does not fit the samples."""
        if self.begun and len(self.begun) != len(self.seeds):
            raise ValueError(
                f"GroupRequest of prompt {self.prefix.inputs.prompt.prompt_id!r}: {len(self.seeds)} seeds but "
                f"{len(self.begun)} begun completions; give one for each sample, or none at all"
            )

    @property
    def name(self) -> str:
        """For messages."""
        return f"prompt {self.prefix.inputs.prompt.prompt_id!r}"

    def begun_by(self, sample: int) -> Completion | None:
        """What this sample has so far."""
        return self.begun[sample] if self.begun else None


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedGroup:
    """All samples of one request."""

    index: int
    """Of its request in the call."""
    completions: tuple[Completion, ...]
    """One per seed, in that order."""


class GroupStream(Protocol):
    """The groups of one ``generate`` call, each as soon as its last sample ends, in any order."""

    def __iter__(self) -> "GroupStream":
        """Itself."""
        ...

    def __next__(self) -> FinishedGroup:
        """Wait for the next group; RolloutError when the engine cannot give it."""
        ...

    def close(self) -> None:
        """Abort what is under way; nothing more is yielded."""
        ...


class RolloutError(OSError):
    """The engine, often other processes, could not generate or take weights; the message says what, and what to do."""


class Sampler(Protocol):
    """What draws samples; all that an evaluation needs of an engine."""

    def generate(self, requests: Sequence[GroupRequest], sampling: SamplingParams) -> GroupStream:
        """Begin to draw the samples of every request.

        An engine with weights of its own works while the caller does something else; the others work while the stream
        is read.

        Raises ValueError for requests or parameters that cannot be served: an empty prefix, one that with its new
        tokens exceeds the context, embeddings of another width than the model's, a stop token outside the vocabulary.
        """
        ...


class RolloutEngine(Sampler, Protocol):
    """Draws samples by weights that are published to it."""

    @property
    def counters(self) -> RolloutCounters:
        """Totals so far."""
        ...

    @property
    def overlaps_training(self) -> bool:
        """Whether it has weights of its own, so that it can generate while the trainer changes its own."""
        ...

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Generate with these weights from now on, and call them ``version``.

        Args:
            weights: every parameter that may have changed since the last call, by its name in the checkpoint. An
                engine that shares the trainer's memory does not read it.
            version: not below the last one.

        Raises RolloutError when the engine could not take them all: it goes on with its old version then.
        """
        ...

    def pause(self) -> None:
        """Stop drawing tokens; what is under way keeps its state."""
        ...

    def resume(self) -> None:
        """Go on after ``pause``."""
        ...

    def release_memory(self) -> None:
        """Give the device memory that only generation needs to the update; nothing may be under way."""
        ...

    def restore_memory(self) -> None:
        """Take it back."""
        ...

    def close(self) -> None:
        """Release what the engine holds; it generates nothing afterwards."""
        ...


def collect(stream: GroupStream, num_groups: int) -> list[tuple[Completion, ...]]:
    """Wait for all groups of a call and return their completions in the order of the requests."""
    completions = {group.index: group.completions for group in stream}
    return [completions[index] for index in range(num_groups)]


class Spans(Protocol):
    """Where an engine reports the time of its phases."""

    def span(self, name: str) -> AbstractContextManager[object]:
        """Time the body under this name."""
        ...
