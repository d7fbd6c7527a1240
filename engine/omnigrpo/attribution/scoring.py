"""Log-probs and attention of given completions under many prefixes, in packed forwards."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.algorithm.policy import completion_logprobs
from omnigrpo.attribution.attention_mass import AttentionObserver, Watched
from omnigrpo.attribution.spoken import Spoken
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.qwen2 import Qwen2Decoder
from omnigrpo.schema import Group, PrefixInputs, PrefixStates
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A prefix and what is scored after it."""

    inputs: PrefixInputs
    spoken: tuple[Spoken, ...]
    is_watched: bool = False
    """Measure the attention of the first completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredScene:
    """What the model makes of a scene."""

    logprobs: tuple[tuple[float, ...], ...]
    """Natural log-prob of every token at temperature 1, by completion."""
    mass_LCX: Tensor | None
    """By layer and token of the first completion; None unless watched."""


@dataclass(kw_only=True, slots=True)
class ScoringCounters:
    """Work done."""

    passes: int = 0
    """Packed forwards."""
    prefixes: int = 0
    """Prefixes in them."""
    rows: int = 0
    """Packed rows in them."""


@dataclass(kw_only=True, slots=True)
class SceneScorer:
    """Runs scenes through a model."""

    model: HumanOmni
    budget_rows: int
    """Packed rows of one forward; a scene that has more goes alone."""
    counters: ScoringCounters = field(default_factory=ScoringCounters)

    @torch.no_grad()
    def score(self, scenes: Sequence[Scene]) -> list[ScoredScene]:
        """Each scene's prefix once; as many scenes in one forward as the budget allows."""
        groups = [_group(scene) for scene in scenes]
        scored: list[ScoredScene] = []
        for run in split_by_budget(groups, self.budget_rows):
            scored += self._pass(scenes[len(scored) : len(scored) + len(run)], run)
        return scored

    def _pass(self, scenes: Sequence[Scene], groups: Sequence[Group]) -> list[ScoredScene]:
        packed = pack(groups)
        watched = [
            Watched(group=index, completion=0, token_ids_P=scene.inputs.token_ids_P)
            for index, scene in enumerate(scenes)
            if scene.is_watched
        ]
        observed = _ObservedModel(self.model, AttentionObserver(packed.layout, watched))
        logprob_C = completion_logprobs(observed, packed).logprob_T.cpu()
        self.counters.passes += 1
        self.counters.prefixes += len(groups)
        self.counters.rows += packed.num_rows
        lengths = [len(spoken.token_ids) for scene in scenes for spoken in scene.spoken]
        pieces = iter([tuple(piece.tolist()) for piece in logprob_C.split(lengths)])
        masses = iter(observed.decoder.observer.masses)
        return [
            ScoredScene(
                logprobs=tuple(next(pieces) for _ in scene.spoken),
                mass_LCX=torch.stack(next(masses)) if scene.is_watched else None,
            )
            for scene in scenes
        ]


def _group(scene: Scene) -> Group:
    return Group(
        inputs=scene.inputs,
        completions=tuple(spoken.completion() for spoken in scene.spoken),
        texts=tuple(spoken.text for spoken in scene.spoken),
    )


class _ObservedDecoder:
    """The model's decoder with an attention that takes notes; a `PolicyDecoder`."""

    def __init__(self, decoder: Qwen2Decoder, observer: AttentionObserver) -> None:
        self._decoder = decoder
        self.observer = observer

    def __call__(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> Tensor:
        return self._decoder.decode(embeddings_TD, positions_T, self.observer)

    def prefill(self, embeddings_TD: Tensor, positions_T: Tensor, layout: SharedPrefixLayout) -> PrefixStates:
        return self._decoder.prefill(embeddings_TD, positions_T, layout)

    def extend(
        self, prefix: PrefixStates, embeddings_CD: Tensor, positions_C: Tensor, lengths: tuple[int, ...]
    ) -> Tensor:
        return self._decoder.extend(prefix, embeddings_CD, positions_C, lengths)


class _ObservedModel:
    """A `PolicyModel` around the observed decoder."""

    def __init__(self, model: HumanOmni, observer: AttentionObserver) -> None:
        self._model = model
        self.decoder = _ObservedDecoder(model.decoder, observer)

    @property
    def head_weight_VD(self) -> Tensor:
        return self._model.head_weight_VD

    def embed_prefixes(self, inputs: Sequence[PrefixInputs]) -> Tensor:
        return self._model.embed_prefixes(inputs)

    def embed_tokens(self, token_ids: Tensor) -> Tensor:
        return self._model.embed_tokens(token_ids)
