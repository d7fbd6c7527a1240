"""Checkpoints in several files, towers in directories of their own, and files that cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionConfig, SiglipVisionModel, WhisperConfig, WhisperForConditionalGeneration

from omnigrpo.model.checkpoint_format import CheckpointError, Tokenizers, load_model, save_model
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.parts import part_of, unused_prefixes
from omnigrpo.model.tower_files import audio_tower_tensors, vision_tower_tensors
from omnigrpo.model.weight_files import INDEX_FILE, WEIGHTS_FILE, stored_checkpoint


@pytest.fixture
def checkpoint(model: HumanOmni, tokenizers: Tokenizers, tmp_path: Path) -> Path:
    save_model(model, tokenizers, tmp_path / "model")
    return tmp_path / "model"


def in_shards(checkpoint: Path) -> dict[str, str]:
    """Replace the file by three and an index; returns where each tensor went."""
    tensors = load_file(checkpoint / WEIGHTS_FILE)
    places = {
        name: f"model-{index % 3 + 1:05d}-of-00003.safetensors" for index, name in enumerate(sorted(tensors))
    }
    for shard in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == shard}, checkpoint / shard)
    (checkpoint / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (checkpoint / WEIGHTS_FILE).unlink()
    return places


def test_shards_load_as_one_file_does(model: HumanOmni, checkpoint: Path) -> None:
    in_shards(checkpoint)
    state, loaded = model.state_dict(), load_model(checkpoint).model.state_dict()
    assert all(torch.equal(state[name], loaded[name]) for name in state)


def test_an_index_that_does_not_fit_its_shards(checkpoint: Path) -> None:
    places = in_shards(checkpoint)
    name, shard = next(iter(places.items()))
    tensors = load_file(checkpoint / shard)
    del tensors[name]
    save_file(tensors, checkpoint / shard)
    with pytest.raises(CheckpointError, match=f"{name} should be in {shard}, but is not"):
        load_model(checkpoint)
    (checkpoint / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} does not exist"):
        load_model(checkpoint)
    (checkpoint / INDEX_FILE).write_text("{}")
    with pytest.raises(CheckpointError, match="is no index of safetensors files"):
        load_model(checkpoint)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_named(checkpoint: Path, share: float) -> None:
    whole = (checkpoint / WEIGHTS_FILE).read_bytes()
    (checkpoint / WEIGHTS_FILE).write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(checkpoint)


def test_shapes_are_checked_before_any_weight_is_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(checkpoint / WEIGHTS_FILE)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, checkpoint / WEIGHTS_FILE)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("omnigrpo.model.checkpoint_format.read_tensors", refuse)
    with pytest.raises(CheckpointError, match=r"llm: model\.norm\.weight has shape \(3,\), the model needs"):
        load_model(checkpoint)


def test_quantised_weights_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, checkpoint / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is of type I8"):
        load_model(checkpoint)


def _without_towers(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS_FILE)
    kept = {name: t for name, t in tensors.items() if not part_of(name).endswith("tower")}
    save_file(kept, checkpoint / WEIGHTS_FILE)


def _save_towers_as_transformers(model: HumanOmni, directory: Path) -> tuple[Path, Path]:
    """A whole Whisper, decoder included, and SigLIP's vision model, each saved by transformers."""
    vision, audio = model.config.vision, model.config.audio
    siglip = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.ffn_width,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
        )
    )
    inner = getattr(siglip, "vision_model", siglip)
    inner.load_state_dict(model.model.vision_tower.vision_tower.vision_model.state_dict())
    whisper = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=60,
            d_model=audio.width,
            encoder_layers=audio.num_layers,
            encoder_attention_heads=audio.num_heads,
            encoder_ffn_dim=audio.ffn_width,
            decoder_layers=1,
            decoder_attention_heads=audio.num_heads,
            decoder_ffn_dim=8,
            num_mel_bins=audio.num_mel_bins,
            max_source_positions=audio.num_positions,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    )
    whisper.model.encoder.load_state_dict(model.model.audio_tower.audio_tower.encoder.state_dict())
    siglip.save_pretrained(directory / "siglip")
    whisper.save_pretrained(directory / "whisper")
    return directory / "siglip", directory / "whisper"


def test_towers_may_come_from_directories_of_their_own(
    model: HumanOmni, checkpoint: Path, tmp_path: Path
) -> None:
    _without_towers(checkpoint)
    siglip, whisper = _save_towers_as_transformers(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"(?s)vision tower: .* missing .*audio tower: .* missing"):
        load_model(checkpoint)
    loaded = load_model(checkpoint, vision_tower_directory=siglip, audio_tower_directory=whisper).model
    unread = unused_prefixes(model.config.vision)
    read = {name: t for name, t in model.state_dict().items() if not name.startswith(unread)}
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.items())


def test_the_checkpoints_own_towers_come_first(model: HumanOmni, checkpoint: Path, tmp_path: Path) -> None:
    siglip, whisper = _save_towers_as_transformers(model, tmp_path)
    tensors = load_file(whisper / WEIGHTS_FILE)
    save_file({name: torch.full_like(t, 7.0) for name, t in tensors.items()}, whisper / WEIGHTS_FILE)
    loaded = load_model(checkpoint, vision_tower_directory=siglip, audio_tower_directory=whisper).model
    own = model.model.audio_tower.audio_tower.encoder.conv1.weight
    assert torch.equal(loaded.model.audio_tower.audio_tower.encoder.conv1.weight, own)


def test_a_tower_directory_of_something_else(checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    save_file({"text_model.x": torch.zeros(1)}, other / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="holds no weights of a SigLIP vision tower"):
        vision_tower_tensors(other)
    with pytest.raises(CheckpointError, match="holds no weights of a Whisper encoder"):
        audio_tower_tensors(other)
    with pytest.raises(CheckpointError, match="does not exist"):
        stored_checkpoint(tmp_path / "nowhere")


def test_a_tokenizer_of_vocabulary_files(checkpoint: Path) -> None:
    """The published directory has vocab.json and merges.txt beside tokenizer.json."""
    document = json.loads((checkpoint / "tokenizer.json").read_text())
    tokens = load_model(checkpoint).tokenizer.encode("which emotion is it?")
    (checkpoint / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))
    merges = [" ".join(pair) for pair in document["model"]["merges"]]
    (checkpoint / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (checkpoint / "tokenizer.json").unlink()
    assert load_model(checkpoint).tokenizer.encode("which emotion is it?") == tokens


def test_a_tokenizer_beyond_the_embedding(checkpoint: Path) -> None:
    tokenizer = load_model(checkpoint).tokenizer
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(500)])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(
        CheckpointError, match=r"gives '<extra_499>' the id \d+, but the embedding has \d+ rows"
    ):
        load_model(checkpoint)


def test_a_damaged_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no readable tokenizer"):
        load_model(checkpoint)


def test_the_gates_tokenizer_as_bert_ships_it(checkpoint: Path, tmp_path: Path) -> None:
    gate = load_model(checkpoint).gate_tokenizer
    words = sorted(gate.get_vocab().items(), key=lambda item: item[1])
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n")
    shutil.rmtree(checkpoint / "gate_tokenizer")
    with pytest.raises(CheckpointError, match=r"model\.gate_tokenizer"):
        load_model(checkpoint)
    loaded = load_model(checkpoint, gate_tokenizer_directory=bert)
    assert loaded.gate_tokenizer.encode("Which emotion?") == gate.encode("Which emotion?")


def test_another_architecture(checkpoint: Path) -> None:
    document = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(document | {"model_type": "qwen2_vl"}))
    with pytest.raises(CheckpointError, match="model_type must be 'HumanOmni_qwen2', got 'qwen2_vl'"):
        load_model(checkpoint)
