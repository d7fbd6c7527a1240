"""GRPO training: `Trainer.step` is the algorithm."""

import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from omnigrpo.algorithm.advantage import AdvantageConfig, group_advantages
from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.algorithm.split_group import completion_passes, frozen_logprobs
from omnigrpo.algorithm.token_metrics import TokenMetrics
from omnigrpo.data.prompt_stream import PromptStream
from omnigrpo.metrics import REWARD_COMPONENT_PREFIX, Metric
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.prefix_source import PrefixSource, SourceBatch
from omnigrpo.reward.composition import RewardSet
from omnigrpo.rollout.build import EngineName
from omnigrpo.rollout.interface import GroupRequest, RolloutEngine, SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngineConfig
from omnigrpo.rollout.sglang_config import SGLangConfig
from omnigrpo.runtime.distributed import World
from omnigrpo.runtime.optimizer import Optimizer
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import (
    Group,
    GroupRewards,
    PackedGroups,
    Prefix,
    PrefixInputs,
    Prompt,
    StepReport,
)
from omnigrpo_kernels.grpo_head import grpo_head
from omnigrpo_kernels.grpo_objective import BatchCounts, ObjectiveConfig, TokenBatch, token_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How completions are sampled."""

    engine: EngineName = "native"
    samples: int = 8
    """G, completions per prompt."""
    temperature: float = 1.0
    top_k: int = 0
    """0 is off; log-probs ignore the truncation, so off keeps the rollout on-policy."""
    top_p: float = 1.0
    """1 is off."""
    max_new_tokens: int = 512
    native: NativeEngineConfig = field(default_factory=NativeEngineConfig)
    """Memory budgets of the native engine."""
    sglang: SGLangConfig = field(default_factory=SGLangConfig)
    """Processes and limits of SGLang."""

    def __post_init__(self) -> None:
        """Reject a group that has no baseline, and a temperature that has no log-probs."""
        if self.samples < 2:
            raise ValueError(
                f"rollout.samples must be at least 2 to compare within a group, got {self.samples}"
            )
        if not self.temperature > 0:
            raise ValueError(f"rollout.temperature must be above 0 to explore, got {self.temperature}")
        self.sampling(stop_token_ids=())

    def sampling(self, *, stop_token_ids: tuple[int, ...]) -> SamplingParams:
        """What the engine is asked for; raises ValueError where it cannot be honoured."""
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=stop_token_ids,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerConfig:
    """The training loop's own numbers."""

    prompts_per_step: int = 16
    iterations: int = 1
    """Optimizer updates per rollout; beyond the first, the ratio leaves 1 and the clip acts."""
    budget_rows: int = 16384
    """Packed rows whose activations are alive at once. A larger group passes in micro-batches of completions; its
    prefix counts in each, so prefix and longest completion must fit."""

    def __post_init__(self) -> None:
        """Reject a loop that does nothing."""
        for name in ("prompts_per_step", "iterations", "budget_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPack:
    """A packed row and the constants of its loss."""

    pack: PackedGroups
    batch: TokenBatch
    """On the policy's device. Without old log-probs the policy that starts the step is still the current one."""


class Trainer:
    """One policy, its rollout engine and its data; embed it, or let `omnigrpo train` drive it."""

    def __init__(
        self,
        *,
        policy: HumanOmni,
        reference: HumanOmni | None,
        prompts: PromptStream,
        prompt_encoder: PromptEncoder,
        source: PrefixSource,
        rollout: RolloutEngine,
        rewards: RewardSet,
        optimizer: Optimizer,
        spans: SpanRecorder,
        world: World,
        seed: int,
        rollout_config: RolloutConfig,
        advantage_config: AdvantageConfig,
        objective_config: ObjectiveConfig,
        config: TrainerConfig,
    ) -> None:
        if objective_config.kl_coefficient and reference is None:
            raise ValueError(
                f"objective.kl_coefficient is {objective_config.kl_coefficient}, but no reference model was given"
            )
        self.policy = policy
        self.reference = reference
        self.prompts = prompts
        self.prompt_encoder = prompt_encoder
        self.source = source
        self.rollout = rollout
        self.rewards = rewards
        self.optimizer = optimizer
        self.spans = spans
        self.world = world
        self.seed = seed
        self.rollout_config = rollout_config
        self.advantage_config = advantage_config
        self.objective_config = objective_config
        self.config = config
        self.steps_done = 0

    def step(self) -> StepReport:
        """One GRPO step: decode and encode once, prefill once, sample G, reward, update, publish."""
        batch = self.source.read(self.batch, self.steps_done)

        groups = self.sample(batch.inputs)
        rewards = self.score(groups)
        packs = self.build_packs(groups, rewards)

        metrics = TokenMetrics()
        grad_norms = []
        for _ in range(self.config.iterations):
            packs = [self.accumulate(training_pack, metrics) for training_pack in packs]
            grad_norms.append(self.update())
        with self.spans.span(Phase.PUBLISH):
            self.rollout.publish(trained_weights(self.policy), self.steps_done + 1)
        report = self.report(groups, rewards, batch, metrics, grad_norms)
        self.steps_done += 1
        return report

    def sample(self, inputs: Sequence[PrefixInputs]) -> list[Group]:
        """Embed each prefix once and generate G completions from it."""
        self._check_budget(inputs)
        with self.spans.span(Phase.PREFILL), torch.no_grad():
            prefixes = embed(self.policy, inputs)
        requests = [
            GroupRequest(prefix=prefix, seeds=seeds)
            for prefix, seeds in zip(prefixes, self._seeds(inputs), strict=True)
        ]
        sampling = self.rollout_config.sampling(stop_token_ids=self.prompt_encoder.stop_token_ids)
        completions = collect(self.rollout.generate(requests, sampling), len(requests))
        return [
            Group(
                inputs=prefix,
                completions=group,
                texts=tuple(self.prompt_encoder.decode(c.token_ids) for c in group),
            )
            for prefix, group in zip(inputs, completions, strict=True)
        ]

    def score(self, groups: Sequence[Group]) -> list[GroupRewards]:
        """Reward every group as a whole."""
        with self.spans.span(Phase.REWARD):
            return [self.rewards.score(group) for group in groups]

    def build_packs(self, groups: Sequence[Group], rewards: Sequence[GroupRewards]) -> list[TrainingPack]:
        """Pack the groups under the row budget, with advantages, loss weights and reference log-probs."""
        with self.spans.span(Phase.PACK):
            runs = split_by_budget(groups, self.config.budget_rows)
            packs = [pack(run) for run in runs]
            advantages = [group_advantages(r.totals, self.advantage_config) for r in rewards]
            counts = self._global_counts(packs)
        built, first = [], 0
        for packed, run in zip(packs, runs, strict=True):
            advantage_S = torch.cat(advantages[first : first + len(run)])
            first += len(run)
            built.append(self._training_pack(packed, advantage_S, counts))
        return built

    def accumulate(self, training_pack: TrainingPack, metrics: TokenMetrics) -> TrainingPack:
        """Forward and backward of one pack; returns it with the old policy's log-probs fixed."""
        pack, batch = training_pack.pack, training_pack.batch
        passes = completion_passes(self.policy, pack, self.config.budget_rows)
        logprobs = []
        for rows in self.spans.each(Phase.FORWARD, passes):
            with self.spans.span(Phase.HEAD):
                head = grpo_head(
                    rows.hidden_RD,
                    self.policy.head_weight_VD,
                    rows.targets_C,
                    batch.select(rows.tokens),
                    self.objective_config,
                    rows_C=rows.rows_C,
                    temperature=self.rollout_config.temperature,
                )
            with self.spans.span(Phase.BACKWARD):
                head.loss.backward()
            metrics.add(head, loss_share=1 / self.config.iterations)
            logprobs.append(head.logprob_C)
        if batch.old_C is not None:
            return training_pack
        logprob_C = torch.cat(logprobs)
        metrics.add_rollout_difference(logprob_C, pack.rollout_logprob_C.to(logprob_C))
        return replace(training_pack, batch=replace(batch, old_C=logprob_C))

    def update(self) -> float:
        """Sum gradients over ranks, clip, step; returns the gradient norm before clipping."""
        with self.spans.span(Phase.OPTIMIZER):
            self.world.sum_gradients(self.optimizer.parameters)
            return self.optimizer.step()

    def batch(self, step: int) -> tuple[Prompt, ...]:
        """This rank's prompts of a step; a group stays whole on one rank."""
        return self.prompts.batch(step)[self.world.rank :: self.world.size]

    def report(
        self,
        groups: Sequence[Group],
        rewards: Sequence[GroupRewards],
        batch: SourceBatch,
        metrics: TokenMetrics,
        grad_norms: Sequence[float],
    ) -> StepReport:
        """Collect the step's scalars; phase seconds are added by whoever drains the spans."""
        completions = [c for group in groups for c in group.completions]
        scalars = metrics.summary() | reward_metrics(rewards) | batch.metrics
        scalars |= {
            Metric.LENGTH: _mean([float(len(c.token_ids)) for c in completions]),
            Metric.TRUNCATED: _mean([float(c.finish_reason == "length") for c in completions]),
            Metric.LEARNING_RATE: self.optimizer.learning_rate,
            Metric.GRAD_NORM: _mean(grad_norms),
            Metric.SAMPLES: float(len(completions)),
            Metric.DROPPED: float(len(batch.dropped)),
        }
        return StepReport(
            step=self.steps_done + 1, metrics=scalars, groups=groups, rewards=rewards, dropped=batch.dropped
        )

    def _training_pack(self, pack: PackedGroups, advantage_S: Tensor, counts: BatchCounts) -> TrainingPack:
        lengths_C = torch.bincount(pack.sequence_C, minlength=pack.num_sequences)[pack.sequence_C]
        reference_C = None
        if self.reference is not None and self.objective_config.kl_coefficient:
            with self.spans.span(Phase.REFERENCE):
                reference_C = frozen_logprobs(
                    self.reference,
                    pack,
                    self.config.budget_rows,
                    temperature=self.rollout_config.temperature,
                )
        device = self.policy.head_weight_VD.device
        batch = TokenBatch(
            advantage_C=advantage_S[pack.sequence_C].to(device),
            weight_C=token_weights(self.objective_config.loss, lengths_C, counts).to(device),
            sequence_C=pack.sequence_C.to(device),
            reference_C=reference_C,
            rollout_C=pack.rollout_logprob_C.to(device),
        )
        return TrainingPack(pack=pack, batch=batch)

    def _global_counts(self, packs: Sequence[PackedGroups]) -> BatchCounts:
        sequences, tokens = sum(p.num_sequences for p in packs), sum(len(p.completion_ids_C) for p in packs)
        num_sequences, num_tokens, num_packs = self.world.sum(
            torch.tensor([sequences, tokens, len(packs)])
        ).tolist()
        return BatchCounts(
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_tokens=self.rollout_config.max_new_tokens,
            num_packs=num_packs,
        )

    def _check_budget(self, inputs: Sequence[PrefixInputs]) -> None:
        """Refuse, before any token is sampled, a prompt whose prefix and longest completion could not pass at once."""
        budget, longest = self.config.budget_rows, self.rollout_config.max_new_tokens
        for item in inputs:
            prefix = len(item.token_ids_P)
            if prefix + longest > budget:
                raise ValueError(
                    f"prompt {item.prompt.prompt_id!r} may need {prefix} + {longest} rows for its prefix and one "
                    f"completion, but trainer.budget_rows is {budget}: raise it, or lower rollout.max_new_tokens"
                )

    def _seeds(self, inputs: Sequence[PrefixInputs]) -> list[tuple[int, ...]]:
        """Sampling seeds that depend on run seed, step, rank, prompt and sample, not on the rest of the batch."""
        seen: Counter[str] = Counter()
        seeds = []
        for prefix in inputs:
            prompt_id = prefix.prompt.prompt_id
            key = f"{self.seed}/{self.steps_done}/{self.world.rank}/{prompt_id}/{seen[prompt_id]}"
            seen[prompt_id] += 1
            seeds.append(tuple(_seed(f"{key}/{sample}") for sample in range(self.rollout_config.samples)))
        return seeds


def trained_weights(model: HumanOmni) -> Iterator[tuple[str, Tensor]]:
    """The weights that training changes, by their names in the checkpoint."""
    return ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)


def embed(model: HumanOmni, inputs: Sequence[PrefixInputs]) -> list[Prefix]:
    """Build the prefix embeddings of several prompts in one batch."""
    if not inputs:
        return []
    packed = model.embed_prefixes(inputs).split([len(i.token_ids_P) for i in inputs])
    return [Prefix(inputs=i, embeddings_PD=rows) for i, rows in zip(inputs, packed, strict=True)]


def reward_metrics(rewards: Sequence[GroupRewards]) -> dict[str, float]:
    """Mean reward, its components, and the share of groups whose rewards are all equal."""
    if not rewards:
        return {}
    totals = [total for group in rewards for total in group.totals]
    spreads = [statistics.pstdev(group.totals) for group in rewards]
    return {
        Metric.REWARD: _mean(totals),
        Metric.REWARD_STD: _mean(spreads),
        Metric.EQUAL_GROUPS: _mean([float(spread == 0) for spread in spreads]),
    } | {
        f"{REWARD_COMPONENT_PREFIX}{name}": _mean(
            [value for group in rewards for value in group.components[name]]
        )
        for name in rewards[0].components
    }


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def _seed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
