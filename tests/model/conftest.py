"""A HumanOmni small enough to compare in float64 within milliseconds."""

from pathlib import Path

import pytest
import torch

from omnigrpo.model.checkpoint_format import Tokenizers
from omnigrpo.model.config import AudioConfig, DecoderConfig, GateConfig, HumanOmniConfig, VisionConfig
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.model.tiny_tokenizer import build_gate_tokenizer, build_tokenizer
from omnigrpo.schema import Clip, ClipFeatures, Modality, PrefixInputs, Prompt

TEXTS = (
    "which emotion is the most obvious?\nOutput the thinking process in <think> </think> tags.",
    "<think>the mouth is curved up and the voice is high</think>\n<answer>happy</answer>",
    "<think>the brows are low and the voice is loud</think>\n<answer>angry</answer>",
)


@pytest.fixture
def small_config() -> HumanOmniConfig:
    """Two frames of 4x4 patches (8 visual rows) and one second of sound (16 audio rows)."""
    return HumanOmniConfig(
        vision=VisionConfig(
            image_size=32, patch_size=8, width=16, num_layers=3, num_heads=2, ffn_width=24, num_frames=2
        ),
        audio=AudioConfig(
            num_mel_bins=20,
            chunk_seconds=1,
            width=16,
            num_layers=2,
            num_heads=2,
            ffn_width=24,
            classifier_width=8,
        ),
        gate=GateConfig(
            vocab_size=160, width=16, num_layers=2, num_heads=2, ffn_width=24, max_positions=48, gate_width=24
        ),
        decoder=DecoderConfig(
            vocab_size=512,
            width=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            ffn_width=48,
            rope_theta=1e4,
            max_positions=256,
        ),
    )


@pytest.fixture(scope="session")
def tokenizers() -> Tokenizers:
    """Tokenizers trained on a few sentences."""
    return Tokenizers(text=build_tokenizer(TEXTS), gate=build_gate_tokenizer(TEXTS, vocab_size=160))


@pytest.fixture
def model(small_config: HumanOmniConfig) -> HumanOmni:
    """The small model in float32, with biases and norms off their neutral values."""
    model = HumanOmni(small_config)
    model.init_weights(0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def encoder(tokenizers: Tokenizers, small_config: HumanOmniConfig) -> PromptEncoder:
    """Prompts in R1-Omni's RL form."""
    return PromptEncoder(tokenizers.text, tokenizers.gate, small_config, PromptTemplate())


class InputFactory:
    """Makes prefix inputs with random features in the right shapes."""

    def __init__(self, config: HumanOmniConfig, encoder: PromptEncoder) -> None:
        self._config = config
        self._encoder = encoder

    def __call__(
        self,
        question: str = "which emotion?",
        modalities: tuple[Modality, ...] = ("video", "audio"),
        seed: int = 0,
    ) -> PrefixInputs:
        """Encode one prompt; the features depend on ``seed`` alone."""
        generator = torch.Generator().manual_seed(seed)
        vision, audio = self._config.vision, self._config.audio
        frames = torch.randn(vision.num_frames, vision.grid**2, vision.width, generator=generator)
        sounds = torch.randn(audio.num_tokens, audio.width, generator=generator)
        prompt = Prompt(
            prompt_id=f"{seed}",
            clip=Clip(path=Path("clip.mp4")),
            question=question,
            modalities=modalities,
            solution="happy",
        )
        return self._encoder.encode(
            prompt,
            ClipFeatures(
                vision_FND=frames if "video" in modalities else None,
                audio_AD=sounds if "audio" in modalities else None,
            ),
        )


@pytest.fixture
def make_inputs(small_config: HumanOmniConfig, encoder: PromptEncoder) -> InputFactory:
    """Builds prefix inputs for the small model."""
    return InputFactory(small_config, encoder)
