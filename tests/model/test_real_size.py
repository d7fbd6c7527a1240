"""HumanOmni-0.5B on the meta device: parameter counts and the reference checkpoint's names."""

import pytest
import torch

from omnigrpo.model.config import HumanOmniConfig, tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.parts import parameter_counts, part_of


@pytest.fixture(scope="module")
def real_model() -> HumanOmni:
    with torch.device("meta"):
        return HumanOmni(HumanOmniConfig())


def test_parameter_counts_are_the_published_ones(real_model: HumanOmni) -> None:
    counts = parameter_counts(real_model)
    assert counts == {
        "llm": 494_032_768,
        "audio tower": 637_297_410,
        "vision tower": 92_884_224,
        "bert": 109_482_240,
        "mm_projector": 34_762_944,
        "gate": 2_766_851,
        "audio_projector": 1_951_488,
    }
    assert sum(counts.values()) == 1_373_177_925


def test_row_counts_of_the_real_geometry() -> None:
    config = HumanOmniConfig()
    assert (config.vision.num_tokens, config.audio.num_tokens) == (392, 500)


def test_tiny_has_a_few_million_parameters() -> None:
    with torch.device("meta"):
        total = sum(parameter_counts(HumanOmni(tiny())).values())
    assert 2_000_000 < total < 4_000_000


def _both(*stems: str) -> set[str]:
    return {f"{stem}.{leaf}" for stem in stems for leaf in ("weight", "bias")}


def _llm_names() -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    for i in range(24):
        layer = f"model.layers.{i}"
        names |= _both(*(f"{layer}.self_attn.{p}_proj" for p in "qkv"))
        names |= {f"{layer}.self_attn.o_proj.weight"}
        names |= {f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
        names |= {f"{layer}.{norm}_layernorm.weight" for norm in ("input", "post_attention")}
    return names


def _vision_names() -> set[str]:
    root = "model.vision_tower.vision_tower.vision_model"
    names = _both(f"{root}.embeddings.patch_embedding", f"{root}.post_layernorm")
    names |= {f"{root}.embeddings.position_embedding.weight", f"{root}.head.probe"}
    names |= {f"{root}.head.attention.in_proj_weight", f"{root}.head.attention.in_proj_bias"}
    names |= _both(*(f"{root}.head.{m}" for m in ("attention.out_proj", "layernorm", "mlp.fc1", "mlp.fc2")))
    for i in range(12):
        layer = f"{root}.encoder.layers.{i}"
        names |= _both(*(f"{layer}.self_attn.{p}_proj" for p in ("q", "k", "v", "out")))
        names |= _both(*(f"{layer}.{m}" for m in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2")))
    return names


def _audio_names() -> set[str]:
    root = "model.audio_tower.audio_tower"
    names = _both(*(f"{root}.{m}" for m in ("encoder.conv1", "encoder.conv2", "encoder.layer_norm")))
    names |= _both(f"{root}.projector", f"{root}.classifier") | {f"{root}.encoder.embed_positions.weight"}
    for i in range(32):
        layer = f"{root}.encoder.layers.{i}"
        names |= _both(*(f"{layer}.self_attn.{p}_proj" for p in ("q", "v", "out")))
        names |= {f"{layer}.self_attn.k_proj.weight"}
        names |= _both(*(f"{layer}.{m}" for m in ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")))
    return names


def _projector_names() -> set[str]:
    root = "model.mm_projector"
    names = _both(f"{root}.mlp_2xgelu_face.0", f"{root}.mlp_2xgelu_face.2")
    for branch in ("video", "body"):
        names |= _both(
            *(f"{root}.{m}" for m in (f"sampler_{branch}.0", f"readout_{branch}.0", f"readout_{branch}.2"))
        )
        for block in (f"{root}.{s}_{branch}.{b}" for s in ("s1", "s2") for b in ("b1", "b2")):
            names |= {f"{block}.conv{n}.conv.weight" for n in (1, 2, 3)}
            names |= _both(*(f"{block}.conv{n}.bn" for n in (1, 2, 3)), f"{block}.se.fc1", f"{block}.se.fc2")
        names |= {f"{root}.s1_{branch}.b1.downsample.conv.weight"} | _both(
            f"{root}.s1_{branch}.b1.downsample.bn"
        )
    return names


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("llm", _llm_names()),
        ("vision tower", _vision_names()),
        ("audio tower", _audio_names()),
        ("mm_projector", _projector_names()),
        ("audio_projector", _both("model.audio_projector.0", "model.audio_projector.2")),
        ("gate", _both("model.bert_gate.0", "model.bert_gate.2")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_of_a_part_are_exactly_the_reference_names(
    real_model: HumanOmni, part: str, expected: set[str]
) -> None:
    assert {name for name in real_model.state_dict() if part_of(name) == part} == expected


def test_bert_names(real_model: HumanOmni) -> None:
    names = set(real_model.state_dict())
    expected = {
        f"model.bert_model.embeddings.{m}_embeddings.weight" for m in ("word", "position", "token_type")
    }
    expected |= _both("model.bert_model.embeddings.LayerNorm", "model.bert_model.pooler.dense")
    for i in range(12):
        layer = f"model.bert_model.encoder.layer.{i}"
        expected |= _both(*(f"{layer}.attention.self.{m}" for m in ("query", "key", "value")))
        expected |= _both(*(f"{layer}.{m}" for m in ("attention.output.dense", "attention.output.LayerNorm")))
        expected |= _both(
            *(f"{layer}.{m}" for m in ("intermediate.dense", "output.dense", "output.LayerNorm"))
        )
    assert {name for name in names if part_of(name) == "bert"} == expected


def test_convolution_shapes(real_model: HumanOmni) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in real_model.state_dict().items()}
    root = "model.mm_projector"
    assert shapes[f"{root}.sampler_video.0.weight"] == (896, 896, 2, 2, 2)
    assert shapes[f"{root}.s1_body.b1.conv1.conv.weight"] == (896, 768, 1, 1)
    assert shapes[f"{root}.s1_body.b1.conv2.conv.weight"] == (896, 1, 3, 3)
    hidden = {name: shape[0] for name, shape in shapes.items() if name.endswith("se.fc1.weight")}
    assert len(hidden) == 8
    assert all(size == (192 if ".s1_" in name and ".b1." in name else 224) for name, size in hidden.items())
    assert shapes["model.bert_gate.0.weight"] == (3584, 768)
