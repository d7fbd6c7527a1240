"""Floating-point operations of the towers and the projector: two per weight and row, attention included, no norms."""

from omnigrpo.model.config import AudioConfig, VisionConfig


def vision_flops(config: VisionConfig) -> float:
    """Of one clip's patch features, the layers that nobody reads left out."""
    frame = _patch_flops(config) + config.num_computed_layers * _vision_layer_flops(config)
    return config.num_frames * frame


def whole_vision_flops(config: VisionConfig) -> float:
    """Of one clip through the whole model: also the layers above the selected one, and the pooling head."""
    width = config.width
    keys = 4.0 * width**2 * config.grid**2
    head = keys + 2.0 * (2 * width**2 + 2 * width * config.ffn_width) + 4.0 * width * config.grid**2
    frame = _patch_flops(config) + config.num_layers * _vision_layer_flops(config) + head
    return config.num_frames * frame


def audio_flops(config: AudioConfig) -> float:
    """Of one clip's encoder positions."""
    first = 2.0 * config.num_mel_frames * 3 * config.num_mel_bins * config.width
    second = 2.0 * config.num_positions * 3 * config.width**2
    return (
        first
        + second
        + config.num_layers * _layer_flops(config.width, config.ffn_width, config.num_positions)
    )


def projector_flops(config: VisionConfig, width: int) -> float:
    """Of one clip's visual rows; depthwise convolutions and channel gates, under 1 %, are left out."""
    patches = config.num_frames * config.grid**2
    rows = config.num_tokens
    first_stage = 2 * config.width * width + 3 * width**2
    branch = patches * first_stage + rows * (8 * width**2 + 4 * width**2 + 2 * width**2)
    face = patches * config.width * width + rows * width**2
    return 2.0 * (2 * branch + face)


def projector_training_flops(config: VisionConfig, width: int) -> float:
    """Forward and the gradients of all weights: three of every product, two of those whose input is a constant."""
    constant = 5 * 2.0 * config.num_frames * config.grid**2 * config.width * width
    return 3 * projector_flops(config, width) - constant


def _vision_layer_flops(config: VisionConfig) -> float:
    return _layer_flops(config.width, config.ffn_width, config.grid**2)


def _patch_flops(config: VisionConfig) -> float:
    return 2.0 * config.grid**2 * 3 * config.patch_size**2 * config.width


def _layer_flops(width: int, ffn_width: int, positions: int) -> float:
    weights = 4 * width**2 + 2 * width * ffn_width
    return 2.0 * positions * weights + 4.0 * positions**2 * width
