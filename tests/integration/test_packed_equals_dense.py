"""The trainer's packed loss and gradients against each sequence alone and full logits, in float64."""

from dataclasses import replace

import pytest
import torch

from omnigrpo.algorithm.token_metrics import TokenMetrics
from omnigrpo.metrics import Metric
from omnigrpo.model.humanomni import reference_copy
from omnigrpo.trainer import RolloutConfig
from omnigrpo_kernels.grpo_objective import ObjectiveConfig
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

TEMPERATURE = 0.8
REWARDS = [[1.0, 0.0, 0.4], [0.3], [2.0, -1.0]]
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


def packed_loss(builders, models, groups, old_shift, budget_rows):
    """What the trainer makes of the groups; ``old_shift`` is log of the ratio to the old policy."""
    policy, reference = models
    trainer = builders.trainer(
        policy,
        reference=reference,
        objective=OBJECTIVE,
        budget_rows=budget_rows,
        rollout=RolloutConfig(samples=3, temperature=TEMPERATURE),
    )
    packs = trainer.build_packs(groups, [builders.rewards(*totals) for totals in REWARDS])
    metrics = TokenMetrics()
    if old_shift:
        fixed = [trainer.accumulate(item, TokenMetrics()) for item in packs]
        policy.zero_grad()
        packs = [
            replace(item, batch=replace(item.batch, old_C=item.batch.old_C - old_shift)) for item in fixed
        ]
    for item in packs:
        trainer.accumulate(item, metrics)
    return metrics.summary()[Metric.LOSS], len(packs)


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


def dense_loss(models, groups, old_shift):
    """Mean over all sequences of the mean over tokens, one sequence at a time."""
    policy, reference = models
    loss = torch.zeros((), dtype=torch.float64)
    for group, totals in zip(groups, REWARDS, strict=True):
        for completion, advantage in zip(group.completions, dense_advantages(totals), strict=True):
            logprob, entropy = sequence_statistics(policy, group, completion)
            with torch.no_grad():
                reference_logprob, _ = sequence_statistics(reference, group, completion)
            ratio = torch.exp(logprob - (logprob.detach() - old_shift))
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            log_ratio = reference_logprob - logprob
            kl = torch.exp(log_ratio) - log_ratio - 1
            loss = loss + (-surrogate + 0.04 * kl - 0.01 * entropy).mean() / 6
    loss.backward()
    return loss.item()


def taken_gradients(model):
    taken = {name: p.grad.clone() for name, p in model.trainable_parameters().items()}
    model.zero_grad()
    return taken


@pytest.mark.parametrize(("budget_rows", "num_packs"), [(10_000, 1), (170, 2)], ids=["one pack", "two packs"])
@pytest.mark.parametrize(
    "old_shift",
    [0.0, 0.1, -0.1, 0.5, -0.5],
    ids=["ratio 1", "above 1", "below 1", "beyond the upper clip", "beyond the lower clip"],
)
def test_loss_and_every_gradient(builders, models, groups, old_shift, budget_rows, num_packs):
    policy, _ = models
    policy.zero_grad()
    mine, packs = packed_loss(builders, models, groups, old_shift, budget_rows)
    packed_gradients = taken_gradients(policy)
    spelt, dense_gradients = dense_loss(models, groups, old_shift), taken_gradients(policy)
    assert packs == num_packs
    assert mine == pytest.approx(spelt, rel=0, abs=1e-9)
    assert packed_gradients.keys() == policy.trainable_parameters().keys()
    for name, gradient in dense_gradients.items():
        assert gradient.abs().max() > 1e-7, f"{name} gets no gradient to compare"
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=1e-9, msg=name)
