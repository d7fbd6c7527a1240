"""The result of one evaluation, as data and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from omnigrpo.evaluate.bootstrap import Interval, Intervals
from omnigrpo.evaluate.emotion_metrics import (
    AnswerRule,
    ConstantAnswer,
    EmotionMetrics,
    Matching,
    PairRecall,
    emotion_metrics,
    pair_recalls,
    predicted_label,
)
from omnigrpo.reward.tagged_answer import Format, Preset
from omnigrpo.schema import DroppedPrompt


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedClip:
    """One clip and what the model said of it."""

    prompt_id: str
    clip: str
    """Path of the media file."""
    solution: str
    text: str
    """The completion, special tokens removed."""
    num_tokens: int
    finish_reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenQuantiles:
    """How long the completions are, in tokens."""

    least: int
    quarter: float
    median: float
    three_quarters: float
    most: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        """Of one length per completion, at least one."""
        quarter, median, three_quarters = np.percentile(lengths, [25, 50, 75]).tolist()
        return cls(
            least=min(lengths),
            quarter=quarter,
            median=median,
            three_quarters=three_quarters,
            most=max(lengths),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """Figures of one model on one split, and the completions behind them."""

    stage: str
    """What was done to the model before, e.g. ``cold_start`` or ``grpo``."""
    split: str
    strict: EmotionMetrics
    alias: EmotionMetrics
    pairs: tuple[PairRecall, ...]
    """Alias matching."""
    format_rate: float
    """Share of completions in the robust format: one think block, then one answer block."""
    truncated_rate: float
    """Share of completions that reached the token limit."""
    mean_completion_tokens: float
    completion_tokens: TokenQuantiles
    seconds: float
    """Wall time of generation; of the clips answered after an interruption only."""
    clips: tuple[EvaluatedClip, ...]
    num_dropped: int
    """Prompts left out because their clip could not be used; no figure counts them."""
    benchmark: str | None = None
    """Name of the benchmark whose test set this is; None for another split."""

    def headline(self) -> str:
        """WAR and UAR in per cent, strict and alias, and the format rate, in one line."""
        return (
            f"WAR {self.strict.war:.1%} (+- {self.strict.war_standard_error:.1%}), UAR {self.strict.uar:.1%}; "
            f"alias WAR {self.alias.war:.1%}, UAR {self.alias.uar:.1%}; format {self.format_rate:.1%}; "
            f"{len(self.clips)} clips, {self.num_dropped} dropped"
        )

    def to_json(self) -> dict[str, object]:
        """Plain data for ``json.dumps``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> Self:
        """The report that ``to_json`` wrote; ValueError when a field is missing or unknown."""
        try:
            return cls(
                **data
                | {
                    "strict": _metrics_from_json(data["strict"]),
                    "alias": _metrics_from_json(data["alias"]),
                    "completion_tokens": TokenQuantiles(**data["completion_tokens"]),
                    "pairs": tuple(_pair_from_json(pair) for pair in data["pairs"]),
                    "clips": tuple(EvaluatedClip(**clip) for clip in data["clips"]),
                }
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not an evaluation report ({error}); evaluate again to write a new one"
            ) from error


def summarise(
    clips: Sequence[EvaluatedClip],
    *,
    stage: str,
    split: str,
    labels: Sequence[str] | None = None,
    pairs: Sequence[tuple[str, str]] = (),
    dropped: Sequence[DroppedPrompt] = (),
    seconds: float = 0.0,
    answer: AnswerRule = "tags",
    benchmark: str | None = None,
) -> EvaluationReport:
    """Work out every figure of the report from the completions."""
    golds = [clip.solution for clip in clips]
    predictions = {
        matching: [predicted_label(clip.text, matching, answer) for clip in clips] for matching in Matching
    }
    strict, alias = (
        emotion_metrics(golds, predictions[matching], matching=matching, labels=labels)
        for matching in (Matching.STRICT, Matching.ALIAS)
    )
    in_format = Format(preset=Preset.ROBUST)
    return EvaluationReport(
        stage=stage,
        split=split,
        strict=strict,
        alias=alias,
        pairs=pair_recalls(golds, predictions[Matching.ALIAS], pairs, matching=Matching.ALIAS),
        format_rate=sum(in_format.is_right(clip.text) for clip in clips) / len(clips),
        truncated_rate=sum(clip.finish_reason == "length" for clip in clips) / len(clips),
        mean_completion_tokens=sum(clip.num_tokens for clip in clips) / len(clips),
        completion_tokens=TokenQuantiles.of([clip.num_tokens for clip in clips]),
        seconds=seconds,
        clips=tuple(clips),
        num_dropped=len(dropped),
        benchmark=benchmark,
    )


def _metrics_from_json(data: dict) -> EmotionMetrics:
    confusion = tuple(tuple(row) for row in data["confusion"])
    intervals = Intervals(**{name: Interval(**ends) for name, ends in data["intervals"].items()})
    return EmotionMetrics(
        **data
        | {
            "labels": tuple(data["labels"]),
            "confusion": confusion,
            "intervals": intervals,
            "constant": ConstantAnswer(**data["constant"]),
        }
    )


def _pair_from_json(data: dict) -> PairRecall:
    return PairRecall(**{name: tuple(value) for name, value in data.items()})
