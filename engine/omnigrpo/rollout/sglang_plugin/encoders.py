"""Towers, gate and projectors of the checkpoint, where the server encodes clips itself.

Shape suffixes: ``B`` clips, ``F`` frames, ``S`` side in pixels, ``M`` mel bins, ``L`` mel frames, ``T`` rows, ``D``
width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.parts import part_of
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Clip, ClipFeatures, PrefixInputs, Prompt

_PROMPT = Prompt(prompt_id="of a request", clip=Clip(path=Path()), question="", modalities=(), solution="")
"""Stands where the model's functions want a prompt only for their messages."""


class Encoders:
    """HumanOmni without its decoder, which is SGLang's."""

    def __init__(self, config: HumanOmniConfig) -> None:
        """In torch's default dtype, on its default device; the weights mean nothing before ``load``."""
        no_decoder = replace(config.decoder, num_layers=0, vocab_size=1)
        self._config = config
        self._model = HumanOmni(replace(config, decoder=no_decoder)).eval().requires_grad_(False)
        state = self._model.state_dict()
        self._weights = {name: tensor for name, tensor in state.items() if part_of(name) != "llm"}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every weight, by its name in the checkpoint."""
        return {name: tuple(tensor.shape) for name, tensor in self._weights.items()}

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy some of them."""
        for name, tensor in weights:
            self._weights[name].copy_(tensor)

    @torch.no_grad()
    def video_rows(self, pixels: Sequence[Tensor], questions: Sequence[Tensor]) -> Tensor:
        """Rows ``[T, D]`` of B clips, in order, from pixels ``[F, 3, S, S]`` and the gate's ids of each question."""
        features = self._model.encode(torch.stack(list(pixels)), None)
        return self._rows(features, VIDEO_ROW, self._config.vision.num_tokens, questions)

    @torch.no_grad()
    def audio_rows(self, mels: Sequence[Tensor]) -> Tensor:
        """Rows ``[T, D]`` of B clips, in order, from log-mel ``[M, L]``."""
        features = self._model.encode(None, torch.stack(list(mels)))
        nothing = [torch.tensor([], dtype=torch.int64)] * len(mels)
        return self._rows(features, AUDIO_ROW, self._config.audio.num_tokens, nothing)

    def _rows(
        self, features: Sequence[ClipFeatures], row_id: int, num_tokens: int, questions: Sequence[Tensor]
    ) -> Tensor:
        ids = torch.full((num_tokens,), row_id, device="cpu")
        return self._model.embed_prefixes(
            [
                PrefixInputs(prompt=_PROMPT, token_ids_P=ids, question_ids=question, features=of_clip)
                for of_clip, question in zip(features, questions, strict=True)
            ]
        )
