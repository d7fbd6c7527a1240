"""A tiny model with its prompt encoder, and clips whose features are drawn rather than rendered."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omnigrpo.data.synthetic.reasoning import QUESTION, vocabulary_texts
from omnigrpo.model.config import tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.model.tiny_tokenizer import build_gate_tokenizer, build_tokenizer
from omnigrpo.schema import Clip, ClipFeatures, PrefixInputs, Prompt


@dataclass(frozen=True, kw_only=True)
class Rig:
    """What attribution needs, without media."""

    model: HumanOmni
    encoder: PromptEncoder

    def inputs(self, name: str, solution: str, vision: Tensor, audio: Tensor) -> PrefixInputs:
        """A prompt whose features are these vectors, the same in every patch and at every moment, and some noise."""
        config = self.model.config
        generator = torch.Generator().manual_seed(int.from_bytes(name.encode()) % 2**31)
        frames = (config.vision.num_frames, config.vision.grid**2, config.vision.width)
        moments = (config.audio.num_tokens, config.audio.width)
        prompt = Prompt(
            prompt_id=name,
            clip=Clip(path=Path(f"{name}.mp4")),
            question=QUESTION,
            modalities=("video", "audio"),
            solution=solution,
        )
        features = ClipFeatures(
            vision_FND=vision + 0.1 * torch.randn(frames, generator=generator),
            audio_AD=audio + 0.1 * torch.randn(moments, generator=generator),
        )
        return self.encoder.encode(prompt, features)

    def clips(self, count: int, labels: tuple[str, ...] = ("happy", "sad")) -> list[PrefixInputs]:
        """Clips with features of their own each."""
        generator = torch.Generator().manual_seed(3)
        vision, audio = self.model.config.vision.width, self.model.config.audio.width
        return [
            self.inputs(
                f"clip{index}",
                labels[index % len(labels)],
                torch.randn(vision, generator=generator),
                torch.randn(audio, generator=generator),
            )
            for index in range(count)
        ]


def _rig(seed: int = 0, dtype: torch.dtype = torch.float32) -> Rig:
    texts = vocabulary_texts()
    tokenizer, gate_tokenizer = build_tokenizer(texts, vocab_size=640), build_gate_tokenizer(texts)
    model = HumanOmni(tiny(vocab_size=len(tokenizer), gate_vocab_size=len(gate_tokenizer)))
    model.init_weights(seed)
    encoder = PromptEncoder(tokenizer, gate_tokenizer, model.config, PromptTemplate())
    return Rig(model=model.to(dtype), encoder=encoder)


@pytest.fixture(scope="package")
def make_rig() -> Callable[..., Rig]:
    """Builds a rig from a seed and a dtype."""
    return _rig


@pytest.fixture(scope="package")
def rig() -> Rig:
    """A fresh tiny model in float64; nobody may change it."""
    return _rig(dtype=torch.float64)
