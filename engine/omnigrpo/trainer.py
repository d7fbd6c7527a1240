"""GRPO training: `Trainer.step` is the algorithm."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from omnigrpo.algorithm.advantage import AdvantageConfig, group_advantages
from omnigrpo.algorithm.agreement import (
    MOST_WORST,
    Agreement,
    AgreementConfig,
    DisagreementError,
    agreement,
    worst_tokens,
)
from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.algorithm.split_group import completion_passes, frozen_logprobs
from omnigrpo.algorithm.token_metrics import TokenMetrics
from omnigrpo.group_sampler import GroupSampler, SampledStep
from omnigrpo.metrics import LOGPROB_DIFFERENCE_PREFIX, REWARD_COMPONENT_PREFIX, Metric
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.runtime.distributed import World
from omnigrpo.runtime.optimizer import Optimizer
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import Group, GroupRewards, PackedGroups, StepReport
from omnigrpo_kernels.grpo_head import grpo_head
from omnigrpo_kernels.grpo_objective import BatchCounts, ObjectiveConfig, TokenBatch, token_weights


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
        sampler: GroupSampler,
        optimizer: Optimizer,
        spans: SpanRecorder,
        world: World,
        advantage_config: AdvantageConfig,
        objective_config: ObjectiveConfig,
        agreement_config: AgreementConfig,
        config: TrainerConfig,
    ) -> None:
        if objective_config.kl_coefficient and reference is None:
            raise ValueError(
                f"objective.kl_coefficient is {objective_config.kl_coefficient}, but no reference model was given"
            )
        check_off_policy(sampler.config, objective_config)
        self.policy = policy
        self.reference = reference
        self.sampler = sampler
        self.optimizer = optimizer
        self.spans = spans
        self.world = world
        self.advantage_config = advantage_config
        self.objective_config = objective_config
        self.agreement_config = agreement_config
        self.config = config
        self.steps_done = 0

    def step(self) -> StepReport:
        """One GRPO step: decode and encode once, prefill once, sample G, reward, update, publish."""
        sampled = self.sampler.take(self.steps_done)
        packs = self.build_packs(sampled.groups, sampled.rewards)

        metrics = TokenMetrics()
        packs = [self.accumulate(training_pack, metrics) for training_pack in packs]
        if self.agreement_config.has_limits:
            self.check_agreement(packs)
        grad_norms = [self.update()]
        for _ in range(1, self.config.iterations):
            packs = [self.accumulate(training_pack, metrics) for training_pack in packs]
            grad_norms.append(self.update())
        self.steps_done += 1
        self.sampler.publish(trained_weights(self.policy), self.steps_done)
        return self.report(sampled, metrics, self.compare_rollout(packs), grad_norms)

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
                    temperature=self.sampler.config.temperature,
                )
            with self.spans.span(Phase.BACKWARD):
                head.loss.backward()
            metrics.add(head, loss_share=1 / self.config.iterations)
            logprobs.append(head.logprob_C)
        if batch.old_C is not None:
            return training_pack
        logprob_C = torch.cat(logprobs)
        return replace(training_pack, batch=replace(batch, old_C=logprob_C))

    def update(self) -> float:
        """Sum gradients over ranks, clip, step; returns the gradient norm before clipping."""
        with self.spans.span(Phase.OPTIMIZER):
            self.world.sum_gradients(self.optimizer.parameters)
            return self.optimizer.step()

    def compare_rollout(self, packs: Sequence[TrainingPack]) -> Agreement:
        """Compare the log-probs of the rollout and of the trainer at the start of the step; waits for the device."""
        both = [(p.batch.old_C, p.batch.rollout_C) for p in packs]
        old_C = torch.cat([old_C for old_C, _ in both if old_C is not None] or [torch.empty(0)])
        rollout_C = torch.cat(
            [rollout_C for _, rollout_C in both if rollout_C is not None] or [torch.empty(0)]
        )
        return agreement(old_C, rollout_C, self.agreement_config.bound)

    def check_agreement(self, packs: Sequence[TrainingPack]) -> None:
        """Before the weights change, raise DisagreementError beyond the limits: on every rank when it is so on one."""
        figures = self.compare_rollout(packs)
        violations = figures.violations(self.agreement_config)
        if float(self.world.sum(torch.tensor(float(len(violations))))):
            worst = [
                token
                for p in packs
                if p.batch.old_C is not None
                for token in worst_tokens(p.pack, p.batch.old_C, count=MOST_WORST)
            ]
            for parameter in self.optimizer.parameters:
                parameter.grad = None
            raise DisagreementError(self.steps_done + 1, figures, violations, worst)

    def report(
        self,
        sampled: SampledStep,
        metrics: TokenMetrics,
        figures: Agreement,
        grad_norms: Sequence[float],
    ) -> StepReport:
        """Collect the step's scalars; phase seconds are added by whoever drains the spans."""
        completions = [c for group in sampled.groups for c in group.completions]
        scalars = (
            metrics.summary() | reward_metrics(sampled.rewards) | sampled.batch.metrics | sampled.metrics
        )
        if completions:
            scalars |= {f"{LOGPROB_DIFFERENCE_PREFIX}{name}": x for name, x in asdict(figures).items()}
        scalars |= {
            Metric.LENGTH: _mean([float(len(c.token_ids)) for c in completions]),
            Metric.TRUNCATED: _mean([float(c.finish_reason == "length") for c in completions]),
            Metric.LEARNING_RATE: self.optimizer.learning_rate,
            Metric.GRAD_NORM: _mean(grad_norms),
            Metric.SAMPLES: float(len(completions)),
            Metric.DROPPED: float(len(sampled.batch.dropped)),
        }
        return StepReport(
            step=self.steps_done,
            metrics=scalars,
            groups=sampled.groups,
            rewards=sampled.rewards,
            dropped=sampled.batch.dropped,
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
                    temperature=self.sampler.config.temperature,
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
            max_tokens=self.sampler.config.max_new_tokens,
            num_packs=num_packs,
        )


def check_off_policy(rollout: RolloutConfig, objective: ObjectiveConfig) -> None:
    """Raise ValueError where tokens of earlier weights would be learnt from without importance weights."""
    if rollout.max_staleness and objective.max_importance_weight is None:
        raise ValueError(
            f"rollout.max_staleness is {rollout.max_staleness}: tokens of earlier weights must be weighted, but "
            "objective.max_importance_weight is left out; set it, to 2.0 for example"
        )


def trained_weights(model: HumanOmni) -> Iterator[tuple[str, Tensor]]:
    """The weights that training changes, by their names in the checkpoint."""
    return ((name, p.detach()) for name, p in model.trainable_parameters().items())


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
