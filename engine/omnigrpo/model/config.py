"""Geometry of HumanOmni at any size: the defaults are HumanOmni-0.5B's, `tiny()` is the demo's."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """SigLIP tower."""

    image_size: int = 224
    """Side of the square input frame, pixels."""
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    select_layer: int = -2
    """Index into the hidden states (embeddings first) whose patches are the feature."""
    num_frames: int = 8

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Visual rows of a prefix: the projector halves both sides of the grid."""
        return self.num_frames * (self.grid // 2) ** 2

    @property
    def num_computed_layers(self) -> int:
        """Encoder layers that the feature needs; the rest are held but never run."""
        return self.select_layer % (self.num_layers + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioConfig:
    """Whisper encoder."""

    num_mel_bins: int = 128
    chunk_seconds: int = 30
    """Waveforms are zero-padded or cut to this length."""
    width: int = 1280
    num_layers: int = 32
    num_heads: int = 20
    ffn_width: int = 5120
    classifier_width: int = 256
    """Width of the classification head that the checkpoint holds and nothing uses."""
    num_classes: int = 2
    pool: int = 3
    """Encoder positions averaged into one audio row."""

    @property
    def num_mel_frames(self) -> int:
        """Mel frames at a hop of 160 samples, 16 kHz."""
        return self.chunk_seconds * 100

    @property
    def num_positions(self) -> int:
        """Encoder positions: the second convolution has stride 2."""
        return self.num_mel_frames // 2

    @property
    def num_tokens(self) -> int:
        """Audio rows of a prefix."""
        return self.num_positions // self.pool


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig:
    """BERT encoder of the question and the gate that weighs the three visual branches."""

    vocab_size: int = 30522
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    ffn_width: int = 3072
    max_positions: int = 512
    gate_width: int = 3584
    """Hidden width of the gate's MLP (3584 also in the 0.5B model)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Qwen2 decoder."""

    vocab_size: int = 151936
    width: int = 896
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    ffn_width: int = 4864
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_positions: int = 32768
    tie_word_embeddings: bool = True
    mrope_section: tuple[int, int, int] | None = None
    """How many of the rotary frequencies turn with each of the three rows of M-RoPE positions (time, height, width),
    fastest first, as in Qwen2-VL and Qwen2.5-Omni; None for one row of positions."""

    def __post_init__(self) -> None:
        """Raises ValueError for sections that do not cover the frequencies."""
        section = self.mrope_section
        if section is not None and (
            len(section) != 3 or min(section) < 0 or sum(section) != self.head_width // 2
        ):
            raise ValueError(
                f"mrope_section is {section}; give three numbers of frequencies that add up to half the head width, "
                f"{self.head_width // 2}"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class HumanOmniConfig:
    """The whole model."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


def tiny(vocab_size: int = 512, gate_vocab_size: int = 256) -> HumanOmniConfig:
    """A model of about three million parameters with every part of the real one."""
    return HumanOmniConfig(
        vision=VisionConfig(
            image_size=96, patch_size=16, width=96, num_layers=4, num_heads=4, ffn_width=384, num_frames=4
        ),
        audio=AudioConfig(
            num_mel_bins=80,
            chunk_seconds=3,
            width=96,
            num_layers=3,
            num_heads=4,
            ffn_width=384,
            classifier_width=32,
        ),
        gate=GateConfig(
            vocab_size=gate_vocab_size,
            width=64,
            num_layers=2,
            num_heads=2,
            ffn_width=256,
            max_positions=128,
            gate_width=128,
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
