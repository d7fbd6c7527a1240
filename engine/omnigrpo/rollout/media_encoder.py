"""From a decoded clip to the rows of its prefix, outside the policy: towers, projectors and gate under their own names.

Shape suffixes: ``F`` frames, ``S`` side in pixels, ``M`` mel bins, ``L`` mel frames, ``R`` rows, ``D`` decoder width.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from omnigrpo.model.audio_tower import AudioTower
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.gate import QuestionStates, build_bert, build_gate
from omnigrpo.model.parts import part_of
from omnigrpo.model.projectors import AllInOneSmall, mlp_2x_gelu
from omnigrpo.model.vision_tower import VisionTower

CHECKPOINT_PREFIX = "model."
"""What the checkpoint puts before this module's names."""


class MediaEncoder(nn.Module):
    """Makes the rows that ``HumanOmni.embed_prefixes`` makes of one clip; what the frozen towers make of it is kept."""

    def __init__(self, config: HumanOmniConfig, *, cache_bytes: int = 512 << 20) -> None:
        """``cache_bytes``: of tower features, in host memory."""
        super().__init__()
        width = config.decoder.width
        self.vision_tower = VisionTower(config.vision)
        self.audio_tower = AudioTower(config.audio)
        self.mm_projector = AllInOneSmall(config.vision, width)
        self.audio_projector = mlp_2x_gelu(config.audio.width, width)
        self.bert_model = build_bert(config.gate)
        self.bert_gate = build_gate(config.gate)
        self.requires_grad_(False)
        self.eval()
        self._question_states = QuestionStates(self.bert_model)
        self._features = _FeatureMemory(cache_bytes)
        self.tower_passes = 0
        """Clips that went through a tower, sound and pictures counted apart."""

    @torch.no_grad()
    def video_rows(self, clip: str, pixels_F3SS: Tensor, question: tuple[int, ...]) -> Tensor:
        """``[R, D]``; ``clip`` tells the content of its pixels from all others'."""
        features_FNC = self._encoded(f"video {clip}", pixels_F3SS, self.vision_tower)
        weights_13 = self.bert_gate(self._question_states([question])).softmax(-1)
        return self.mm_projector(features_FNC[None], weights_13).flatten(0, 1)

    @torch.no_grad()
    def audio_rows(self, clip: str, mel_ML: Tensor) -> Tensor:
        """``[R, D]``; ``clip`` tells the content of its sound from all others'."""
        features_AC = self._encoded(f"audio {clip}", mel_ML, lambda mel_ML: self.audio_tower(mel_ML[None])[0])
        return self.audio_projector(features_AC[None]).flatten(0, 1)

    @torch.no_grad()
    def load(self, named: list[tuple[str, Tensor]]) -> None:
        """Copy weights by their names in the checkpoint; ``problem`` must have found none."""
        parameters = dict(self.named_parameters())
        for name, tensor in named:
            parameters[name.removeprefix(CHECKPOINT_PREFIX)].copy_(tensor)
        if any(part_of(name) in ("vision tower", "audio tower") for name, _ in named):
            self._features.clear()

    def problem(self, name: str, tensor: Tensor) -> str | None:
        """Why a weight cannot be loaded; None when it can."""
        parameter = dict(self.named_parameters()).get(name.removeprefix(CHECKPOINT_PREFIX))
        if parameter is None:
            return f"{name} is none of its weights"
        found, expected = tuple(tensor.shape), tuple(parameter.shape)
        return None if found == expected else f"{name} has shape {found}, the model needs {expected}"

    def _encoded(self, key: str, given: Tensor, tower: Callable[[Tensor], Tensor]) -> Tensor:
        """On the weights' device."""
        device = next(self.parameters()).device
        kept = self._features.find(key)
        if kept is None:
            self.tower_passes += 1
            features = tower(given.to(device))
            self._features.put(key, features.cpu())
            return features
        return kept.to(device)


class _FeatureMemory:
    """Tensors by key, the least recently used thrown away beyond the budget."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def find(self, key: str) -> Tensor | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: str, features: Tensor) -> None:
        self._held[key] = features
        while sum(tensor.nbytes for tensor in self._held.values()) > self._budget:
            self._held.popitem(last=False)

    def clear(self) -> None:
        self._held.clear()
