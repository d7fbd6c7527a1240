"""config.json: round trips, the published file's keys, and refusals."""

import pytest

from omnigrpo.model.config import HumanOmniConfig, tiny
from omnigrpo.model.config_json import from_json, to_json

PUBLISHED: dict[str, object] = {
    "architectures": ["HumanOmniQwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "audio_hidden_size": 1280,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 896,
    "hyper_layers": [15, 22],
    "image_aspect_ratio": "pad",
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "mm_audio_projector_type": "mlp2x_gelu",
    "mm_audio_tower": "whisper-large-v3",
    "mm_hidden_size": 768,
    "mm_projector_type": "all_in_one_small",
    "mm_use_x_start_end": True,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "siglip-base-patch16-224",
    "model_type": "HumanOmni_qwen2",
    "num_attention_heads": 14,
    "num_frames": 8,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_the_published_file_is_the_default_geometry() -> None:
    assert from_json(PUBLISHED) == HumanOmniConfig()


def test_the_default_geometry_writes_no_tower_sections() -> None:
    document = to_json(HumanOmniConfig())
    assert not {"vision_config", "audio_config", "bert_config"} & set(document)
    assert {key: document[key] for key in document if key in PUBLISHED} == {
        key: value for key, value in PUBLISHED.items() if key in document
    }


@pytest.mark.parametrize(
    "config", [HumanOmniConfig(), tiny(), tiny(400, 100)], ids=["0.5B", "tiny", "tiny-vocab"]
)
def test_round_trip(config: HumanOmniConfig) -> None:
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mm_projector_type": "all_in_one"},
            "mm_projector_type must be 'all_in_one_small', got 'all_in_one'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling must be None"),
        ({"hidden_size": "896"}, "hidden_size must be of type int, got '896'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool, got 1"),
        ({"mm_hidden_size": 1152}, "mm_hidden_size is 1152, but the tower is 768 wide; give vision_config"),
        ({"vision_config": 3}, "vision_config must be an object, got 3"),
        ({"audio_config": {"max_source_positions": 1501}}, "must be a multiple of 50, got 1501"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_architecture_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(PUBLISHED | change)


def test_missing_keys_are_named() -> None:
    with pytest.raises(ValueError, match="lacks hidden_size, rope_theta"):
        from_json({k: v for k, v in PUBLISHED.items() if k not in ("hidden_size", "rope_theta")})


def test_an_integer_rope_theta_is_read_as_a_number() -> None:
    assert from_json(PUBLISHED | {"rope_theta": 1000000}).decoder.rope_theta == 1e6
