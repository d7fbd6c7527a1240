"""HumanOmniConfig as the reference's config.json, and back.

The decoder's keys are at the top level. ``vision_config``, ``audio_config`` and ``bert_config`` are this
project's addition: where one is absent, the part has the geometry of siglip-base-patch16-224,
whisper-large-v3 or bert-base-uncased, as in the reference's file.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from omnigrpo.model.config import AudioConfig, DecoderConfig, GateConfig, HumanOmniConfig, VisionConfig

POSITIONS_PER_SECOND = 50
"""Whisper encoder positions per second of audio."""

Part = TypeVar("Part", VisionConfig, AudioConfig, GateConfig)
Value = TypeVar("Value", int, float, bool)

_DECODER_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_width",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_positions",
    "tie_word_embeddings": "tie_word_embeddings",
}
_VISION_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_width",
}
_AUDIO_KEYS = {
    "num_mel_bins": "num_mel_bins",
    "d_model": "width",
    "encoder_layers": "num_layers",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "ffn_width",
    "classifier_proj_size": "classifier_width",
    "num_labels": "num_classes",
    "pool": "pool",
}
_GATE_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_width",
    "max_position_embeddings": "max_positions",
    "gate_hidden_size": "gate_width",
}
_FIXED = {
    "architectures": ["HumanOmniQwen2ForCausalLM"],
    "model_type": "HumanOmni_qwen2",
    "hidden_act": "silu",
    "image_aspect_ratio": "pad",
    "mm_projector_type": "all_in_one_small",
    "mm_audio_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_use_x_start_end": True,
    "rope_scaling": None,
    "use_sliding_window": False,
}
_MUST_EQUAL = (
    "model_type",
    "hidden_act",
    "mm_projector_type",
    "mm_audio_projector_type",
    "mm_vision_select_feature",
    "rope_scaling",
    "use_sliding_window",
)
"""Keys of ``_FIXED`` whose other values are another architecture."""


def to_json(config: HumanOmniConfig) -> dict[str, object]:
    """Return the content of config.json."""
    document: dict[str, object] = {
        **_FIXED,
        **_take(config.decoder, _DECODER_KEYS),
        "num_frames": config.vision.num_frames,
        "mm_vision_select_layer": config.vision.select_layer,
        "mm_hidden_size": config.vision.width,
        "audio_hidden_size": config.audio.width,
    }
    default_vision = VisionConfig(
        num_frames=config.vision.num_frames, select_layer=config.vision.select_layer
    )
    if config.vision != default_vision:
        document["vision_config"] = _take(config.vision, _VISION_KEYS)
    if config.audio != AudioConfig():
        positions = config.audio.chunk_seconds * POSITIONS_PER_SECOND
        document["audio_config"] = {**_take(config.audio, _AUDIO_KEYS), "max_source_positions": positions}
    if config.gate != GateConfig():
        document["bert_config"] = _take(config.gate, _GATE_KEYS)
    return document


def from_json(document: Mapping[str, object]) -> HumanOmniConfig:
    """Read the content of config.json.

    Raises:
        ValueError: a key that is missing, of the wrong type, or names another architecture.
    """
    for key in _MUST_EQUAL:
        if document.get(key, _FIXED[key]) != _FIXED[key]:
            raise ValueError(f"config.json: {key} must be {_FIXED[key]!r}, got {document[key]!r}")
    vision = VisionConfig(
        num_frames=_value(document, "num_frames", 8),
        select_layer=_value(document, "mm_vision_select_layer", -2),
    )
    vision = _update(vision, document, "vision_config", _VISION_KEYS)
    audio = _update(AudioConfig(), document, "audio_config", _AUDIO_KEYS)
    if "audio_config" in document:
        section = _section(document, "audio_config")
        seconds, rest = divmod(_value(section, "max_source_positions", 1500), POSITIONS_PER_SECOND)
        if rest:
            raise ValueError(
                f"config.json: audio_config.max_source_positions must be a multiple of "
                f"{POSITIONS_PER_SECOND}, got {section['max_source_positions']!r}"
            )
        audio = replace(audio, chunk_seconds=seconds)
    _check_width(document, "mm_hidden_size", vision.width, "vision_config")
    _check_width(document, "audio_hidden_size", audio.width, "audio_config")
    return HumanOmniConfig(
        vision=vision,
        audio=audio,
        gate=_update(GateConfig(), document, "bert_config", _GATE_KEYS),
        decoder=_decoder(document),
    )


def _decoder(document: Mapping[str, object]) -> DecoderConfig:
    missing = [key for key in _DECODER_KEYS if key not in document]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}: is this a HumanOmni checkpoint?")
    defaults = DecoderConfig()
    return DecoderConfig(
        **{name: _value(document, key, getattr(defaults, name)) for key, name in _DECODER_KEYS.items()}
    )


def _update(part: Part, document: Mapping[str, object], section_name: str, keys: Mapping[str, str]) -> Part:
    section = _section(document, section_name)
    return replace(part, **{name: _value(section, key, getattr(part, name)) for key, name in keys.items()})


def _section(document: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = document.get(name, {})
    if not isinstance(section, dict):
        raise ValueError(f"config.json: {name} must be an object, got {section!r}")
    return section


def _value(section: Mapping[str, object], key: str, default: Value) -> Value:
    """Read a number or flag of the default's type; an int will do for a float."""
    value = section.get(key, default)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise ValueError(f"config.json: {key} must be of type {type(default).__name__}, got {value!r}")
    return value


def _take(part: object, keys: Mapping[str, str]) -> dict[str, object]:
    return {key: getattr(part, name) for key, name in keys.items()}


def _check_width(document: Mapping[str, object], key: str, width: int, section: str) -> None:
    if document.get(key, width) != width:
        raise ValueError(
            f"config.json: {key} is {document[key]!r}, but the tower is {width} wide; give {section}"
        )
