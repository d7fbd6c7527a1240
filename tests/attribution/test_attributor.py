"""Attribution of models whose truth is known: built by hand, or trained for a moment on a rule."""

import copy

import pytest
import torch

from omnigrpo.algorithm.packing import pack
from omnigrpo.algorithm.policy import completion_logprobs
from omnigrpo.attribution.attributor import Attributor
from omnigrpo.attribution.clip_attribution import Value
from omnigrpo.attribution.config import AttributionConfig
from omnigrpo.attribution.scoring import SceneScorer
from omnigrpo.attribution.shapley import Coalition
from omnigrpo.attribution.spoken import Spoken
from omnigrpo.attribution.summary import summarise
from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.schema import Group

FACES = {"up": "The mouth turns up.", "down": "The mouth turns down."}
VOICES = {"high": "I hear a high voice.", "low": "I hear a low voice."}
LABEL_OF = {"up": "happy", "down": "sad", "high": "happy", "low": "sad"}
SAME_FACE = "The mouth stays level."


def attributor(rig, *, max_new_tokens=40, budget_rows=4096, **config) -> Attributor:
    sampling = SamplingParams(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        token_budget=None,
        stop_token_ids=rig.encoder.stop_token_ids,
    )
    return Attributor(
        model=rig.model,
        encoder=rig.encoder,
        engine=NativeEngine(rig.model),
        sampling=sampling,
        scorer=SceneScorer(model=rig.model, budget_rows=budget_rows),
        config=AttributionConfig(**config),
    )


@pytest.fixture(scope="module")
def clips(rig):
    return rig.clips(5)


@pytest.mark.parametrize("baseline", ["swap", "remove"])
def test_shapley_values_add_up_for_every_value_and_clip(rig, clips, baseline) -> None:
    for clip in attributor(rig, max_new_tokens=6, baseline=baseline).measure(clips):
        assert set(clip.values) >= {Value.ACCURACY, Value.GOLD, Value.GOLD_FIXED}
        for value, by_coalition in clip.values.items():
            total = by_coalition[Coalition.BOTH] - by_coalition[Coalition.NEITHER]
            assert clip.shapley[value].video + clip.shapley[value].audio == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize(("silenced", "other"), [("video", "audio"), ("audio", "video")])
def test_a_modality_that_the_model_cannot_tell_apart_is_worth_nothing(rig, clips, silenced, other) -> None:
    """Its projector's last layer is zeroed, so that all clips get the same rows."""
    blind = copy.deepcopy(rig)
    with torch.no_grad():
        backbone = blind.model.model
        projector = backbone.mm_projector if silenced == "video" else backbone.audio_projector
        for parameter in projector.parameters():
            parameter.zero_()
    for clip in attributor(blind, max_new_tokens=6).measure(clips):
        for each in clip.shapley.values():
            assert getattr(each, silenced) == pytest.approx(0, abs=1e-12)
        assert abs(getattr(clip.shapley[Value.GOLD_FIXED], other)) > 1e-6


def test_a_swap_with_the_same_clip_changes_nothing(rig, clips) -> None:
    twins = [clips[0], clips[0]]
    for clip in attributor(rig, max_new_tokens=6).measure(twins):
        assert len(set(clip.answers.values())) == 1
        for each in clip.shapley.values():
            assert (each.video, each.audio) == pytest.approx((0, 0), abs=1e-12)


@pytest.mark.parametrize(("baseline", "scored"), [("swap", 4), ("remove", 6)])
def test_work_per_clip_is_four_prefills_and_one_packed_pass(rig, clips, baseline, scored) -> None:
    measuring = attributor(rig, max_new_tokens=6, baseline=baseline, budget_rows=10**6)
    towers = [rig.model.model.vision_tower, rig.model.model.audio_tower]
    handles = [tower.register_forward_hook(lambda *_: pytest.fail("a tower ran")) for tower in towers]
    calls = []
    measuring.measure(clips, on_clip=calls.append)
    for handle in handles:
        handle.remove()
    assert isinstance(measuring._engine, NativeEngine)
    assert measuring._engine.counters.prefixes_prefilled == 4 * len(clips)
    counters = measuring._scorer.counters
    assert (counters.passes, counters.prefixes) == (1, scored * len(clips))
    assert calls == [5]
    split = attributor(rig, max_new_tokens=6, baseline=baseline, budget_rows=10**6, clips_per_call=2)
    split.measure(clips, on_clip=calls.append)
    assert calls == [5, 2, 4, 5]
    assert split._scorer.counters.passes == 3


def test_other_calls_and_budgets_measure_the_same(rig, clips) -> None:
    whole = attributor(rig, max_new_tokens=6).measure(clips)
    parts = attributor(rig, max_new_tokens=6, budget_rows=500, clips_per_call=2).measure(clips)
    for ours, theirs in zip(whole, parts, strict=True):
        assert (ours.prompt_id, ours.donor, ours.answers) == (theirs.prompt_id, theirs.donor, theirs.answers)
        for value, by_coalition in ours.values.items():
            assert by_coalition == pytest.approx(theirs.values[value], abs=1e-9)


def test_prompts_of_one_modality_and_lone_clips_are_refused(builders, rig, clips) -> None:
    with pytest.raises(ValueError, match="prompt 'sound' asks for audio: leave it out"):
        attributor(rig).measure([*clips, builders.inputs("sound", modalities=("audio",))])
    with pytest.raises(ValueError, match="takes two clips, got 1"):
        attributor(rig).measure(clips[:1])
    with pytest.raises(ValueError, match="unfounded_below must be at least 0"):
        AttributionConfig(unfounded_below=-1.0)


def taught(make_rig, rule: str):
    """A model trained on clips that each show one of two faces and voices, to name the emotion by ``rule``.

    Ruled by the voice, it says the same of every face; ruled by the face, it describes both.
    """
    rig = make_rig(seed=1)
    generator = torch.Generator().manual_seed(0)
    widths = rig.model.config.vision.width, rig.model.config.audio.width
    faces, voices = (
        {name: 2 * torch.randn(width, generator=generator) for name in names}
        for width, names in zip(widths, (FACES, VOICES), strict=True)
    )
    clips, groups = [], []
    for index in range(48):
        face, voice = list(FACES)[index % 2], list(VOICES)[index // 2 % 2]
        label = LABEL_OF[face if rule == "video" else voice]
        inputs = rig.inputs(f"{face}-{voice}-{index}", label, faces[face], voices[voice])
        seen = FACES[face] if rule == "video" else SAME_FACE
        text = f"<think>{seen} {VOICES[voice]}</think>\n<answer>{label}</answer>"
        spoken = Spoken.of(rig.encoder, tuple(rig.encoder.encode_response(text)))
        clips.append(inputs)
        groups.append(Group(inputs=inputs, completions=(spoken.completion(),), texts=(text,)))
    optimizer = torch.optim.AdamW(rig.model.trainable_parameters().values(), lr=2e-3)
    for step in range(45):
        chosen = [groups[(step * 8 + at) % 40] for at in range(8)]
        loss = -completion_logprobs(rig.model, pack(chosen)).logprob_T.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return rig, clips[40:]


@pytest.fixture(scope="module", params=["audio", "video"])
def lesson(make_rig, request):
    return request.param, *taught(make_rig, request.param)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["swap", "remove"])
def test_a_model_that_goes_by_one_modality_is_found_out(lesson, baseline) -> None:
    """Swapping is decisive; without a modality the trained models have never been, so there only the order counts."""
    rule, rig, clips = lesson
    summary = summarise(attributor(rig, baseline=baseline).measure(clips))
    accuracy, gold = summary.values[Value.ACCURACY], summary.values[Value.GOLD]
    assert accuracy.coalitions[Coalition.BOTH].mean == 1.0
    ruling, other = (gold.audio, gold.video) if rule == "audio" else (gold.video, gold.audio)
    assert ruling.mean > abs(other.mean)
    if baseline == "swap":
        assert ruling.mean > 4 * abs(other.mean)
        ruling, other = (
            (accuracy.audio, accuracy.video) if rule == "audio" else (accuracy.video, accuracy.audio)
        )
        assert (ruling.mean, other.mean) == (1.0, 0.0)


@pytest.mark.slow
def test_claims_that_follow_no_picture_are_unfounded(lesson) -> None:
    rule, rig, clips = lesson
    measured = attributor(rig).measure(clips)
    claims = summarise(measured).claims
    assert claims["audio"].unfounded.mean < 0.5
    assert claims["audio"].drop.mean > 10 * abs(claims["audio"].drop_other.mean)
    if rule == "audio":
        assert all(
            claim.text == SAME_FACE for c in measured for claim in c.claims if claim.modality == "video"
        )
        assert claims["video"].unfounded.mean == 1.0
    else:
        assert claims["video"].unfounded.mean < 0.5
