"""The encoder of a rollout server against the policy's own rows."""

import pytest
import torch

from omnigrpo.group_sampler import embed
from omnigrpo.model.parts import part_of
from omnigrpo.rollout.media_encoder import MediaEncoder
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, ClipFeatures


def encoder_of(policy):
    """Its weights, by their names in the checkpoint."""
    encoder = MediaEncoder(policy.config).to(policy.head_weight_VD.dtype)
    named = [(name, tensor) for name, tensor in policy.state_dict().items() if part_of(name) != "llm"]
    assert [problem for name, tensor in named if (problem := encoder.problem(name, tensor))] == []
    encoder.load(named)
    return encoder


@pytest.fixture
def clip(builders):
    """Pixels and spectrogram."""
    vision, audio = builders.CONFIG.vision, builders.CONFIG.audio
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(vision.num_frames, 3, vision.image_size, vision.image_size, generator=generator)
    return pixels, torch.randn(audio.num_mel_bins, audio.num_mel_frames, generator=generator)


def test_rows_are_the_policys(builders, clip):
    policy = builders.model()
    pixels_F3SS, mel_ML = clip
    (features,) = policy.encode(pixels_F3SS[None], mel_ML[None])
    given = builders.inputs("a")
    inputs = type(given)(
        prompt=given.prompt,
        token_ids_P=given.token_ids_P,
        question_ids=given.question_ids,
        features=ClipFeatures(vision_FND=features.vision_FND, audio_AD=features.audio_AD),
    )
    with torch.no_grad():
        rows_PD = embed(policy, [inputs])[0].embeddings_PD
    encoder = encoder_of(policy)

    video = encoder.video_rows("a", pixels_F3SS, tuple(given.question_ids.tolist()))
    audio = encoder.audio_rows("a", mel_ML)

    assert torch.equal(video, rows_PD[given.token_ids_P == VIDEO_ROW])
    assert torch.equal(audio, rows_PD[given.token_ids_P == AUDIO_ROW])


def test_towers_run_once_per_clip_and_projectors_always(builders, clip):
    pixels_F3SS, mel_ML = clip
    encoder = encoder_of(builders.model())
    before = encoder.audio_rows("a", mel_ML)
    encoder.video_rows("a", pixels_F3SS, (1, 2))
    assert encoder.tower_passes == 2
    weight = encoder.audio_projector[0].weight
    encoder.load([("model.audio_projector.0.weight", weight * 2)])

    after = encoder.audio_rows("a", mel_ML)

    assert encoder.tower_passes == 2
    assert not torch.equal(before, after)
    encoder.load([(n, t) for n, t in builders.model(2).state_dict().items() if part_of(n) == "audio tower"])
    encoder.audio_rows("a", mel_ML)
    assert encoder.tower_passes == 3, "features of other towers are forgotten"


def test_features_stay_within_their_budget(builders, clip):
    _, mel_ML = clip
    encoder = MediaEncoder(builders.CONFIG, cache_bytes=1)
    for _ in range(2):
        encoder.audio_rows("a", mel_ML)
    assert encoder.tower_passes == 2


def test_weights_that_do_not_fit_are_named(builders):
    encoder = MediaEncoder(builders.CONFIG)
    assert encoder.problem("model.bert_gate.9.weight", torch.zeros(1)) == (
        "model.bert_gate.9.weight is none of its weights"
    )
    shape = tuple(encoder.bert_gate[0].weight.shape)
    problem = encoder.problem("model.bert_gate.0.weight", torch.zeros(3))
    assert problem == f"model.bert_gate.0.weight has shape (3,), the model needs {shape}"
