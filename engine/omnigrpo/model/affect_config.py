"""Geometry of AffectGPT at any size; the defaults are the released model's (CLIP-L/14, HuBERT-L, Qwen2.5-7B)."""

from dataclasses import dataclass, field

from omnigrpo.model.config import DecoderConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipVisionConfig:
    """CLIP image tower: one projected vector per frame."""

    image_size: int = 224
    """Side of the square input frame, pixels."""
    patch_size: int = 14
    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_width: int = 4096
    projection_width: int = 768
    """Width of a frame's feature."""
    num_frames: int = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class HubertConfig:
    """HuBERT encoder: one vector per audio window, the mean of its last layers over time."""

    width: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    ffn_width: int = 4096
    conv_width: int = 512
    num_windows: int = 8
    window_seconds: float = 2.0
    num_averaged_layers: int = 4
    """Hidden states, from the last one back, whose mean is the feature."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AffectGPTConfig:
    """The whole model."""

    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    audio: HubertConfig = field(default_factory=HubertConfig)
    decoder: DecoderConfig = field(
        default_factory=lambda: DecoderConfig(
            vocab_size=152064,
            width=3584,
            num_layers=28,
            num_heads=28,
            num_kv_heads=4,
            ffn_width=18944,
            tie_word_embeddings=False,
        )
    )

    @property
    def fusion_width(self) -> int:
        """Width in which picture and sound are fused: that of the wider one."""
        return max(self.vision.projection_width, self.audio.width)


def tiny_affect(vocab_size: int = 512) -> AffectGPTConfig:
    """A model of a few million parameters with every part of the real one."""
    return AffectGPTConfig(
        vision=ClipVisionConfig(
            image_size=96,
            patch_size=16,
            width=96,
            num_layers=4,
            num_heads=4,
            ffn_width=384,
            projection_width=96,
            num_frames=8,
        ),
        audio=HubertConfig(
            width=96,
            num_layers=3,
            num_heads=4,
            ffn_width=384,
            conv_width=48,
            num_windows=4,
            window_seconds=1.0,
        ),
        decoder=DecoderConfig(
            vocab_size=vocab_size,
            width=128,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            ffn_width=384,
            rope_theta=1e4,
            max_positions=1024,
        ),
    )
