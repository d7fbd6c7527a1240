"""What the host knows of a group under way: its samples, their tokens so far, and the blocks that they hold."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

from omnigrpo.rollout.interface import GroupRequest, SamplingParams
from omnigrpo.rollout.kv_pool import KVPool
from omnigrpo.schema import Completion, FinishReason, VersionSpan


@dataclass(slots=True, eq=False)
class Sample:
    """One completion on its way."""

    seed: int
    begun: Completion | None
    """What an earlier call drew of it."""
    limit: int
    """Tokens, begun ones included, at which this call ends it."""
    longest: int
    """Tokens at which its length ends it."""
    tokens: list[int]
    logprobs: list[float]
    versions: list[int] = field(default_factory=list)
    """Of the weights that drew each new token."""
    num_drawn: int = 0
    """Tokens drawn, begun ones and those included that the host has not read yet."""
    blocks: list[int] = field(default_factory=list)
    """Of its own keys and values."""
    ended: FinishReason | None = None
    cached_tokens: int = 0

    @classmethod
    def of_request(cls, request: GroupRequest, index: int, sampling: SamplingParams) -> "Sample":
        """Before its first new token; a begun one that has no room for another has ended."""
        begun = request.begun_by(index)
        tokens, logprobs = (list(begun.token_ids), list(begun.logprobs)) if begun else ([], [])
        longest, limit = sampling.max_new_tokens, sampling.max_new_tokens
        if sampling.token_budget is not None:
            limit = min(limit, len(tokens) + sampling.token_budget)
        sample = cls(
            seed=request.seeds[index],
            begun=begun,
            limit=limit,
            longest=longest,
            tokens=tokens,
            logprobs=logprobs,
            num_drawn=len(tokens),
        )
        if begun is not None and begun.is_finished:
            sample.ended = begun.finish_reason
        elif len(tokens) >= longest:
            sample.ended = "length"
        return sample

    @property
    def is_drawn_out(self) -> bool:
        """Whether no more tokens may be drawn, read or not."""
        return self.ended is not None or self.num_drawn >= self.limit

    def read(self, token: int, logprob: float, version: int, stops: frozenset[int], name: str) -> None:
        """Add the next token that was drawn; what follows an end means nothing and is left out.

        Raises FloatingPointError, with the prompt's name, for a log-prob that is no number.
        """
        if self.ended is not None:
            return
        if not math.isfinite(logprob):
            raise FloatingPointError(
                f"the model's logits are not finite during rollout, at token {len(self.tokens)} of a sample of {name}; "
                "its weights or the prefix embeddings hold NaN or infinity: check the last optimizer steps (grad "
                "norm, learning rate) and the inputs"
            )
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.versions.append(version)
        if token in stops:
            self.ended = "stop"
        elif len(self.tokens) >= self.limit:
            self.ended = "length" if len(self.tokens) >= self.longest else "budget"

    def completion(self) -> Completion:
        """What it came to; one that had finished before is handed back as it is."""
        assert self.ended is not None
        if self.begun is not None and self.begun.is_finished:
            return self.begun
        spans = self.begun.version_spans if self.begun else ()
        runs = ((version, len(list(run))) for version, run in groupby(self.versions))
        return Completion(
            token_ids=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            finish_reason=self.ended,
            version_spans=(*spans, *(VersionSpan(version=v, num_tokens=n) for v, n in runs)),
            cached_tokens=self.cached_tokens,
        )


@dataclass(slots=True, eq=False)
class LiveGroup:
    """A request under way."""

    index: int
    """Of the request in its call."""
    request: GroupRequest
    samples: tuple[Sample, ...]
    prefix_blocks: list[int] = field(default_factory=list)

    @classmethod
    def of_request(cls, index: int, request: GroupRequest, sampling: SamplingParams) -> "LiveGroup":
        """Before its prefill. The first sample that draws is the one that computes the prefix."""
        samples = tuple(Sample.of_request(request, i, sampling) for i in range(len(request.seeds)))
        group = cls(index=index, request=request, samples=samples)
        for sample in list(group.active())[1:]:
            sample.cached_tokens = group.prefix_rows
        return group

    @property
    def prefix_rows(self) -> int:
        """P."""
        return int(self.request.prefix.embeddings_PD.shape[0])

    @property
    def prefill_rows(self) -> int:
        """Rows of its prefill: the prefix, and what its samples have begun."""
        return self.prefix_rows + sum(len(sample.tokens) for sample in self.active())

    @property
    def is_finished(self) -> bool:
        """Whether its last sample has ended."""
        return all(sample.ended is not None for sample in self.samples)

    def active(self) -> Iterator[Sample]:
        """The samples that draw."""
        return (sample for sample in self.samples if sample.ended is None)

    def give_back(self, pool: KVPool) -> None:
        """Let go of all blocks."""
        for blocks in (self.prefix_blocks, *(sample.blocks for sample in self.samples)):
            pool.give_back(blocks)
            blocks.clear()
