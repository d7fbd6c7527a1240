"""The scorer of rewards against each completion alone after its changed prefix, densely, in float64."""

from dataclasses import replace

import pytest
import torch

from omnigrpo.attribution.counterfactual import swapped, without
from omnigrpo.attribution.group_scorer import PolicyScorer
from omnigrpo.reward.context import GroupContext, ModalityChange
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

CHANGES = [
    ModalityChange(modality="video", baseline="swap"),
    ModalityChange(modality="audio", baseline="swap"),
    ModalityChange(modality="audio", baseline="remove"),
]


def scorer(rig, **more) -> PolicyScorer:
    given = {"temperature": 0.7, "budget_rows": 4096} | more
    return PolicyScorer(policy=rig.model, prompt_encoder=rig.encoder, **given)


@torch.no_grad()
def alone(model, inputs, completion, temperature):
    ids = torch.tensor(completion.token_ids, dtype=torch.int64)
    rows = torch.cat([model.embed_prefixes([inputs]), model.embed_tokens(ids)])
    layout = SharedPrefixLayout(prefix_lengths=(len(rows),), completion_lengths=((),))
    hidden = model.decoder(rows, torch.arange(len(rows)), layout)
    logits = hidden[len(inputs.token_ids_P) - 1 : -1] @ model.head_weight_VD.T / temperature
    return logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def clips(rig):
    return rig.clips(3)


@pytest.fixture(scope="module")
def group(builders, clips):
    return builders.group(clips[0], [5, 0, 9], seed=2)


@pytest.mark.parametrize(("budget", "passes"), [(4096, 1), (220, 3), (192, 3)])
def test_all_changes_in_one_pass_equal_each_completion_alone(rig, clips, group, budget, passes) -> None:
    tested = scorer(rig, budget_rows=budget)
    scored = tested.logprobs(group, clips, CHANGES)
    changed = [
        swapped(clips[0], clips[1], ("video",)),
        swapped(clips[0], clips[1], ("audio",)),
        without(rig.encoder, clips[0], ("audio",)),
    ]
    assert tested.passes == passes
    for inputs, values in zip(changed, scored, strict=True):
        assert values is not None
        expected = [alone(rig.model, inputs, completion, 0.7) for completion in group.completions]
        for ours, theirs in zip(values, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-9)


def test_a_prompt_without_a_modality_has_neither_rows_nor_tags(rig, clips) -> None:
    changed = without(rig.encoder, clips[0], ("audio",))
    ids = changed.token_ids_P
    assert not (ids == AUDIO_ROW).any()
    assert (ids == VIDEO_ROW).sum() == (clips[0].token_ids_P == VIDEO_ROW).sum()
    assert "<au_start>" not in rig.encoder.decode(ids[ids >= 0].tolist())
    neither = without(rig.encoder, clips[0], ("video", "audio"))
    assert neither.token_ids_P.min() >= 0
    assert without(rig.encoder, neither, ("audio",)) is neither


def test_changes_that_cannot_be_made_are_none(rig, clips, group) -> None:
    video_only = without(rig.encoder, clips[0], ("audio",))
    assert scorer(rig).logprobs(replace(group, inputs=video_only), clips, CHANGES)[1:] == [None, None]
    assert scorer(rig).logprobs(group, [clips[0]], CHANGES[:2]) == [None, None]


def test_drops_of_an_unchanged_prompt_are_zero(rig, clips, group) -> None:
    """The rollout's own log-probs minus those under the clip itself, given as a neighbour of another name."""
    twin = replace(clips[0], prompt=replace(clips[1].prompt, solution="sad"))
    own = [alone(rig.model, clips[0], completion, 0.7) for completion in group.completions]
    completions = tuple(
        replace(completion, logprobs=tuple(values))
        for completion, values in zip(group.completions, own, strict=True)
    )
    rolled_out = replace(group, completions=completions)
    context = GroupContext(rolled_out, [clips[0], twin], scorer(rig))
    for drops in context.drops(*CHANGES[:2]):
        assert drops is not None
        assert all(abs(drop) < 1e-9 for values in drops for drop in values)
    (other,) = context.of(rolled_out).drops(CHANGES[2])
    assert other is not None
    assert max(abs(drop) for values in other for drop in values) > 1e-3
