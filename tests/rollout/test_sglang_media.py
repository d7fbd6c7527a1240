"""Clips that a server decodes and encodes itself: what is sent, and the rows that come of it; without SGLang."""

import base64
import dataclasses
import json

import pytest
import torch

from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.sglang_plugin.encoders import Encoders
from omnigrpo.rollout.sglang_plugin.media_entry import MediaRecipe, media_entries, prepare
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Modality


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clips")
    generate_dataset(directory, SyntheticConfig(num_cold_start=7, num_rl=7, num_heldout=7, num_ood=7))
    return sorted(directory.rglob("*.mp4"))[0]


@pytest.fixture
def inputs(builders, clip_path):
    found = builders.inputs("clip")
    object.__setattr__(found.prompt.clip, "path", clip_path)
    return found


def test_an_entry_is_json_and_names_its_rows(inputs):
    entries = json.loads(json.dumps(media_entries(inputs, MediaRecipe())))
    (video,), (audio,) = entries["video_data"], entries["audio_data"]
    for entry, row_id in ((video, VIDEO_ROW), (audio, AUDIO_ROW)):
        ((first, last),) = entry["offsets"]
        assert set(inputs.token_ids_P[first : last + 1].tolist()) == {row_id}
        assert last - first + 1 == int((inputs.token_ids_P == row_id).sum())
    assert video["question_ids"] == inputs.question_ids.tolist()


def test_a_path_and_its_bytes_are_the_same_clip(builders, inputs, clip_path):
    by_path = media_entries(inputs, MediaRecipe())
    by_bytes = media_entries(inputs, MediaRecipe(), content=clip_path.read_bytes())
    modalities: tuple[Modality, ...] = ("video", "audio")
    for modality in modalities:
        one, other = (
            prepare(entries[f"{modality}_data"][0], modality, builders.CONFIG)
            for entries in (by_path, by_bytes)
        )
        assert one.tensor.equal(other.tensor)
        assert one.key == other.key


def test_the_key_of_a_video_names_its_question_and_recipe(builders, inputs):
    (entry,) = media_entries(inputs, MediaRecipe())["video_data"]
    keys = {
        prepare(entry | changed, "video", builders.CONFIG).key
        for changed in ({}, {"question_ids": [2, 3]}, {"aspect": "stretch"})
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"path": "/nowhere.mp4"}, r"cannot be used \(missing\)"),
        ({"base64": "AAAA"}, "either path or base64"),
        ({"colour_space": "tag"}, "unknown keys in a medium: colour_space"),
    ],
)
def test_a_medium_that_cannot_be_used(builders, inputs, changed, message):
    (entry,) = media_entries(inputs, MediaRecipe())["video_data"]
    with pytest.raises(ValueError, match=message):
        prepare(entry | changed, "video", builders.CONFIG)


def test_damaged_bytes(builders, inputs, clip_path):
    (entry,) = media_entries(inputs, MediaRecipe(), content=b"")["video_data"]
    with pytest.raises(ValueError, match="is damaged"):
        prepare(entry | {"base64": "?"}, "video", builders.CONFIG)
    broken = base64.b64encode(clip_path.read_bytes()[:200]).decode()
    with pytest.raises(ValueError, match="cannot be used"):
        prepare(entry | {"base64": broken}, "video", builders.CONFIG)


def test_rows_are_the_models_own(builders):
    model = builders.model(dtype=torch.float32)
    encoders = Encoders(builders.CONFIG)
    encoders.load((name, tensor) for name, tensor in model.state_dict().items() if name in encoders.shapes)
    vision, audio = builders.CONFIG.vision, builders.CONFIG.audio
    pixels = torch.rand(2, vision.num_frames, 3, vision.image_size, vision.image_size)
    mels = torch.rand(2, audio.num_mel_bins, audio.num_mel_frames)
    questions = [torch.tensor([2, 7, 3]), torch.tensor([2, 9, 11, 3])]

    rows = {
        VIDEO_ROW: encoders.video_rows(list(pixels), questions),
        AUDIO_ROW: encoders.audio_rows(list(mels)),
    }

    for row_id, found in rows.items():
        expected = _rows_of(builders, model, pixels, mels, questions, row_id)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def _rows_of(builders, model: HumanOmni, pixels, mels, questions, row_id: int) -> torch.Tensor:
    """Of both clips, as training embeds them among the other rows."""
    rows = []
    for features, question in zip(model.encode(pixels, mels), questions, strict=True):
        inputs = dataclasses.replace(builders.inputs("x"), features=features, question_ids=question)
        with torch.no_grad():
            rows.append(model.embed_prefixes([inputs])[inputs.token_ids_P == row_id])
    return torch.cat(rows)


def test_the_decoder_is_not_among_the_encoders(builders):
    shapes = Encoders(builders.CONFIG).shapes
    assert not [name for name in shapes if name.startswith(("model.layers", "model.embed_tokens", "lm_head"))]
    assert any("mm_projector" in name for name in shapes)
    assert any("bert" in name for name in shapes)
