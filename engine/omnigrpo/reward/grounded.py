"""Rewards for completions that depend on what they were shown; both read the model (see ``reward.context``).

A sampled text is likelier under its own prompt than under another by KL(own || other) >= 0 nats on average, so drops
lean to the positive side whatever is said; the scale sets how many nats per token count as full dependence.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from omnigrpo.reward.aliases import EMOTION_ALIASES
from omnigrpo.reward.context import Baseline, GroupContext, ModalityChange
from omnigrpo.reward.modality_claims import Claim, Lexicon, find_claims
from omnigrpo.reward.tagged_answer import Accuracy, Preset, answer_span
from omnigrpo.reward.token_spans import Span, tokens_inside
from omnigrpo.schema import Group, Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class Grounded:
    """How far what a completion says of a modality depends on that modality, from 0 to 1.

    Per modality m that the reasoning cites: d_m, the mean over the tokens of the citing sentences of
    log p(token | prompt) - log p(token | prompt with m changed); the reward is the mean over m of
    min(max(d_m / scale, 0), 1). A reasoning that cites nothing gets 0, and so does what is said of a modality that the
    prompt does not have. A modality that cannot be swapped because the step has no other clip is left out.
    """

    scale: float = 0.5
    """Nats per token that earn the whole reward."""
    baseline: Baseline = "swap"
    video_terms: tuple[str, ...] = ()
    """Besides those of ``reward.modality_claims``."""
    audio_terms: tuple[str, ...] = ()
    _lexicon: Lexicon = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for a scale that is not positive, or an unusable term."""
        _check_scale(self.scale)
        lexicon = Lexicon().extended(video=self.video_terms, audio=self.audio_terms)
        object.__setattr__(self, "_lexicon", lexicon)

    def __call__(self, group: Group, context: GroupContext) -> list[float]:
        """Score every completion of ``group``."""
        claims = [find_claims(text, self._lexicon) for text in group.texts]
        shown = group.inputs.prompt.modalities
        cited: list[Modality] = [
            m for m in shown if any(claim.modality == m for found in claims for claim in found)
        ]
        changes = [ModalityChange(modality=modality, baseline=self.baseline) for modality in cited]
        drops = dict(zip(cited, context.drops(*changes), strict=True))
        return [
            self._value(found, spans, {m: None if d is None else d[index] for m, d in drops.items()})
            for index, (found, spans) in enumerate(zip(claims, context.token_spans, strict=True))
        ]

    def _value(
        self,
        claims: Sequence[Claim],
        spans: Sequence[Span],
        drops: dict[Modality, tuple[float, ...] | None],
    ) -> float:
        shares: list[float] = []
        for modality in dict.fromkeys(claim.modality for claim in claims):
            if modality not in drops:
                shares.append(0.0)  # Said of what was not shown.
                continue
            drop = drops[modality]
            if drop is not None:
                cited = [claim.span for claim in claims if claim.modality == modality]
                tokens = {token for span in cited for token in tokens_inside(spans, span)}
                shares.append(_share(statistics.fmean(drop[token] for token in sorted(tokens)), self.scale))
        return statistics.fmean(shares) if shares else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AudioAware:
    """How far a right completion needs the sound: 0 for a wrong answer, else min(max(d / scale, 0), 1).

    d is the mean over tokens of log p(token | prompt) - log p(token | prompt without audio). By default they are the
    whole completion's: after a reasoning that names the emotion the answer's own tokens hardly depend on anything
    else. A prompt without audio gets 0.
    """

    preset: Preset = Preset.ROBUST
    """Whose rules say what a right answer is."""
    scale: float = 0.5
    """Nats per token that earn the whole reward."""
    baseline: Baseline = "remove"
    tokens: Literal["completion", "answer"] = "completion"
    """``answer``: those inside the answer tags only."""

    def __post_init__(self) -> None:
        """Raises ValueError for a scale that is not positive."""
        _check_scale(self.scale)

    def __call__(self, group: Group, context: GroupContext) -> list[float]:
        """Score every completion of ``group``."""
        accuracy = Accuracy(preset=self.preset, aliases=EMOTION_ALIASES)
        right = [value > 0 for value in accuracy(group)]
        if not any(right):
            return [0.0] * len(right)
        (drops,) = context.drops(ModalityChange(modality="audio", baseline=self.baseline))
        if drops is None:
            return [0.0] * len(right)
        return [
            self._value(text, spans, drop) if is_right else 0.0
            for text, spans, drop, is_right in zip(
                group.texts, context.token_spans, drops, right, strict=True
            )
        ]

    def _value(self, text: str, spans: Sequence[Span], drop: Sequence[float]) -> float:
        wanted = answer_span(text) if self.tokens == "answer" else (0, len(text))
        chosen = [] if wanted is None else tokens_inside(spans, wanted)
        return _share(statistics.fmean(drop[token] for token in chosen), self.scale) if chosen else 0.0


def _share(drop: float, scale: float) -> float:
    return min(max(drop / scale, 0.0), 1.0)


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"scale must be above 0 nats per token, got {scale}")
