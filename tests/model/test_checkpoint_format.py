"""Checkpoints: round trips, and errors that name part and tensor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from omnigrpo.model.checkpoint_format import (
    CheckpointError,
    Tokenizers,
    load_model,
    load_towers,
    save_model,
    save_towers,
    towers_hash,
)
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.parts import part_of


@pytest.fixture
def checkpoint(model: HumanOmni, tokenizers: Tokenizers, tmp_path: Path) -> Path:
    save_model(model, tokenizers, tmp_path / "model")
    return tmp_path / "model"


def _encode(model: HumanOmni, pixels: torch.Tensor, mel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    features = model.encode(pixels, mel)[0]
    assert features.vision_FND is not None
    assert features.audio_AD is not None
    return features.vision_FND, features.audio_AD


def _same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _edit(checkpoint: Path, edit) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    edit(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def test_round_trip(model: HumanOmni, checkpoint: Path, tokenizers: Tokenizers, make_inputs) -> None:
    loaded = load_model(checkpoint)
    assert loaded.model.config == model.config
    state, again = model.state_dict(), loaded.model.state_dict()
    assert list(state) == list(again)
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert set(loaded.model.trainable_parameters()) == set(model.trainable_parameters())
    assert not any(b.is_meta for b in loaded.model.buffers())
    text = "<think>é</think><|im_end|>"
    assert loaded.tokenizer.encode(text) == tokenizers.text.encode(text)
    assert loaded.gate_tokenizer.encode("which?") == tokenizers.gate.encode("which?")
    item = make_inputs()
    assert torch.equal(loaded.model.embed_prefixes([item]), model.embed_prefixes([item]))
    pixels, mel = torch.randn(1, 2, 3, 32, 32), torch.randn(1, 20, 100)
    assert _same(_encode(loaded.model, pixels, mel), _encode(model, pixels, mel))


def test_saving_again_gives_the_same_bytes(checkpoint: Path, tokenizers: Tokenizers, tmp_path: Path) -> None:
    save_model(load_model(checkpoint).model, tokenizers, tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "gate_tokenizer/tokenizer.json"):
        assert (checkpoint / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_tied_head_is_not_stored_and_accepted_when_present(checkpoint: Path) -> None:
    assert "lm_head.weight" not in load_file(checkpoint / "model.safetensors")
    _edit(checkpoint, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(checkpoint).model.lm_head is None


def test_an_untied_head_is_stored(
    small_config: HumanOmniConfig, tokenizers: Tokenizers, tmp_path: Path
) -> None:
    decoder = replace(small_config.decoder, tie_word_embeddings=False)
    model = HumanOmni(replace(small_config, decoder=decoder))
    save_model(model, tokenizers, tmp_path)
    loaded = load_model(tmp_path).model
    assert loaded.head_weight_VD is not loaded.model.embed_tokens.weight
    assert torch.equal(loaded.head_weight_VD, model.head_weight_VD)


def test_dtype_is_the_files_or_the_one_asked_for(checkpoint: Path) -> None:
    assert load_model(checkpoint).model.head_weight_VD.dtype == torch.float32
    model = load_model(checkpoint, dtype=torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_loaded_weights_do_not_depend_on_the_file_any_more(checkpoint: Path) -> None:
    model = load_model(checkpoint).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = checkpoint / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_missing_and_unexpected_tensors_are_reported_by_part(checkpoint: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.1.self_attn.q" in n]:
            del tensors[name]
        del tensors["model.mm_projector.readout_body.2.bias"]
        tensors["model.bert_gate.9.weight"] = torch.zeros(1)
        tensors["model.feature_compressor.x"] = torch.zeros(1)

    _edit(checkpoint, edit)
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    lines = str(caught.value).splitlines()
    assert "model.safetensors does not fit" in lines[0]
    siglip, whisper = (
        "model.vision_tower.vision_tower.vision_model.encoder",
        "model.audio_tower.audio_tower.encoder",
    )
    q_proj = "layers.1.self_attn.q_proj"
    assert [line.strip() for line in lines[1:]] == [
        f"vision tower: 2 missing ({siglip}.{q_proj}.weight, {siglip}.{q_proj}.bias)",
        f"audio tower: 2 missing ({whisper}.{q_proj}.weight, {whisper}.{q_proj}.bias)",
        "mm_projector: 1 missing (model.mm_projector.readout_body.2.bias)",
        "llm: 2 missing (model.layers.1.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.bias)",
        "gate: 1 unexpected (model.bert_gate.9.weight)",
        "llm: 1 unexpected (model.feature_compressor.x)",
    ]


def test_a_wrong_shape_names_the_tensor(checkpoint: Path) -> None:
    _edit(checkpoint, lambda t: t.update({"model.norm.weight": torch.zeros(33)}))
    with pytest.raises(
        CheckpointError, match=r"llm: model.norm.weight has shape \(33,\), the model needs \(32,\)"
    ):
        load_model(checkpoint)


def test_weights_that_nothing_reads_may_be_absent(checkpoint: Path, make_inputs) -> None:
    unused = (
        "vision_model.head.",
        "post_layernorm",
        "encoder.layers.2.",
        "pooler",
        "tower.projector",
        "classifier",
    )
    complete = load_model(checkpoint).model

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if part_of(n) != "llm" and any(word in n for word in unused)]:
            del tensors[name]

    _edit(checkpoint, edit)
    model = load_model(checkpoint).model
    pixels, mel, item = torch.randn(1, 2, 3, 32, 32), torch.randn(1, 20, 100), make_inputs()
    assert _same(_encode(model, pixels, mel), _encode(complete, pixels, mel))
    assert torch.equal(model.embed_prefixes([item]), complete.embed_prefixes([item]))


def test_absent_and_damaged_files(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        load_model(tmp_path / "nowhere")
    (checkpoint / "model.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: .*line 1"):
        load_model(checkpoint)


def test_the_gate_tokenizer_may_live_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "gate_tokenizer").rename(tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"gate_tokenizer holds no tokenizer\.json"):
        load_model(checkpoint)
    assert (
        load_model(checkpoint, gate_tokenizer_directory=tmp_path / "bert").gate_tokenizer.encode("a")[0] == 2
    )


def test_towers_travel_alone(model: HumanOmni, small_config: HumanOmniConfig, tmp_path: Path) -> None:
    path = tmp_path / "towers.safetensors"
    save_towers(model, path)
    assert {part_of(name) for name in load_file(path)} == {"vision tower", "audio tower"}
    other = HumanOmni(small_config)
    head = other.model.embed_tokens.weight.clone()
    load_towers(other, path)
    assert towers_hash(other) == towers_hash(model)
    assert torch.equal(other.model.embed_tokens.weight, head)
    pixels, mel = torch.randn(1, 2, 3, 32, 32), torch.randn(1, 20, 100)
    assert _same(_encode(other, pixels, mel), _encode(model, pixels, mel))


def test_a_tower_file_must_be_complete_and_hold_nothing_else(model: HumanOmni, tmp_path: Path) -> None:
    path = tmp_path / "towers.safetensors"
    save_towers(model, path)
    tensors = load_file(path)
    del tensors["model.audio_tower.audio_tower.encoder.conv1.bias"]
    save_file(tensors | {"model.norm.weight": torch.zeros(32)}, path)
    with pytest.raises(CheckpointError, match=r"(?s)audio tower: 1 missing .*llm: 1 unexpected"):
        load_towers(model, path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_towers(model, tmp_path / "none.safetensors")


def test_towers_hash_follows_weights_that_are_read(model: HumanOmni) -> None:
    before = towers_hash(model)
    siglip = model.model.vision_tower.vision_tower.vision_model
    with torch.no_grad():
        siglip.head.probe.add_(1)
        model.model.norm.weight.add_(1)
    assert towers_hash(model) == before
    with torch.no_grad():
        siglip.embeddings.position_embedding.weight[0, 0] += 1e-3
    assert towers_hash(model) != before


def test_config_holds_the_reference_keys(checkpoint: Path) -> None:
    document = json.loads((checkpoint / "config.json").read_text())
    assert document["model_type"] == "HumanOmni_qwen2"
    assert document["mm_projector_type"] == "all_in_one_small"
    assert (document["hidden_size"], document["num_frames"], document["torch_dtype"]) == (32, 2, "float32")
