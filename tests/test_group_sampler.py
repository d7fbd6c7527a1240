"""GroupSampler: sampling ahead of the update, stale tokens, memory, and what a resumed run goes on with."""

import copy
import json
from typing import Any

import pytest
import torch

from omnigrpo.metrics import Metric
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.rollout.interface import RolloutError
from omnigrpo_kernels.grpo_objective import ObjectiveConfig

WEIGHTED = ObjectiveConfig(kl_coefficient=0.0, max_importance_weight=2.0)
OVERLAPPED: dict[str, Any] = {"overlap_update": True, "max_staleness": 1}


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


def tokens(groups) -> dict[str, list[tuple[int, ...]]]:
    return {group.inputs.prompt.prompt_id: [c.token_ids for c in group.completions] for group in groups}


def overlapped(builders, policy, prefixes, **more):
    return builders.trainer(
        policy,
        prefixes,
        engine=builders.OwnWeightsEngine(policy),
        rollout=RolloutConfig(samples=3, max_new_tokens=8, **OVERLAPPED),
        objective=WEIGHTED,
        learning_rate=1e-2,
        **more,
    )


def test_overlapped_steps_learn_from_the_weights_before(builders, policy, prefixes):
    """Step k's samples are those that the weights before its last update draw, and are reported as that old."""
    trainer = overlapped(builders, policy, prefixes)
    before = [copy.deepcopy(policy)]
    reports = []
    for _ in range(3):
        reports.append(trainer.step())
        before.append(copy.deepcopy(policy))
    versions = [{c.oldest_version for g in report.groups for c in g.completions} for report in reports]
    assert versions == [{0}, {0}, {1}]
    assert [report.metrics[Metric.STALENESS] for report in reports] == [0, 1, 1]
    on_policy = builders.trainer(before[1], prefixes, objective=WEIGHTED).sampler
    on_policy.engine.publish([], version=2)
    assert tokens(reports[2].groups) == tokens(on_policy.sample(prefixes, step=2))


def test_the_next_step_is_begun_before_the_update(builders, policy, prefixes):
    trainer = overlapped(builders, policy, prefixes)
    trainer.sampler.take(0)
    assert len(trainer.sampler.engine.requests) == 2
    trainer.sampler.take(1)
    assert len(trainer.sampler.engine.requests) == 3


def test_off_policy_tokens_are_weighted(builders, policy, prefixes):
    trainer = overlapped(builders, policy, prefixes)
    first, second = trainer.step(), trainer.step()
    assert first.metrics["importance/mean"] == pytest.approx(1, abs=1e-5)
    assert abs(second.metrics["importance/mean"] - 1) > 1e-3
    assert second.metrics[Metric.LOGPROB_DIFFERENCE_MAX] > 1e-3


def test_off_policy_sampling_without_weights_is_refused(builders, policy):
    with pytest.raises(ValueError, match=r"max_staleness is 1.*max_importance_weight is left out"):
        builders.trainer(policy, rollout=RolloutConfig(max_staleness=1))


def test_an_engine_that_shares_the_weights_cannot_overlap(builders, policy):
    with pytest.raises(ValueError, match="overlap_update needs an engine with weights of its own"):
        builders.trainer(policy, rollout=RolloutConfig(**OVERLAPPED), objective=WEIGHTED)


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"overlap_update": True}, "tokens that are 1 updates old, but rollout.max_staleness is 0"),
        ({"token_budget": 128}, "tokens that are 3 updates old, but rollout.max_staleness is 0"),
        (
            {"token_budget": 128, **OVERLAPPED},
            "tokens that are 4 updates old, but rollout.max_staleness is 1",
        ),
        ({"token_budget": 0, "max_staleness": 1}, "token_budget must be >= 1"),
        ({"max_staleness": -1}, "max_staleness must be at least 0"),
        ({**OVERLAPPED, "release_memory": True}, "choose one"),
        ({"engine": "sglang", "release_memory": True}, "set rollout.sglang.memory_saver=true"),
    ],
)
def test_modes_that_exclude_each_other_are_refused(switches, message):
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**switches)


@pytest.mark.parametrize(
    ("version", "allowed"), [(2, 0), (1, 1), (4, 1)], ids=["old", "older", "from the future"]
)
def test_tokens_of_weights_that_are_too_old_or_unknown_end_the_run(
    builders, policy, prefixes, version, allowed
):
    config = RolloutConfig(samples=3, max_new_tokens=8, max_staleness=allowed)
    sampler = builders.trainer(policy, prefixes, rollout=config, objective=WEIGHTED).sampler
    sampler.engine.publish([], version=version)
    with pytest.raises(RolloutError, match=rf"step 3 got tokens of weight version {version}"):
        sampler.take(3)


def test_memory_is_the_updates_between_sampling_and_publishing(builders, policy, prefixes):
    engine = builders.OwnWeightsEngine(policy)
    trainer = builders.trainer(
        policy,
        prefixes,
        engine=engine,
        rollout=RolloutConfig(samples=3, max_new_tokens=8, release_memory=True),
    )
    trainer.step()
    trainer.step()
    assert engine.memory == ["held", *["released", "held"] * 2]


def test_a_run_that_sampled_ahead_resumes_with_those_samples(builders, policy, prefixes):
    """Through JSON, into a trainer with the saved weights: the same tokens are learnt from, and the same update."""
    straight = overlapped(builders, policy, prefixes)
    straight.step()
    saved = json.loads(json.dumps(straight.sampler.state_dict()))
    resumed_policy = copy.deepcopy(policy)
    optimizer_state = copy.deepcopy(straight.optimizer._inner.state_dict())
    expected = straight.step()

    resumed = overlapped(builders, resumed_policy, prefixes)
    resumed.steps_done = 1
    resumed.optimizer._inner.load_state_dict(optimizer_state)
    resumed.sampler.load_state_dict(saved)
    resumed.sampler.engine.publish([(n, p.detach()) for n, p in resumed_policy.named_parameters()], version=1)
    report = resumed.step()
    assert tokens(report.groups) == tokens(expected.groups)
    assert report.metrics[Metric.LOSS] == expected.metrics[Metric.LOSS]
    assert not builders.moved(builders.weights(policy), resumed_policy)
    assert {c.oldest_version for g in report.groups for c in g.completions} == {0}


def test_the_saved_state_is_of_the_last_published_step(builders, policy, prefixes):
    """An interrupt in the middle of a step must not lose what the last complete step left."""
    trainer = overlapped(builders, policy, prefixes)
    trainer.step()
    saved = trainer.sampler.state_dict()
    trainer.sampler.take(1)
    assert trainer.sampler.state_dict() == saved


def test_a_failure_after_the_update_leaves_a_state_to_resume_from(builders, policy, prefixes):
    """The update is done, so the step counts; what was sampled ahead is sampled anew."""
    scored: list[int] = []

    def reward(token_ids):
        scored.append(len(token_ids))
        if len(scored) > 15:
            raise KeyError("the reward service is gone")
        return float(len(token_ids))

    trainer = overlapped(builders, policy, prefixes, reward=reward)
    with pytest.raises(KeyError):
        trainer.step()
    assert trainer.steps_done == 1
    assert len(builders.gradients(trainer)) == 1
    assert trainer.sampler.state_dict() == {"carried": [], "ahead": None}


def test_an_error_closes_the_stream(builders, policy, prefixes):
    trainer = builders.trainer(policy, prefixes)
    trainer.sampler._rewards = None
    with pytest.raises(AttributeError):
        trainer.sampler.take(0)
    trainer.sampler.engine.release_memory()  # Which refuses while a stream is under way.


def test_samples_of_other_prompts_are_not_taken_for_a_steps_own(builders, policy, prefixes):
    """A clip that has become unusable since, and another instead: the step ahead is sampled anew."""
    straight = overlapped(builders, policy, prefixes[:2])
    straight.step()
    saved = json.loads(json.dumps(straight.sampler.state_dict()))
    assert [name for name, _ in saved["ahead"]["jobs"]] != []
    saved["ahead"]["jobs"][0][0] = "another"
    resumed = overlapped(builders, copy.deepcopy(policy), prefixes[:2])
    resumed.sampler.load_state_dict(saved)
    resumed.sampler.engine.publish([], version=1)
    before = len(resumed.sampler.engine.requests)
    resumed.sampler.take(1)
    assert len(resumed.sampler.engine.requests) == before + 2, "step 1 anew, and step 2 ahead"


def test_a_half_sampled_group_without_its_prompt_says_so(builders, policy, prefixes):
    trainer = carrying(builders, policy, prefixes, learning_rate=0.0)
    trainer.step()
    saved = trainer.sampler.state_dict()
    saved["carried"][0]["prompt_id"] = "gone"
    with pytest.raises(
        ValueError, match=r"'gone' is half sampled, but cannot go on: it is not in the data set"
    ):
        trainer.sampler.load_state_dict(saved)


def test_closing_aborts_what_is_sampled_ahead(builders, policy, prefixes):
    trainer = overlapped(builders, policy, prefixes)
    trainer.sampler.take(0)
    trainer.sampler.close()
    trainer.sampler.take(1)
    assert len(trainer.sampler.engine.requests) == 4, "step 1 was sampled anew, and step 2 ahead"


def test_frozen_weights_are_not_published(builders, policy, prefixes):
    trainer = overlapped(builders, policy, prefixes)
    names: list[str] = []
    publish = trainer.sampler.engine.publish

    def record(weights, version):
        weights = list(weights)
        names.extend(name for name, _ in weights)
        publish(weights, version)

    trainer.sampler.engine.publish = record
    trainer.step()
    assert names == list(policy.trainable_parameters())
    assert not any("tower" in name for name in names)
    assert torch.isfinite(policy.head_weight_VD).all()


def carrying(builders, policy, prefixes, learning_rate: float):
    """Three tokens a step, of eight at most."""
    config = RolloutConfig(samples=3, max_new_tokens=8, token_budget=3, max_staleness=3)
    return builders.trainer(policy, prefixes, rollout=config, objective=WEIGHTED, learning_rate=learning_rate)


def test_groups_that_take_several_steps_end_as_those_of_one(builders, policy, prefixes):
    """Without updates, a group sampled three tokens a step has the tokens that one call would have given."""
    trainer = carrying(builders, policy, prefixes, learning_rate=0.0)
    whole = builders.trainer(copy.deepcopy(policy), prefixes).sampler
    expected = {}
    for step in range(4):
        whole.engine.publish([], version=step)
        for name, drawn in tokens(whole.take(step).groups).items():
            expected[name, step] = drawn
    reports = [trainer.step() for _ in range(4)]
    ended = [group for report in reports for group in report.groups]
    assert all(completion.is_finished for group in ended for completion in group.completions)
    assert [report.metrics[Metric.CARRIED] > 0 for report in reports] == [True] * 4
    found = set()
    for group in ended:
        drawn = [completion.token_ids for completion in group.completions]
        (key,) = [key for key, wanted in expected.items() if wanted == drawn]
        found.add(key)
    assert len(found) == len(ended)
    assert {key for key in expected if key[1] <= 1} <= found, "what began two steps ago must have ended"


def test_tokens_know_the_weights_that_drew_them(builders, policy, prefixes):
    trainer = carrying(builders, policy, prefixes, learning_rate=1e-2)
    reports = [trainer.step() for _ in range(4)]
    completions = [c for report in reports for g in report.groups for c in g.completions]
    longest = [c for c in completions if len(c.token_ids) == 8]
    assert longest
    for completion in longest:
        first = completion.oldest_version
        assert [(s.version - first, s.num_tokens) for s in completion.version_spans] == [
            (0, 3),
            (1, 3),
            (2, 2),
        ]
    assert reports[2].metrics[Metric.STALENESS] > 0.5
    assert reports[2].metrics["logprob_difference/max"] > 1e-3


def test_a_step_in_which_no_group_ends_learns_nothing(builders, policy, prefixes):
    trainer = carrying(builders, policy, prefixes, learning_rate=1e-2)
    trainer.sampler._prompt_encoder.stop_token_ids = ()
    before = builders.weights(policy)
    report = trainer.step()
    assert (report.metrics[Metric.SAMPLES], report.metrics[Metric.CARRIED]) == (0, 4)
    assert not builders.moved(before, policy)


def test_half_sampled_groups_resume(builders, policy, prefixes):
    """Through JSON, into a trainer with the saved weights: the same tokens are learnt from, and the same update."""
    straight = carrying(builders, policy, prefixes, learning_rate=1e-2)
    for _ in range(2):
        straight.step()
    saved = json.loads(json.dumps(straight.sampler.state_dict()))
    assert saved["carried"]
    resumed_policy = copy.deepcopy(policy)
    optimizer_state = copy.deepcopy(straight.optimizer._inner.state_dict())
    expected = [straight.step() for _ in range(2)]

    resumed = carrying(builders, resumed_policy, prefixes, learning_rate=1e-2)
    resumed.steps_done = 2
    resumed.optimizer._inner.load_state_dict(optimizer_state)
    resumed.sampler.load_state_dict(saved)
    resumed.sampler.engine.publish([], version=2)
    for report in expected:
        again = resumed.step()
        assert [g.completions for g in again.groups] == [g.completions for g in report.groups]
        assert again.metrics[Metric.LOSS] == report.metrics[Metric.LOSS]
    assert not builders.moved(builders.weights(policy), resumed_policy)


def test_a_half_sampled_group_without_its_clip_says_so(builders, policy, prefixes):
    trainer = carrying(builders, policy, prefixes, learning_rate=0.0)
    trainer.step()
    saved = trainer.sampler.state_dict()
    trainer.sampler.source.unusable = {saved["carried"][0]["prompt_id"]}
    with pytest.raises(ValueError, match=r"half sampled, but cannot go on: .*\.mp4 is missing"):
        trainer.sampler.load_state_dict(saved)
