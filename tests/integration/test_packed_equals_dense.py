"""The whole GRPO loss through the packed path against each sequence alone, in float64."""

from pathlib import Path

import pytest
import torch

from omnigrpo.algorithm.objective import BatchCounts, ObjectiveConfig, token_terms, token_weights
from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.algorithm.policy import completion_logprobs
from omnigrpo.model.config import tiny
from omnigrpo.model.humanomni import HumanOmni, reference_copy
from omnigrpo.schema import (
    AUDIO_ROW,
    VIDEO_ROW,
    Clip,
    ClipFeatures,
    Completion,
    Group,
    Modality,
    PrefixInputs,
    Prompt,
)
from omnigrpo_kernels.shared_prefix_attention import SharedPrefixLayout

CONFIG = tiny(vocab_size=300, gate_vocab_size=50)
OBJECTIVE = ObjectiveConfig(kl_coefficient=0.04, entropy_coefficient=0.01)


def make_inputs(text_before: int, text_after: int, *, video: bool, audio: bool) -> PrefixInputs:
    vision, sound = CONFIG.vision, CONFIG.audio
    rows = [
        torch.randint(0, 300, (text_before,)),
        torch.full((vision.num_tokens if video else 0,), VIDEO_ROW),
        torch.full((sound.num_tokens if audio else 0,), AUDIO_ROW),
        torch.randint(0, 300, (text_after,)),
    ]
    asked: dict[Modality, bool] = {"video": video, "audio": audio}
    return PrefixInputs(
        prompt=Prompt(
            prompt_id="p",
            clip=Clip(path=Path("c.mp4")),
            question="?",
            modalities=tuple(m for m in asked if asked[m]),
            solution="happy",
        ),
        token_ids_P=torch.cat(rows),
        question_ids=torch.tensor([2, 7, 9, 3]),
        features=ClipFeatures(
            vision_FND=torch.randn(vision.num_frames, vision.grid**2, vision.width) if video else None,
            audio_AD=torch.randn(sound.num_tokens, sound.width) if audio else None,
        ),
    )


def make_group(inputs: PrefixInputs, lengths: list[int]) -> Group:
    completions = tuple(
        Completion(
            token_ids=tuple(torch.randint(0, 300, (length,)).tolist()),
            logprobs=(-1.0,) * length,
            finish_reason="stop",
            weight_version=0,
            cached_tokens=0,
        )
        for length in lengths
    )
    return Group(inputs=inputs, completions=completions, texts=("",) * len(lengths))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    policy = HumanOmni(CONFIG)
    policy.init_weights(1)
    policy = policy.double()
    reference = reference_copy(policy)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.02 * torch.randn_like(parameter)
    return policy, reference


@pytest.fixture(scope="module")
def groups():
    torch.manual_seed(2)
    return [
        make_group(make_inputs(5, 9, video=True, audio=True), [6, 1, 11]),
        make_group(make_inputs(3, 2, video=False, audio=True), [1]),
        make_group(make_inputs(2, 7, video=True, audio=False), [4, 8]),
    ]


ADVANTAGES = [[0.7, -1.2, 0.5], [0.3], [1.0, -1.0]]
COUNTS = BatchCounts(num_sequences=6, num_tokens=31, max_tokens=16)


def objective(policy, reference_C, old_C, advantage_C):
    return token_terms(
        policy.logprob_T,
        entropy_C=policy.entropy_T,
        old_C=old_C,
        reference_C=reference_C,
        rollout_C=old_C,
        advantage_C=advantage_C,
        config=OBJECTIVE,
    ).loss_C


def packed_loss(model, reference, groups, old_shift, budget_rows):
    """The sum over packs, each backpropagated by itself, as the trainer does."""
    total, first = 0.0, 0
    for run in split_by_budget(groups, budget_rows):
        packed = pack(run)
        advantage_S = torch.tensor(
            [a for group in ADVANTAGES[first : first + len(run)] for a in group], dtype=torch.float64
        )
        first += len(run)
        lengths_C = torch.bincount(packed.sequence_C)[packed.sequence_C]
        policy = completion_logprobs(model, packed)
        with torch.no_grad():
            reference_C = completion_logprobs(reference, packed).logprob_T
        loss_C = objective(
            policy, reference_C, policy.logprob_T.detach() - old_shift, advantage_S[packed.sequence_C]
        )
        loss = (token_weights("grpo", lengths_C, COUNTS) * loss_C).sum()
        loss.backward()
        total += loss.item()
    return total


def sequence_statistics(model, group, completion):
    """Log-prob and entropy of a completion from one plain causal sequence and full logits."""
    ids = torch.tensor(completion.token_ids)
    rows = torch.cat([model.embed_prefixes([group.inputs]), model.embed_tokens(ids)])
    layout = SharedPrefixLayout(prefix_lengths=(len(rows),), completion_lengths=((),))
    logits = model.decoder(rows, torch.arange(len(rows)), layout) @ model.head_weight_VD.T
    logprobs = logits[-len(ids) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, ids[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


def dense_loss(model, reference, groups, old_shift):
    """Mean over all sequences of the mean over tokens, one sequence at a time."""
    loss = torch.zeros((), dtype=torch.float64)
    for group, advantages in zip(groups, ADVANTAGES, strict=True):
        for completion, advantage in zip(group.completions, advantages, strict=True):
            logprob, entropy = sequence_statistics(model, group, completion)
            with torch.no_grad():
                reference_logprob, _ = sequence_statistics(reference, group, completion)
            ratio = torch.exp(logprob - (logprob.detach() - old_shift))
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            log_ratio = reference_logprob - logprob
            kl = torch.exp(log_ratio) - log_ratio - 1
            loss = loss + (-surrogate + 0.04 * kl - 0.01 * entropy).mean() / 6
    loss.backward()
    return loss.item()


def gradients(model):
    taken = {name: p.grad.clone() for name, p in model.trainable_parameters().items()}
    model.zero_grad()
    return taken


@pytest.mark.parametrize("budget_rows", [10_000, 170], ids=["one pack", "several packs"])
@pytest.mark.parametrize(
    "old_shift", [0.0, 0.1, 0.5], ids=["ratio 1", "ratio inside the clip", "ratio beyond the clip"]
)
def test_loss_and_every_gradient(models, groups, budget_rows, old_shift):
    policy, reference = models
    mine, packed_gradients = packed_loss(policy, reference, groups, old_shift, budget_rows), gradients(policy)
    spelt, dense_gradients = dense_loss(policy, reference, groups, old_shift), gradients(policy)
    assert mine == pytest.approx(spelt, abs=1e-12)
    assert packed_gradients.keys() == policy.trainable_parameters().keys()
    for name, gradient in dense_gradients.items():
        assert gradient.abs().max() > 0 or old_shift == 0.5, f"{name} gets no gradient"
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=1e-9, msg=name)
