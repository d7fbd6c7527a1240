"""Agreement of rollout and trainer: the figures by hand, the limits, and the report of a disagreement."""

import math
from dataclasses import replace

import pytest
import torch

from omnigrpo.algorithm.agreement import AgreementConfig, DisagreementError, agreement
from omnigrpo.rollout.config import RolloutConfig


def test_figures_by_hand():
    trainer_C = torch.tensor([-1.0, -2.0, -3.0, -0.5], dtype=torch.float64)
    rollout_C = torch.tensor([-1.0, -2.2, -2.7, -0.5], dtype=torch.float64)
    figures = agreement(trainer_C, rollout_C, bound=0.25)
    assert figures.mean == pytest.approx(0.125)
    assert figures.max == figures.p99 == pytest.approx(0.3)
    assert figures.share_beyond == 0.25
    assert figures.kl == pytest.approx((math.exp(0.2) - 1 - 0.2 + math.exp(-0.3) - 1 + 0.3) / 4)


def test_p99_is_the_nearest_rank():
    difference_C = torch.arange(1, 201).double()[torch.randperm(200)]
    assert agreement(difference_C, torch.zeros(200), bound=1.0).p99 == 198


def test_no_tokens_agree():
    figures = agreement(torch.empty(0), torch.empty(0), bound=0.1)
    assert figures.violations(AgreementConfig(max_mean=0.0, max_kl=0.0, max_share_beyond=0.0)) == []


@pytest.mark.parametrize("limit", ["max_mean", "max_kl", "max_share_beyond"])
def test_each_limit_is_exceeded_above_it_only(limit):
    figures = agreement(torch.tensor([-1.0, -1.5]), torch.tensor([-1.0, -1.0]), bound=0.1)
    at = getattr(figures, limit.removeprefix("max_"))
    assert figures.violations(AgreementConfig(**{limit: at})) == []
    (violation,) = figures.violations(AgreementConfig(**{limit: at * 0.99}))
    assert f"agreement.{limit}" in violation


def test_nan_exceeds_every_limit():
    figures = agreement(torch.tensor([-1.0, math.nan]), torch.tensor([-1.0, -1.0]), bound=0.1)
    assert len(figures.violations(AgreementConfig(max_mean=1e9, max_kl=1e9))) == 2
    assert figures.share_beyond == 0.5


@pytest.mark.parametrize(("name", "value"), [("bound", 0.0), ("max_mean", -1.0), ("max_kl", math.nan)])
def test_limits_that_mean_nothing_are_refused(name, value):
    with pytest.raises(ValueError, match=f"agreement.{name}"):
        AgreementConfig(**{name: value})


class Distorting:
    """An engine whose log-probs are off by a known amount for one token."""

    def __init__(self, engine, by: float) -> None:
        self._engine, self._by = engine, by

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def generate(self, requests, sampling):
        for done in self._engine.generate(requests, sampling):
            first, *others = done.completions
            if requests[done.index].prefix.inputs.prompt.prompt_id == "b":
                logprobs = (*first.logprobs[:2], first.logprobs[2] - self._by, *first.logprobs[3:])
                first = replace(first, logprobs=logprobs)
            yield replace(done, completions=(first, *others))


@pytest.fixture
def policy(builders):
    return builders.model(1)


@pytest.fixture
def prefixes(builders):
    return [builders.inputs(name, text=(3, 2), modalities=("audio",)) for name in "abc"]


def trainer_of(builders, policy, prefixes, config):
    trainer = builders.trainer(
        policy, prefixes, agreement=config, rollout=RolloutConfig(samples=2, max_new_tokens=6)
    )
    trainer.sampler.engine = Distorting(trainer.sampler.engine, by=3.0)
    trainer.sampler._prompt_encoder.stop_token_ids = ()
    return trainer


def test_a_disagreement_ends_the_step_before_the_update(builders, policy, prefixes):
    trainer = trainer_of(builders, policy, prefixes, AgreementConfig(max_share_beyond=0.01))
    before = builders.weights(policy)
    with pytest.raises(
        DisagreementError, match=r"step 1: .*share_beyond.*token 2 of sample 0 of prompt 'b'"
    ) as error:
        trainer.step()
    assert not builders.moved(before, policy)
    assert all(parameter.grad is None for parameter in policy.parameters()), (
        "the next step must not add to them"
    )
    report = error.value.report
    assert report["agreement"]["max"] == pytest.approx(3.0, abs=1e-5)
    assert report["agreement"]["share_beyond"] == pytest.approx(1 / 36)
    worst = report["worst_tokens"][0]
    assert worst["trainer_logprob"] - worst["rollout_logprob"] == pytest.approx(3.0, abs=1e-5)
    assert worst["token_id"] >= 0
    assert len(report["worst_tokens"]) == 20


def test_within_the_limits_the_figures_are_logged(builders, policy, prefixes):
    metrics = trainer_of(builders, policy, prefixes, AgreementConfig(max_share_beyond=0.5)).step().metrics
    assert metrics["logprob_difference/max"] == pytest.approx(3.0, abs=1e-5)
    assert metrics["logprob_difference/mean"] == pytest.approx(3 / 36, abs=1e-5)
    assert metrics["logprob_difference/kl"] == pytest.approx((math.exp(3) - 4) / 36, rel=1e-4)
