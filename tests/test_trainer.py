"""Trainer: the parts of a GRPO step, each against what it must do, on a tiny model in float64."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from omnigrpo.algorithm.advantage import AdvantageConfig
from omnigrpo.algorithm.policy import completion_logprobs
from omnigrpo.algorithm.token_metrics import TokenMetrics
from omnigrpo.metrics import Metric
from omnigrpo.model.humanomni import reference_copy
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.runtime.distributed import World
from omnigrpo_kernels.grpo_objective import ObjectiveConfig


@pytest.fixture(scope="module")
def fresh(builders):
    return builders.model(1)


@pytest.fixture
def policy(fresh):
    return copy.deepcopy(fresh)


@pytest.fixture(scope="module")
def prefixes(builders):
    return [
        builders.inputs(name, text=(3, 2 + index), modalities=("audio",)) for index, name in enumerate("abcd")
    ]


def texts(groups) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group.completions] for group in groups]


def same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    assert max(float(gradient.abs().max()) for gradient in left.values()) > 1e-3
    for name, gradient in left.items():
        torch.testing.assert_close(right[name], gradient, rtol=0, atol=tolerance, msg=name)


def test_old_logprobs_stay_those_of_the_first_pass(builders, policy, prefixes):
    trainer = builders.trainer(policy, learning_rate=1e-2, iterations=2)
    groups = [builders.group(prefixes[0], [4, 3])]
    (pack,) = trainer.build_packs(groups, [builders.rewards(1.0, 0.0)])
    start = completion_logprobs(policy, pack.pack).logprob_T.detach()
    (first,) = [trainer.accumulate(pack, TokenMetrics())]
    trainer.update()
    second = trainer.accumulate(first, TokenMetrics())
    assert first.batch.old_C.tolist() == pytest.approx(start.tolist(), abs=1e-12)
    assert second.batch.old_C.equal(first.batch.old_C)
    assert not torch.allclose(completion_logprobs(policy, pack.pack).logprob_T, start, atol=1e-3)


@pytest.mark.parametrize(("iterations", "binds"), [(1, False), (2, True)])
def test_the_clip_can_bind_from_the_second_iteration_on(builders, policy, prefixes, iterations, binds):
    trainer = builders.trainer(policy, prefixes, learning_rate=1e-2, iterations=iterations)
    metrics = trainer.step().metrics
    assert (metrics["clip/fraction"] > 0) is binds
    assert (metrics["ratio/max"] > 1) is binds
    assert len(builders.gradients(trainer)) == iterations


def test_updates_leave_the_reference_alone(builders, policy, prefixes):
    reference = reference_copy(policy)
    before, start = builders.weights(reference), builders.weights(policy)
    trainer = builders.trainer(policy, prefixes, reference=reference, objective=ObjectiveConfig())
    first, second = trainer.step(), trainer.step()
    assert builders.moved(start, policy)
    assert not builders.moved(before, reference)
    assert first.metrics[Metric.KL] == pytest.approx(0, abs=1e-12)
    assert second.metrics[Metric.KL] > 1e-6


def test_a_kl_term_needs_a_reference(builders, policy):
    with pytest.raises(ValueError, match="kl_coefficient"):
        builders.trainer(policy, objective=ObjectiveConfig(kl_coefficient=0.1))


def test_an_update_raises_the_rewarded_and_lowers_the_punished(builders, policy, prefixes):
    trainer = builders.trainer(policy, learning_rate=1e-4)
    packs = trainer.build_packs([builders.group(prefixes[0], [5, 7])], [builders.rewards(1.0, 0.0)])
    pack = packs[0].pack

    def sequence_logprobs() -> Tensor:
        logprob_C = completion_logprobs(policy, pack).logprob_T.detach()
        return torch.zeros(2, dtype=logprob_C.dtype).index_add(0, pack.sequence_C, logprob_C)

    before = sequence_logprobs()
    trainer.accumulate(packs[0], TokenMetrics())
    trainer.update()
    rewarded, punished = (sequence_logprobs() - before).tolist()
    assert rewarded > 1e-4
    assert punished < -1e-4


def test_equal_rewards_move_nothing(builders, policy, prefixes):
    before = builders.weights(policy)
    trainer = builders.trainer(policy, prefixes, reward=lambda token_ids: 0.1)
    assert trainer.step().metrics[Metric.EQUAL_GROUPS] == 1.0
    assert not builders.moved(before, policy)


def test_dropped_prompts_leave_the_denominator(builders, fresh, prefixes):
    """Two of four prompts dropped: the gradient is that of a step over the other two, not half of it."""
    partly = builders.trainer(copy.deepcopy(fresh), prefixes)
    partly.sampler.source.unusable = {"a", "c"}
    report = partly.step()
    assert report.metrics[Metric.DROPPED] == 2
    assert report.metrics[Metric.SAMPLES] == 6
    assert {dropped.prompt_id for dropped in report.dropped} == {"a", "c"}
    whole = builders.trainer(copy.deepcopy(fresh), [prefixes[1], prefixes[3]])
    whole.step()
    same_gradients(builders.gradients(whole)[0], builders.gradients(partly)[0], 1e-10)


def test_a_step_without_usable_prompts_leaves_the_weights(builders, policy, prefixes):
    trainer = builders.trainer(policy, prefixes)
    trainer.step()  # So that AdamW has momentum that could move the weights.
    before = builders.weights(policy)
    trainer.sampler.source.unusable = set("abcd")
    report = trainer.step()
    assert not builders.moved(before, policy)
    assert (report.step, report.metrics[Metric.SAMPLES], report.metrics[Metric.DROPPED]) == (2, 0.0, 4.0)


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("grpo", [1 / (2 * 5)] * 2 + [1 / (6 * 5)] * 6 + [1 / 5] + [1 / (3 * 5)] * 3 + [1 / (4 * 5)] * 4),
        ("dapo", [1 / 16] * 16),
        ("dr_grpo", [1 / (5 * 20)] * 16),
    ],
    ids=["grpo", "dapo", "dr_grpo"],
)
@pytest.mark.parametrize("budget_rows", [4096, 75], ids=["one pack", "two packs"])
def test_token_weights_count_the_whole_batch(builders, policy, prefixes, form, weights, budget_rows):
    trainer = builders.trainer(
        policy,
        objective=ObjectiveConfig(loss=form, kl_coefficient=0.0),
        rollout=RolloutConfig(samples=2, max_new_tokens=20),
        budget_rows=budget_rows,
    )
    groups = [builders.group(prefixes[0], [2, 6, 1]), builders.group(prefixes[1], [3, 4])]
    packs = trainer.build_packs(groups, [builders.rewards(1, 0, 0), builders.rewards(0, 1)])
    assert len(packs) == (1 if budget_rows == 4096 else 2)
    assert torch.cat([pack.batch.weight_C for pack in packs]).tolist() == pytest.approx(weights, rel=1e-12)


@pytest.mark.parametrize("scale", [True, False], ids=["scaled", "not scaled"])
def test_each_token_carries_its_completions_advantage(builders, policy, prefixes, scale):
    trainer = builders.trainer(policy, advantage=AdvantageConfig(scale_by_std=scale, epsilon=0.0))
    groups = [builders.group(prefixes[0], [2, 1]), builders.group(prefixes[1], [1, 3])]
    (pack,) = trainer.build_packs(groups, [builders.rewards(4, 0), builders.rewards(0, 1)])
    first, second = (0.5**0.5, 0.5**0.5) if scale else (2.0, 0.5)
    assert pack.batch.advantage_C.tolist() == pytest.approx(
        [first, first, -first, -second, second, second, second]
    )


@dataclass(frozen=True, kw_only=True)
class ThreadWorld(World):
    """One of two ranks that live in threads of this process."""

    shared: list
    meeting: threading.Barrier

    def sum(self, tensor: Tensor) -> Tensor:
        self.shared[self.rank] = tensor
        self.meeting.wait()
        total = self.shared[0] + self.shared[1]
        self.meeting.wait()
        return total

    @classmethod
    def pair(cls) -> list["ThreadWorld"]:
        shared, meeting = [None, None], threading.Barrier(2, timeout=60)
        return [cls(rank=rank, size=2, shared=shared, meeting=meeting) for rank in range(2)]


@pytest.mark.parametrize("form", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("first_has", [1, 0, 3], ids=["uneven", "first rank empty", "second rank empty"])
def test_two_ranks_take_the_update_of_one(builders, fresh, prefixes, form, first_has):
    groups = [builders.group(prefix, [2, 3 + i], seed=i) for i, prefix in enumerate(prefixes[:3])]
    rewards = [builders.rewards(1, 0), builders.rewards(0, 1), builders.rewards(2, 0)]

    def train(world: World, mine: slice):
        trainer = builders.trainer(
            copy.deepcopy(fresh), world=world, objective=ObjectiveConfig(loss=form, kl_coefficient=0.0)
        )
        for pack in trainer.build_packs(groups[mine], rewards[mine]):
            trainer.accumulate(pack, TokenMetrics())
        trainer.update()
        return trainer

    alone = train(World(), slice(None))
    parts = [slice(None, first_has), slice(first_has, None)]
    with ThreadPoolExecutor(2) as threads:
        ranks = list(threads.map(train, ThreadWorld.pair(), parts))
    for trainer in ranks:
        same_gradients(builders.gradients(alone)[0], builders.gradients(trainer)[0], 1e-12)
    assert not builders.moved(builders.weights(ranks[0].policy), ranks[1].policy)


def test_ranks_share_out_the_prompts_of_a_step(builders, policy, prefixes):
    shares = [
        builders.trainer(policy, prefixes, world=World(rank=r, size=2)).sampler.batch(3) for r in range(2)
    ]
    assert [len(share) for share in shares] == [2, 2]
    assert {prompt.prompt_id for share in shares for prompt in share} == set("abcd")


def test_rollout_and_update_share_the_temperature(builders, prefixes):
    """Log-probs that the native engine reports are the trainer's old ones, in the dtype of training."""
    policy = builders.model(1, dtype=torch.float32)
    trainer = builders.trainer(policy, rollout=RolloutConfig(samples=3, max_new_tokens=8, temperature=0.6))
    groups = trainer.sampler.sample(prefixes, step=0)
    (pack,) = trainer.build_packs(groups, [builders.rewards(1, 0, 0) for _ in groups])
    pack = trainer.accumulate(pack, TokenMetrics())
    old_C, reported_C = pack.batch.old_C, pack.pack.rollout_logprob_C
    assert (old_C - reported_C).abs().max() < 1e-5
    assert (completion_logprobs(policy, pack.pack).logprob_T - reported_C).abs().max() > 1e-2
    assert trainer.compare_rollout([pack]).max == pytest.approx((old_C - reported_C).abs().max().item())


def test_the_logged_difference_is_of_the_weights_that_generated(builders, prefixes):
    policy = builders.model(1, dtype=torch.float32)
    metrics = builders.trainer(policy, prefixes, learning_rate=1e-2, iterations=3).step().metrics
    assert metrics["ratio/max"] > 1.01
    assert metrics[Metric.LOGPROB_DIFFERENCE_MAX] < 1e-5


def test_completions_do_not_depend_on_the_batch(builders, policy, prefixes):
    trainer = builders.trainer(policy)
    together = texts(trainer.sampler.sample(prefixes, step=0))
    assert together[2:3] == texts(trainer.sampler.sample(prefixes[2:3], step=0))
    assert together[::-1] == texts(trainer.sampler.sample(prefixes[::-1], step=0))


def test_samples_differ(builders, policy, prefixes):
    trainer = builders.trainer(policy)
    first, again = texts(trainer.sampler.sample([prefixes[0], prefixes[0]], step=0))
    assert len({*first, *again}) == 6, "twice the same prompt in one step must be six different samples"


def test_steps_and_run_seeds_differ(builders, policy, prefixes):
    sampler = builders.trainer(policy).sampler
    now = texts(sampler.sample(prefixes, step=0))
    assert texts(sampler.sample(prefixes, step=0)) == now
    sampler.engine.publish([], version=1)
    assert texts(sampler.sample(prefixes, step=1)) != now
    assert texts(builders.trainer(policy, seed=1).sampler.sample(prefixes, step=0)) != now


def test_completions_carry_the_version_that_made_them(builders, policy, prefixes):
    trainer = builders.trainer(policy, prefixes)
    reports = [trainer.step() for _ in range(3)]
    versions = [{c.oldest_version for group in r.groups for c in group.completions} for r in reports]
    assert versions == [{0}, {1}, {2}]


def test_a_prompt_over_the_budget_is_refused_before_the_rollout(builders, policy, prefixes):
    rows = max(len(prefix.token_ids_P) for prefix in prefixes) + 8
    builders.trainer(policy, prefixes, budget_rows=rows).step()
    trainer = builders.trainer(policy, prefixes, budget_rows=rows - 1)
    with pytest.raises(
        ValueError, match=rf"prompt 'd' may need {rows - 8} \+ 8 rows.*budget_rows is {rows - 1}"
    ):
        trainer.step()
    assert trainer.sampler.engine.counters.prefixes_prefilled == 0
    assert not builders.gradients(trainer)
