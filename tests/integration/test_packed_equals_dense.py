"""The trainer's packed loss and gradients against each sequence alone and full logits, in float64."""

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch

from omnigrpo.algorithm.token_metrics import TokenMetrics
from omnigrpo.metrics import Metric
from omnigrpo.model.humanomni import reference_copy
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo_kernels.grpo_objective import LossForm, ObjectiveConfig
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

TEMPERATURE = 0.8
REWARDS = [[1.0, 0.0, 0.4], [0.3], [2.0, -1.0]]
Shift = float | torch.Tensor
OBJECTIVE = ObjectiveConfig(kl_coefficient=0.04, entropy_coefficient=0.01)


@pytest.fixture(scope="module")
def models(builders):
    torch.manual_seed(0)
    policy = builders.model(1)
    reference = reference_copy(policy)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.02 * torch.randn_like(parameter)
    return policy, reference


@pytest.fixture(scope="module")
def groups(builders):
    return [
        builders.group(builders.inputs("both", text=(5, 9)), [6, 1, 11], seed=1),
        builders.group(builders.inputs("sound", text=(3, 2), modalities=("audio",)), [1], seed=2),
        builders.group(builders.inputs("sight", text=(2, 7), modalities=("video",)), [4, 8], seed=3),
    ]


def packed_update(
    builders, models, groups, rewards, budget_rows, *, old_shift: Shift = 0.0, objective=OBJECTIVE
):
    """Summary of what the trainer makes of the groups, and its packs; ``old_shift`` is log of the ratio to the
    old policy, one number or one per token of the only pack."""
    policy, reference = models
    trainer = builders.trainer(
        policy,
        reference=reference,
        objective=objective,
        budget_rows=budget_rows,
        rollout=RolloutConfig(samples=3, temperature=TEMPERATURE),
    )
    packs = trainer.build_packs(groups, [builders.rewards(*totals) for totals in rewards])
    metrics = TokenMetrics()
    if isinstance(old_shift, torch.Tensor) or old_shift:
        fixed = [trainer.accumulate(item, TokenMetrics()) for item in packs]
        policy.zero_grad()
        packs = [
            replace(item, batch=replace(item.batch, old_C=item.batch.old_C - old_shift)) for item in fixed
        ]
    for item in packs:
        trainer.accumulate(item, metrics)
    return metrics.summary(), packs


def sequence_statistics(model, group, completion):
    """Log-prob and entropy of a completion from one plain causal sequence and full logits."""
    ids = torch.tensor(completion.token_ids)
    rows = torch.cat([model.embed_prefixes([group.inputs]), model.embed_tokens(ids)])
    layout = SharedPrefixLayout(prefix_lengths=(len(rows),), completion_lengths=((),))
    logits = model.decoder(rows, torch.arange(len(rows)), layout) @ model.head_weight_VD.T
    logprobs = (logits[-len(ids) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(1, ids[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def dense_advantages(totals):
    """(r - mean) / (unbiased std + 1e-4), spelt out; 0 for a group of one."""
    mean = sum(totals) / len(totals)
    if len(totals) == 1:
        return [0.0]
    std = (sum((total - mean) ** 2 for total in totals) / (len(totals) - 1)) ** 0.5
    return [(total - mean) / (std + 1e-4) for total in totals]


def dense_loss(models, groups, rewards, old_shift):
    """Mean over all sequences of the mean over tokens, one sequence at a time."""
    policy, reference = models
    loss = torch.zeros((), dtype=torch.float64)
    num_sequences = sum(len(group.completions) for group in groups)
    for group, totals in zip(groups, rewards, strict=True):
        for completion, advantage in zip(group.completions, dense_advantages(totals), strict=True):
            logprob, entropy = sequence_statistics(policy, group, completion)
            with torch.no_grad():
                reference_logprob, _ = sequence_statistics(reference, group, completion)
            ratio = torch.exp(logprob - (logprob.detach() - old_shift))
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            log_ratio = reference_logprob - logprob
            kl = torch.exp(log_ratio) - log_ratio - 1
            loss = loss + (-surrogate + 0.04 * kl - 0.01 * entropy).mean() / num_sequences
    loss.backward()
    return loss.item()


def taken_gradients(model):
    taken = {name: p.grad.clone() for name, p in model.trainable_parameters().items()}
    model.zero_grad()
    return taken


def assert_equals_dense(builders, models, groups, rewards, old_shift, budget_rows):
    """Loss and every gradient; returns the trainer's packs."""
    policy, _ = models
    policy.zero_grad()
    summary, packs = packed_update(builders, models, groups, rewards, budget_rows, old_shift=old_shift)
    packed_gradients = taken_gradients(policy)
    spelt, dense_gradients = dense_loss(models, groups, rewards, old_shift), taken_gradients(policy)
    assert summary[Metric.LOSS] == pytest.approx(spelt, rel=0, abs=1e-9)
    assert packed_gradients.keys() == policy.trainable_parameters().keys()
    for name, gradient in dense_gradients.items():
        assert gradient.abs().max() > 1e-7, f"{name} gets no gradient to compare"
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=1e-9, msg=name)
    return packs


@pytest.mark.parametrize(
    ("budget_rows", "num_packs"),
    [(10_000, 1), (170, 2), (112, 3)],
    ids=["one pack", "two packs", "first group split"],
)
@pytest.mark.parametrize(
    "old_shift",
    [0.0, 0.1, -0.1, 0.5, -0.5],
    ids=["ratio 1", "above 1", "below 1", "beyond the upper clip", "beyond the lower clip"],
)
def test_loss_and_every_gradient(builders, models, groups, old_shift, budget_rows, num_packs):
    packs = assert_equals_dense(builders, models, groups, REWARDS, old_shift, budget_rows)
    assert len(packs) == num_packs
    assert (packs[0].pack.num_rows > budget_rows) == (num_packs == 3)


def random_groups(builders, seed):
    """A group with both modalities and one with sound, uneven, with one-token completions and groups of one."""
    draw = random.Random(seed)
    groups, rewards = [], []
    for name, modalities in (("both", ("video", "audio")), ("sound", ("audio",))):
        lengths = [draw.choice((1, draw.randint(1, 14))) for _ in range(draw.choice((1, 3, 5)))]
        inputs = builders.inputs(
            f"{name} {seed}", text=(draw.randint(1, 9), draw.randint(1, 9)), modalities=modalities
        )
        groups.append(builders.group(inputs, lengths, seed=seed))
        rewards.append([draw.random() for _ in lengths])
    return groups, rewards


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("seed", range(4))
def test_random_groups(builders, models, seed, split):
    groups, rewards = random_groups(builders, seed)
    tightest = max(
        len(group.inputs.token_ids_P) + len(completion.token_ids)
        for group in groups
        for completion in group.completions
    )
    assert_equals_dense(builders, models, groups, rewards, 0.1, tightest if split else 10_000)


@pytest.mark.parametrize("loss", get_args(LossForm))
def test_a_split_group_takes_the_update_of_a_whole_one(builders, models, loss):
    """Every objective: loss, token metrics and gradients, with ratios that differ within each sequence."""
    policy, _ = models
    group = builders.group(builders.inputs("both", text=(5, 9)), [6, 1, 11, 3, 1, 8], seed=1)
    shift_C = 0.4 * torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = replace(OBJECTIVE, loss=loss, max_importance_weight=1.5)
    taken = []
    for budget_rows in (10_000, 100 + 11):
        policy.zero_grad()
        summary, (training_pack,) = packed_update(
            builders,
            models,
            [group],
            [[1.0, 0.0, 0.4, 0.3, 2.0, 0.7]],
            budget_rows,
            old_shift=shift_C,
            objective=objective,
        )
        assert training_pack.pack.num_rows == 130
        taken.append((summary, taken_gradients(policy)))
    (whole, whole_gradients), (split, split_gradients) = taken
    assert split.pop("head/dropped_rows") == pytest.approx(whole.pop("head/dropped_rows"), abs=0.1)
    assert split == pytest.approx(whole, rel=0, abs=1e-9)
    assert split_gradients.keys() == whole_gradients.keys()
    for name, gradient in whole_gradients.items():
        torch.testing.assert_close(split_gradients[name], gradient, rtol=0, atol=1e-9, msg=name)
