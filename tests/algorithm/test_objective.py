import math
from dataclasses import replace

import pytest
import torch

from omnigrpo.algorithm.objective import BatchCounts, ObjectiveConfig, kl_penalty, token_terms, token_weights

LOG = math.log


def terms(ratio, advantage, **switches: float):
    """Terms of single tokens with the given ratio to the old policy, float64."""
    logprob = torch.tensor([LOG(r) - 1.0 for r in ratio], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros_like(logprob)
    arguments = {"entropy_C": zeros, "old_C": zeros - 1.0, "reference_C": None, "rollout_C": zeros - 1.0}
    config = replace(ObjectiveConfig(kl_coefficient=0.0), **switches)
    result = token_terms(
        logprob, **arguments, advantage_C=torch.tensor(advantage, dtype=torch.float64), config=config
    )
    (gradient,) = torch.autograd.grad(result.loss_C.sum(), logprob)
    return result, gradient


def test_unclipped_token_has_the_policy_gradient():
    result, gradient = terms([1.0, 1.1], [2.0, -1.0])
    assert result.loss_C.tolist() == pytest.approx([-2.0, 1.1])
    assert gradient.tolist() == pytest.approx([-2.0, 1.1])
    assert not result.clipped_C.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "binds"),
    [
        (1.5, 1.0, -1.2, True),
        (1.5, -1.0, 1.5, False),
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),
    ],
    ids=["too high, good", "too high, bad", "too low, good", "too low, bad"],
)
def test_the_clip_binds_only_where_it_lowers_the_objective(ratio, advantage, loss, binds):
    result, gradient = terms([ratio], [advantage])
    assert result.loss_C.item() == pytest.approx(loss)
    assert bool(result.clipped_C) is binds
    assert (gradient.item() == 0.0) is binds


def test_clip_higher_moves_only_the_upper_edge():
    result, _ = terms([1.25, 0.75], [1.0, -1.0], clip_high=0.28)
    assert result.clipped_C.tolist() == [False, True]


def test_a_tie_at_the_edge_keeps_the_gradient():
    logprob = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, dtype=torch.float64)
    result = token_terms(
        logprob,
        entropy_C=zeros,
        old_C=zeros,
        reference_C=None,
        rollout_C=zeros,
        advantage_C=zeros + 1,
        config=ObjectiveConfig(clip_low=0.0, clip_high=0.0, kl_coefficient=0.0),
    )
    (gradient,) = torch.autograd.grad(result.loss_C.sum(), logprob)
    assert gradient.item() == -1.0


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", 0.3, 1.0), ("k2", 0.045, 0.3), ("k3", math.exp(-0.3) - 1 + 0.3, 1 - math.exp(-0.3))],
)
def test_kl_estimators(estimator, value, slope):
    logprob = torch.tensor([-0.7], dtype=torch.float64, requires_grad=True)
    kl = kl_penalty(logprob, torch.tensor([-1.0], dtype=torch.float64), estimator)
    (gradient,) = torch.autograd.grad(kl.sum(), logprob)
    assert kl.item() == pytest.approx(value)
    assert gradient.item() == pytest.approx(slope)


def test_k3_is_unbiased_for_the_exact_kl():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * kl_penalty(policy, reference, "k3")).sum().item() == pytest.approx(exact.item())


def test_kl_and_entropy_enter_the_loss():
    logprob = torch.tensor([-0.7], dtype=torch.float64)
    ones = torch.ones(1, dtype=torch.float64)
    config = ObjectiveConfig(kl_coefficient=0.5, kl_estimator="k2", entropy_coefficient=0.1)
    result = token_terms(
        logprob,
        entropy_C=3 * ones,
        old_C=logprob,
        reference_C=-ones,
        rollout_C=logprob,
        advantage_C=0 * ones,
        config=config,
    )
    assert result.loss_C.item() == pytest.approx(0.5 * 0.045 - 0.1 * 3)
    assert result.kl_C is not None
    assert result.kl_C.item() == pytest.approx(0.045)


def test_importance_weight_is_truncated():
    zeros = torch.zeros(2, dtype=torch.float64)
    result = token_terms(
        zeros,
        entropy_C=zeros,
        old_C=zeros,
        reference_C=None,
        advantage_C=zeros + 1,
        rollout_C=torch.tensor([LOG(2.0), -LOG(8.0)], dtype=torch.float64),
        config=ObjectiveConfig(kl_coefficient=0.0, max_importance_weight=2.0),
    )
    assert result.loss_C.tolist() == pytest.approx([-0.5, -2.0])


COUNTS = BatchCounts(num_sequences=2, num_tokens=5, max_tokens=10)


@pytest.mark.parametrize(
    ("form", "weights"),
    [
        ("grpo", [0.25, 0.25, 1 / 6, 1 / 6, 1 / 6]),
        ("dapo", [0.2] * 5),
        ("dr_grpo", [0.05] * 5),
    ],
)
def test_token_weights(form, weights):
    lengths = torch.tensor([2, 2, 3, 3, 3])
    assert token_weights(form, lengths, COUNTS).tolist() == pytest.approx(weights)


def test_r1_omnis_loss_form():
    """mean over sequences of sum(mask * -(exp(lp - sg(lp)) A + ...)) / sum(mask), written out (facts, section 4.3)."""
    torch.manual_seed(1)
    lengths = [3, 1, 4]
    logprob = torch.randn(8, dtype=torch.float64).sub(2).requires_grad_()
    reference = torch.randn(8, dtype=torch.float64) - 2
    advantage_S = torch.tensor([0.5, -1.5, 1.0], dtype=torch.float64)
    sequence = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    spelt = torch.zeros((), dtype=torch.float64)
    for s, (lp, ref) in enumerate(zip(logprob.split(lengths), reference.split(lengths), strict=True)):
        kl = torch.exp(ref - lp) - (ref - lp) - 1
        spelt = spelt + (-(torch.exp(lp - lp.detach()) * advantage_S[s]) + 0.04 * kl).mean() / 3
    result = token_terms(
        logprob,
        entropy_C=torch.zeros(8),
        old_C=logprob.detach(),
        reference_C=reference,
        rollout_C=logprob.detach(),
        advantage_C=advantage_S[sequence],
        config=ObjectiveConfig(),
    )
    counts = BatchCounts(num_sequences=3, num_tokens=8, max_tokens=4)
    mine = (token_weights("grpo", torch.tensor(lengths)[sequence], counts) * result.loss_C).sum()
    assert mine.item() == pytest.approx(spelt.item(), abs=1e-14)
    gradients = [torch.autograd.grad(loss, logprob, retain_graph=True)[0] for loss in (mine, spelt)]
    assert torch.allclose(*gradients, atol=1e-14, rtol=0)
