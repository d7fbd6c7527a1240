"""Set precision, recall and F over emotion wheels, per sample and of a corpus (OV-MERD, AffectGPT's section 4)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from omnigrpo.emotion_wheel.tables import Level
from omnigrpo.emotion_wheel.wheel import EmotionWheel

Labels = Sequence[Iterable[str]]
"""Of every sample its labels; in any case, repeated or unknown ones allowed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WheelScore:
    """Corpus means on one wheel, in fractions of 1."""

    wheel: str
    precision: float
    recall: float
    f: float
    """2PR / (P + R) of the two means; 0 where both are 0."""
    num_samples: int
    """Samples that count: those whose reference labels are on the wheel."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusScore:
    """Figures of a corpus: plain means over the wheels."""

    precision: float
    recall: float
    f: float
    level: Level
    wheels: tuple[WheelScore, ...]
    wheel_hash: str
    """Content hash of the tables that were used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleScores:
    """Every sample's mean over the wheels that its reference labels are on; NaN where they are on none."""

    precision_N: np.ndarray
    recall_N: np.ndarray
    f_N: np.ndarray
    """Mean of the wheels' F1, not the F of the two means."""


def corpus_score(
    wheel: EmotionWheel, predicted: Labels, reference: Labels, *, level: Level = "level1"
) -> CorpusScore:
    """Score a corpus as the reference implementation does.

    A sample whose reference labels are not on a wheel is skipped there; one without a predicted label on it has
    precision and recall 0. A wheel that every sample skips scores 0. Raises ValueError for lists of different lengths.
    """
    precision_NW, recall_NW, counts_NW = _per_wheel(wheel, predicted, reference, level)
    scores = tuple(
        _wheel_score(
            table.name, precision_NW[counts_NW[:, index], index], recall_NW[counts_NW[:, index], index]
        )
        for index, table in enumerate(wheel.tables.wheels)
    )
    return CorpusScore(
        precision=sum(s.precision for s in scores) / len(scores),
        recall=sum(s.recall for s in scores) / len(scores),
        f=sum(s.f for s in scores) / len(scores),
        level=level,
        wheels=scores,
        wheel_hash=wheel.content_hash,
    )


def sample_scores(
    wheel: EmotionWheel, predicted: Labels, reference: Labels, *, level: Level = "level1"
) -> SampleScores:
    """Score every sample by itself, as a reward does: the mean over the wheels that count for it."""
    precision_NW, recall_NW, counts_NW = _per_wheel(wheel, predicted, reference, level)
    both_NW = precision_NW + recall_NW
    f_NW = np.divide(2 * precision_NW * recall_NW, both_NW, out=np.zeros_like(both_NW), where=both_NW > 0)
    num_wheels_N = counts_NW.sum(1)

    def mean(values_NW: np.ndarray) -> np.ndarray:
        total_N = (values_NW * counts_NW).sum(1)
        return np.divide(total_N, num_wheels_N, out=np.full_like(total_N, np.nan), where=num_wheels_N > 0)

    return SampleScores(precision_N=mean(precision_NW), recall_N=mean(recall_NW), f_N=mean(f_NW))


def hit_rate(wheel: EmotionWheel, predicted: Labels, reference: Sequence[str]) -> float:
    """HIT of data with one label each: whether the prediction names its node, mean of samples, then of level-1 wheels.

    That is the corpus recall against one-label sets: nothing counts labels that are wrong.
    """
    return corpus_score(wheel, predicted, [(label,) for label in reference]).recall


def _per_wheel(
    wheel: EmotionWheel, predicted: Labels, reference: Labels, level: Level
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and recall [N, W], and where they count."""
    if len(predicted) != len(reference):
        raise ValueError(
            f"need predicted and reference labels of the same samples, got {len(predicted)} and {len(reference)}"
        )
    predicted_NW = wheel.node_sets(predicted, level).masks_NW
    reference_NW = wheel.node_sets(reference, level).masks_NW
    common = np.bitwise_count(predicted_NW & reference_NW).astype(np.float64)
    num_predicted, num_reference = np.bitwise_count(predicted_NW), np.bitwise_count(reference_NW)
    precision_NW, recall_NW = common / np.maximum(num_predicted, 1), common / np.maximum(num_reference, 1)
    return precision_NW, recall_NW, num_reference > 0


def _wheel_score(name: str, precision_N: np.ndarray, recall_N: np.ndarray) -> WheelScore:
    precision, recall = (float(v.mean()) if len(v) else 0.0 for v in (precision_N, recall_N))
    both = precision + recall
    return WheelScore(
        wheel=name,
        precision=precision,
        recall=recall,
        f=2 * precision * recall / both if both else 0.0,
        num_samples=len(precision_N),
    )
