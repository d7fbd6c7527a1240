"""What a step learns from: its prompts' groups, sampled and scored, and those that earlier steps left unfinished.

Without ``rollout.overlap_update`` a step samples when it begins. With it, each step begins the next one's sampling
before its own update, and ``publish`` waits for that to end: the samples are one update behind. With
``rollout.token_budget`` a group may take several steps; it is learnt from once its last sample has ended.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from omnigrpo.carried_groups import GroupJob, Tree, completion_of_tree
from omnigrpo.data.prompt_stream import PromptStream
from omnigrpo.metrics import Metric
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.prefix_source import PrefixSource, SourceBatch
from omnigrpo.reward.composition import RewardSet
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.rollout.interface import FinishedGroup, GroupRequest, GroupStream, RolloutEngine, RolloutError
from omnigrpo.runtime.distributed import World
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import Completion, Group, GroupRewards, Prefix, PrefixInputs, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledStep:
    """The groups that a step learns from."""

    groups: list[Group]
    """Carried ones first, then the step's own prompts in order."""
    rewards: list[GroupRewards]
    """One per group."""
    batch: SourceBatch
    """The step's own prompts."""
    metrics: dict[str, float]
    """How old the tokens are, and what is carried over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sampling:
    """The groups of one step while they are sampled."""

    step: int
    batch: SourceBatch
    jobs: list[GroupJob]
    stream: GroupStream
    groups: dict[int, Group] = field(default_factory=dict)
    """By index of their job, as they come."""
    rewards: dict[int, GroupRewards] = field(default_factory=dict)
    """Of the groups whose samples have all ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ahead:
    """A step that is sampled already."""

    step: int
    jobs: list[tuple[str, tuple[int, ...]]]
    """Prompt id and seeds of each group that was wanted."""
    groups: list[tuple[Completion, ...]]
    """In the order of the jobs."""

    @classmethod
    def of(cls, sampling: _Sampling) -> "_Ahead":
        """All of whose groups have come."""
        groups = [sampling.groups[index].completions for index in range(len(sampling.jobs))]
        return cls(step=sampling.step, jobs=_names(sampling.jobs), groups=groups)

    def is_of(self, step: int, jobs: Sequence[GroupJob]) -> bool:
        """Whether these are the groups that the step wants now: a clip may have become unusable since."""
        return self.step == step and self.jobs == _names(jobs)


class GroupSampler:
    """Reads prompts, has the engine sample them, scores the groups."""

    def __init__(
        self,
        *,
        policy: HumanOmni,
        prompts: PromptStream,
        prompt_encoder: PromptEncoder,
        source: PrefixSource,
        engine: RolloutEngine,
        rewards: RewardSet,
        spans: SpanRecorder,
        world: World,
        seed: int,
        budget_rows: int,
        config: RolloutConfig,
    ) -> None:
        if config.overlap_update and not engine.overlaps_training:
            raise ValueError(
                f"rollout.overlap_update needs an engine with weights of its own, but rollout.engine {config.engine} "
                "samples by the weights that the update changes: take another engine, or leave overlap_update out"
            )
        self.source = source
        self.engine = engine
        self.config = config
        self._policy, self._prompts, self._prompt_encoder = policy, prompts, prompt_encoder
        self._rewards, self._spans, self._world = rewards, spans, world
        self._seed, self._budget_rows = seed, budget_rows
        self._carried: list[GroupJob] = []
        """What the next step, or the one that is sampled ahead, goes on with."""
        self._ahead: _Sampling | None = None
        self._restored: _Ahead | None = None
        self._saved: tuple[list[GroupJob], _Ahead | None] = [], None
        """For ``state_dict``, as it was after the last ``publish``."""

    def take(self, step: int) -> SampledStep:
        """Return the groups of a step, sampled now or during the last update; the next step's are begun if allowed."""
        if self._ahead is not None and self._ahead.step != step:
            self.close()
        sampling, self._ahead = self._ahead or self._begin(step), None
        self._finish(sampling)
        done = sorted(sampling.rewards)
        sampled = SampledStep(
            groups=[sampling.groups[index] for index in done],
            rewards=[sampling.rewards[index] for index in done],
            batch=sampling.batch,
            metrics=self._metrics(sampling, done),
        )
        self._carried = [
            GroupJob(inputs=job.inputs, seeds=job.seeds, begun=sampling.groups[index].completions)
            for index, job in enumerate(sampling.jobs)
            if index not in sampling.rewards
        ]
        if self.config.overlap_update:
            self._ahead = self._begin(step + 1)
        elif self.config.release_memory:
            self.engine.release_memory()
        return sampled

    def publish(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Give the engine the updated weights, once what it samples by the old ones has ended.

        When that fails, ``state_dict`` holds what is carried over, and the step ahead is sampled anew.
        """
        self._saved, ahead = (self._carried, None), None
        sampling, self._ahead = self._ahead, None
        if sampling is not None:
            self._finish(sampling)
            self._ahead, ahead = sampling, _Ahead.of(sampling)
        with self._spans.span(Phase.PUBLISH):
            if self.config.release_memory:
                self.engine.restore_memory()
            self.engine.publish(weights, version)
        self._saved = self._carried, ahead

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """This rank's prompts of a step; a group stays whole on one rank."""
        return self._prompts.batch(step)[self._world.rank :: self._world.size]

    def sample(self, inputs: Sequence[PrefixInputs], step: int) -> list[Group]:
        """G completions of each of these prompts alone."""
        sampling = self._start(step, SourceBatch(inputs=tuple(inputs), dropped=()), self._fresh(inputs, step))
        self._finish(sampling)
        return [sampling.groups[index] for index in range(len(inputs))]

    def close(self) -> None:
        """Abort what is sampled ahead; engine and source stay open."""
        if self._ahead is not None:
            self._ahead.stream.close()
            self._ahead = None

    def state_dict(self) -> Tree:
        """What is carried over and sampled ahead, as it was after the last ``publish``; goes through JSON."""
        carried, ahead = self._saved
        return {
            "carried": [job.to_tree() for job in carried],
            "ahead": None if ahead is None else asdict(ahead),
        }

    def load_state_dict(self, state: Tree) -> None:
        """Go on where a run of the same configuration was.

        Raises ValueError when the prompt of a carried group is gone, or its clip can no longer be used.
        """
        self._carried = [
            GroupJob.from_tree(tree, self._inputs_of(tree["prompt_id"])) for tree in state["carried"]
        ]
        ahead = state["ahead"]
        if ahead is not None:
            groups = [tuple(completion_of_tree(tree) for tree in group) for group in ahead["groups"]]
            jobs = [(prompt_id, tuple(seeds)) for prompt_id, seeds in ahead["jobs"]]
            self._restored = _Ahead(step=ahead["step"], jobs=jobs, groups=groups)
        self._saved = self._carried, self._restored

    def _inputs_of(self, prompt_id: str) -> PrefixInputs:
        prompts = [prompt for prompt in self._prompts.prompts if prompt.prompt_id == prompt_id]
        batch = self.source.inputs(prompts[:1])
        if not batch.inputs:
            reason = batch.dropped[0].error if prompts else "it is not in the data set"
            raise ValueError(f"a group of prompt {prompt_id!r} is half sampled, but cannot go on: {reason}")
        return batch.inputs[0]

    def _begin(self, step: int) -> _Sampling:
        batch = self.source.read(self.batch, step)
        self._check_budget(batch.inputs)
        return self._start(step, batch, [*self._carried, *self._fresh(batch.inputs, step)])

    def _start(self, step: int, batch: SourceBatch, jobs: list[GroupJob]) -> _Sampling:
        """Have the jobs sampled, unless that was done before the run was interrupted."""
        restored = self._restored
        if restored is not None and restored.is_of(step, jobs):
            stream = (FinishedGroup(index=i, completions=group) for i, group in enumerate(restored.groups))
        else:
            with self._spans.span(Phase.PREFILL), torch.no_grad():
                prefixes = embed(self._policy, [job.inputs for job in jobs])
            requests = [
                GroupRequest(prefix=prefix, seeds=job.seeds, begun=job.begun)
                for prefix, job in zip(prefixes, jobs, strict=True)
            ]
            stop_ids = self._prompt_encoder.stop_token_ids
            stream = self.engine.generate(requests, self.config.sampling(stop_token_ids=stop_ids))
        return _Sampling(step=step, batch=batch, jobs=jobs, stream=stream)

    def _finish(self, sampling: _Sampling) -> None:
        """Wait for all groups, and score each that is complete while the others are still sampled."""
        with closing(sampling.stream):
            for done in self._spans.each(Phase.DECODE_TOKENS, sampling.stream):
                self._receive(sampling, done)

    def _receive(self, sampling: _Sampling, done: FinishedGroup) -> None:
        texts = tuple(self._prompt_encoder.decode(c.token_ids) for c in done.completions)
        group = Group(inputs=sampling.jobs[done.index].inputs, completions=done.completions, texts=texts)
        sampling.groups[done.index] = group
        if all(completion.is_finished for completion in done.completions):
            self._check_staleness(group, sampling.step)
            with self._spans.span(Phase.REWARD):
                neighbours = tuple(job.inputs for job in sampling.jobs)
                sampling.rewards[done.index] = self._rewards.score(group, neighbours)

    def _fresh(self, inputs: Sequence[PrefixInputs], step: int) -> list[GroupJob]:
        """Jobs with seeds that depend on run seed, step, rank, prompt and sample, not on the rest of the batch."""
        seen: Counter[str] = Counter()
        jobs = []
        for prefix in inputs:
            prompt_id = prefix.prompt.prompt_id
            key = f"{self._seed}/{step}/{self._world.rank}/{prompt_id}/{seen[prompt_id]}"
            seen[prompt_id] += 1
            seeds = tuple(_seed(f"{key}/{sample}") for sample in range(self.config.samples))
            jobs.append(GroupJob(inputs=prefix, seeds=seeds))
        return jobs

    def _check_budget(self, inputs: Sequence[PrefixInputs]) -> None:
        """Refuse, before any token is sampled, a prompt whose prefix and longest completion could not pass at once."""
        budget, longest = self._budget_rows, self.config.max_new_tokens
        for item in inputs:
            prefix = len(item.token_ids_P)
            if prefix + longest > budget:
                raise ValueError(
                    f"prompt {item.prompt.prompt_id!r} may need {prefix} + {longest} rows for its prefix and one "
                    f"completion, but trainer.budget_rows is {budget}: raise it, or lower rollout.max_new_tokens"
                )

    def _check_staleness(self, group: Group, step: int) -> None:
        oldest = min((c.oldest_version for c in group.completions if c.token_ids), default=step)
        if not step - self.config.max_staleness <= oldest <= step:
            raise RolloutError(
                f"step {step} got tokens of weight version {oldest} for prompt {group.inputs.prompt.prompt_id!r}, but "
                f"rollout.max_staleness is {self.config.max_staleness}: the engine was not given the trainer's weights"
            )

    def _metrics(self, sampling: _Sampling, done: Sequence[int]) -> dict[str, float]:
        spans = [
            span
            for index in done
            for completion in sampling.groups[index].completions
            for span in completion.version_spans
        ]
        tokens = sum(span.num_tokens for span in spans)
        ages = sum((sampling.step - span.version) * span.num_tokens for span in spans)
        return {
            Metric.STALENESS: ages / tokens if tokens else 0.0,
            Metric.CARRIED: float(len(sampling.jobs) - len(done)),
        }


def _names(jobs: Sequence[GroupJob]) -> list[tuple[str, tuple[int, ...]]]:
    return [(job.inputs.prompt.prompt_id, job.seeds) for job in jobs]


def embed(model: HumanOmni, inputs: Sequence[PrefixInputs]) -> list[Prefix]:
    """Build the prefix embeddings of several prompts in one batch."""
    if not inputs:
        return []
    packed = model.embed_prefixes(inputs).split([len(i.token_ids_P) for i in inputs])
    return [Prefix(inputs=i, embeddings_PD=rows) for i, rows in zip(inputs, packed, strict=True)]


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
