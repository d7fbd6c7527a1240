"""The faithful preset's GRPO step against the published loss, spelt out one sequence at a time, in float32.

The statement: for each of 16 completions the prefix is embedded anew and joined with it, transformers' Qwen2 runs that
one sequence, log_softmax is taken over all logits, and

    loss = mean over sequences of mean over tokens of -exp(lp - lp.detach()) A + beta (exp(ref - lp) - (ref - lp) - 1)
    A = (r - mean of the group) / (unbiased standard deviation of the group + 1e-4)

BERT trains but its dropout is off here: the reference's eight copies of a prompt draw a mask each, the engine's one.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import Qwen2Config, Qwen2ForCausalLM

from omnigrpo.algorithm.advantage import AdvantageConfig
from omnigrpo.config import RunConfig, load_config
from omnigrpo.metrics import Metric
from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.humanomni import HumanOmni, reference_copy
from omnigrpo.schema import Completion, Group
from omnigrpo_kernels.grpo_objective import ObjectiveConfig

Reward = Callable[[Sequence[int]], float]
Compare = Callable[[RunConfig, Reward], tuple[float, float]]
BETA = 0.04
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def preset() -> RunConfig:
    with as_file(files("omnigrpo") / "presets" / "r1_omni_faithful.toml") as path:
        return load_config(
            path, ["model.path=base", "data.train=rl.json", "run.output=run", "rollout.max_new_tokens=24"]
        )


@pytest.fixture(scope="module")
def models(builders) -> tuple[HumanOmni, HumanOmni]:
    """A policy whose BERT trains, and a reference of other weights."""
    policy = builders.model(1, dtype=torch.float32)
    policy.configure_bert(trainable=True)
    reference = reference_copy(policy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


@pytest.fixture(scope="module")
def transformers_decoder(builders) -> Qwen2ForCausalLM:
    """Without weights of its own: every call lends it a model's."""
    sizes: DecoderConfig = builders.CONFIG.decoder
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            intermediate_size=sizes.ffn_width,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            max_position_embeddings=sizes.max_positions,
            rms_norm_eps=sizes.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
            tie_word_embeddings=True,
            attn_implementation="eager",  # pyright: ignore[reportCallIssue] - transformers takes it as a keyword
        )
    )


def dense_logprobs(
    model: HumanOmni, decoder: Qwen2ForCausalLM, group: Group, completion: Completion
) -> Tensor:
    """Log-probs ``[R]`` of one completion: its own prefix, its own pass, all logits."""
    ids = torch.tensor(completion.token_ids)
    rows = torch.cat([model.embed_prefixes([group.inputs]), model.embed_tokens(ids)])
    known = dict(decoder.named_parameters())
    weights: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if name in known}
    assert len(weights) == len(known)
    logits = functional_call(
        decoder, weights, kwargs={"inputs_embeds": rows[None], "use_cache": False}
    ).logits
    logits_RV = logits[0, :-1][-len(ids) :]
    return logits_RV.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def dense_loss(
    policy: HumanOmni,
    reference: HumanOmni,
    decoder: Qwen2ForCausalLM,
    groups: Sequence[Group],
    rewards: Sequence[Sequence[float]],
) -> Tensor:
    of_sequences = []
    for group, totals in zip(groups, rewards, strict=True):
        r = torch.tensor(totals)
        advantages = (r - r.mean()) / (r.std(correction=1) + 1e-4)
        for completion, advantage in zip(group.completions, advantages, strict=True):
            lp = dense_logprobs(policy, decoder, group, completion)
            with torch.no_grad():
                ref = dense_logprobs(reference, decoder, group, completion)
            kl = torch.exp(ref - lp) - (ref - lp) - 1
            of_sequences.append((-torch.exp(lp - lp.detach()) * advantage + BETA * kl).mean())
    return torch.stack(of_sequences).mean()


def three_valued(token_ids: Sequence[int]) -> float:
    """Like the sum of two rewards of 0 or 1."""
    return float(token_ids[0] % 2) + float(len(token_ids) > 8)


def constant(_: Sequence[int]) -> float:
    """The KL is left alone."""
    return 1.0


def worst_difference(taken: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> float:
    """Largest difference of a gradient, over that gradient's largest entry.

    A bias of BERT's keys shifts all scores of a query alike, so its gradient is nothing but rounding: the scale is that
    of the queries' bias.
    """
    assert taken.keys() == parameters.keys()
    spelt = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert spelt.keys() == parameters.keys()
    worst = 0.0
    for name, gradient in spelt.items():
        size = float(spelt[name.replace("self.key.bias", "self.query.bias")].abs().max())
        assert size > 1e-10, f"{name} gets no gradient to compare"
        worst = max(worst, float((taken[name] - gradient).abs().max()) / size)
    return worst


@pytest.fixture
def differences(
    builders, models: tuple[HumanOmni, HumanOmni], transformers_decoder: Qwen2ForCausalLM
) -> Compare:
    """Relative differences of loss and gradients between a step of the trainer and the statement."""
    start, reference = models
    prefixes = [builders.inputs("first", text=(5, 9)), builders.inputs("second", text=(3, 6))]

    def compare(preset: RunConfig, reward: Reward) -> tuple[float, float]:
        policy, spelt = copy.deepcopy(start), copy.deepcopy(start)
        trainer = builders.trainer(
            policy,
            prefixes,
            reference=reference,
            reward=reward,
            rollout=preset.rollout,
            advantage=preset.advantage,
            objective=preset.objective,
            learning_rate=preset.optimizer.learning_rate,
        )
        report = trainer.step()
        assert [len(group.completions) for group in report.groups] == [8, 8]
        assert report.metrics[Metric.EQUAL_GROUPS] == float(reward is constant)
        rewards = [group.totals for group in report.rewards]
        loss = dense_loss(spelt, reference, transformers_decoder, report.groups, rewards)
        loss.backward()
        (taken,) = builders.gradients(trainer)
        assert any(name.startswith("model.bert_model.") for name in taken)
        of_loss = abs(report.metrics[Metric.LOSS] / loss.item() - 1)
        return of_loss, worst_difference(taken, spelt.trainable_parameters())

    return compare


@pytest.mark.parametrize("reward", [three_valued, constant], ids=["rewards differ", "KL alone"])
def test_a_step_is_the_published_one(differences: Compare, preset: RunConfig, reward: Reward) -> None:
    of_loss, of_gradients = differences(preset, reward)
    assert of_loss < TOLERANCE
    assert of_gradients < TOLERANCE


@pytest.mark.parametrize(
    "other",
    [
        {"objective": ObjectiveConfig(kl_coefficient=BETA * 1.01)},
        {"objective": ObjectiveConfig(loss="dapo")},
        {"advantage": AdvantageConfig(epsilon=1e-3)},
        {"advantage": AdvantageConfig(scale_by_std=False)},
    ],
    ids=["KL a hundredth more", "mean over tokens", "larger epsilon", "no standard deviation"],
)
def test_another_objective_is_told_apart(
    differences: Compare, preset: RunConfig, other: dict[str, Any]
) -> None:
    _, of_gradients = differences(replace(preset, **other), three_valued)
    assert of_gradients > 5 * TOLERANCE
