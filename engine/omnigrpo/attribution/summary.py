"""Attributions of many clips as figures of a data set: means over clips with standard errors."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from omnigrpo.attribution.attention_mass import ROW_KINDS
from omnigrpo.attribution.clip_attribution import ClaimCheck, ClipAttribution, Value
from omnigrpo.attribution.shapley import Coalition
from omnigrpo.schema import Modality


@dataclass(frozen=True, kw_only=True, slots=True)
class Mean:
    """A mean and how sure it is."""

    mean: float
    standard_error: float | None
    """Sample standard deviation / sqrt(count); None for a single number."""
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """Of at least one number."""
        numbers = list(values)
        error = statistics.stdev(numbers) / math.sqrt(len(numbers)) if len(numbers) > 1 else None
        return cls(mean=statistics.fmean(numbers), standard_error=error, count=len(numbers))

    def __str__(self) -> str:
        """With its error, e.g. ``0.41 +- 0.03``."""
        return f"{self.mean:.2f}" + ("" if self.standard_error is None else f" +- {self.standard_error:.2f}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValueSummary:
    """One value function over a data set."""

    coalitions: dict[Coalition, Mean]
    """v(S)."""
    video: Mean
    """Shapley value."""
    audio: Mean


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimSummary:
    """What became of the claims about one modality; standard errors take claims as independent."""

    unfounded: Mean
    """Share of claims that survive the swap of what they cite."""
    drop: Mean
    """Nats per token when the cited modality is swapped."""
    drop_other: Mean
    """When the other one is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSummary:
    """Where some tokens look, mean over clips."""

    mass: dict[str, tuple[Mean, ...]]
    """By kind of row and layer."""
    rows: dict[str, float]
    """By kind: its share of the visible rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetAttribution:
    """How much each modality contributes over a data set."""

    num_clips: int
    num_without_claims: int
    """Completions whose reasoning cites neither modality, or is not there."""
    values: dict[Value, ValueSummary]
    by_label: dict[str, ValueSummary]
    """``gold_logprob`` by gold label."""
    claims: dict[Modality, ClaimSummary]
    attention: dict[str, AttentionSummary]


def summarise(clips: Sequence[ClipAttribution]) -> DatasetAttribution:
    """Average at least one clip; a value that some clips lack is averaged over the others, and its count says so."""
    labels = sorted({clip.solution for clip in clips})
    values = {value: _value([clip for clip in clips if value in clip.values], value) for value in Value}
    gold = {
        label: _value([c for c in clips if c.solution == label and Value.GOLD in c.values], Value.GOLD)
        for label in labels
    }
    modalities: tuple[Modality, ...] = ("video", "audio")
    claims: dict[Modality, ClaimSummary | None] = {
        m: _claims([claim for c in clips for claim in c.claims if claim.modality == m]) for m in modalities
    }
    attention = {name: _attention(clips, name) for name in ("reasoning", "answer")}
    found_claims: dict[Modality, ClaimSummary] = {
        m: found for m, found in claims.items() if found is not None
    }
    return DatasetAttribution(
        num_clips=len(clips),
        num_without_claims=sum(not clip.claims for clip in clips),
        values={value: summary for value, summary in values.items() if summary is not None},
        by_label={label: summary for label, summary in gold.items() if summary is not None},
        claims=found_claims,
        attention={name: summary for name, summary in attention.items() if summary is not None},
    )


def _value(clips: Sequence[ClipAttribution], value: Value) -> ValueSummary | None:
    if not clips:
        return None
    return ValueSummary(
        coalitions={c: Mean.of(clip.values[value][c] for clip in clips) for c in Coalition},
        video=Mean.of(clip.shapley[value].video for clip in clips),
        audio=Mean.of(clip.shapley[value].audio for clip in clips),
    )


def _claims(claims: Sequence[ClaimCheck]) -> ClaimSummary | None:
    if not claims:
        return None
    return ClaimSummary(
        unfounded=Mean.of(float(claim.is_unfounded) for claim in claims),
        drop=Mean.of(claim.drop for claim in claims),
        drop_other=Mean.of(claim.drop_other for claim in claims),
    )


def _attention(clips: Sequence[ClipAttribution], name: str) -> AttentionSummary | None:
    shares = [clip.attention[name] for clip in clips if name in clip.attention]
    if not shares:
        return None
    return AttentionSummary(
        mass={
            kind: tuple(Mean.of(layer) for layer in zip(*(each.mass[kind] for each in shares), strict=True))
            for kind in ROW_KINDS
        },
        rows={kind: statistics.fmean(each.rows[kind] for each in shares) for kind in ROW_KINDS},
    )
