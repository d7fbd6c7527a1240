"""WAR, UAR and the confusion matrix of predicted emotion labels.

Reference behaviour: WAR = sum_c (n_c / N) recall_c, the plain accuracy; UAR = mean recall over the classes
that are present in the gold labels. A prediction outside the label set is wrong, never mapped to the nearest
label. All figures are fractions of 1.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from omnigrpo.evaluate.bootstrap import Intervals, bootstrap_intervals
from omnigrpo.reward.aliases import canonical_label
from omnigrpo.reward.tagged_answer import first_answer

OTHER = "other"
"""Name of the confusion matrix's last column: answers that are no label of the set."""


AnswerRule = Literal["tags", "raw"]
"""Which part of a completion is its answer. tags: the first answer block, the whole text without one. raw: the whole
text without leading blanks, as the reference's evaluation scripts have it, which never look for tags."""


class Matching(StrEnum):
    """When an answer counts as a label."""

    STRICT = "strict"
    """The same string."""
    ALIAS = "alias"
    """The same label after case, punctuation and word form are taken away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantAnswer:
    """The best answer that does not look at the clip."""

    label: str
    war: float
    uar: float


@dataclass(frozen=True, kw_only=True, slots=True)
class EmotionMetrics:
    """How well predicted labels match the gold ones."""

    labels: tuple[str, ...]
    """Rows of the confusion matrix, and its columns but the last."""
    confusion: tuple[tuple[int, ...], ...]
    """Clips by gold label (row) and prediction (column); the last column is every other answer."""
    war: float
    war_standard_error: float
    """Binomial: sqrt(WAR (1 - WAR) / N)."""
    uar: float
    uar_standard_error: float
    """Of a mean of independent binomial recalls."""
    recalls: dict[str, float]
    """Recall of every class that is present in the gold labels."""
    intervals: Intervals
    """95 % bootstrap intervals of WAR and UAR."""
    constant: ConstantAnswer
    """What always giving the most frequent gold label would reach."""

    def class_size(self, label: str) -> int:
        """Clips whose gold label this is."""
        return sum(self.confusion[self.labels.index(label)])

    def recall_standard_error(self, label: str) -> float:
        """Binomial: sqrt(recall (1 - recall) / clips); the label has clips."""
        recall = self.recalls[label]
        return math.sqrt(recall * (1 - recall) / self.class_size(label))

    @property
    def num_clips(self) -> int:
        """N."""
        return sum(sum(row) for row in self.confusion)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRecall:
    """Two labels among the clips whose gold label is one of them."""

    labels: tuple[str, str]
    recalls: tuple[float | None, float | None]
    """Recall of each; None for a label without clips."""
    num_clips: tuple[int, int]
    swapped: tuple[int, int]
    """Clips of each label that were taken for the other one."""

    @property
    def mean_recall(self) -> float | None:
        """Mean of both recalls; None unless both labels have clips."""
        first, second = self.recalls
        return None if first is None or second is None else (first + second) / 2


def predicted_label(text: str, matching: Matching, answer: AnswerRule = "tags") -> str:
    """The label that a completion answers with: by ``answer``, in the form of ``matching``."""
    return label_form(text.lstrip() if answer == "raw" else first_answer(text), matching)


def label_form(label: str, matching: Matching) -> str:
    """The form of a label in which two are compared."""
    return canonical_label(label) if matching is Matching.ALIAS else label


def emotion_metrics(
    golds: Sequence[str],
    predictions: Sequence[str],
    *,
    matching: Matching,
    labels: Sequence[str] | None = None,
) -> EmotionMetrics:
    """Compare labels with labels, in the order of ``labels`` (default: the gold labels, sorted).

    Raises ValueError when there are no clips, lengths differ, or a gold label is not among ``labels``.
    """
    if not golds or len(golds) != len(predictions):
        raise ValueError(
            f"need one prediction per gold label and at least one, got {len(golds)} and {len(predictions)}"
        )
    gold_forms = [label_form(gold, matching) for gold in golds]
    rows = _rows(gold_forms, labels, matching)
    index = {label: position for position, label in enumerate(rows)}
    confusion = [[0] * (len(rows) + 1) for _ in rows]
    for gold, prediction in zip(gold_forms, predictions, strict=True):
        confusion[index[gold]][index.get(label_form(prediction, matching), len(rows))] += 1
    return _summary(rows, confusion)


def pair_recalls(
    golds: Sequence[str],
    predictions: Sequence[str],
    pairs: Sequence[tuple[str, str]],
    *,
    matching: Matching,
) -> tuple[PairRecall, ...]:
    """Recall of both labels of each pair, e.g. two emotions that differ only in the voice."""
    counts = Counter(
        (label_form(gold, matching), label_form(prediction, matching))
        for gold, prediction in zip(golds, predictions, strict=True)
    )
    return tuple(_pair(counts, pair, matching) for pair in pairs)


def _pair(counts: Counter[tuple[str, str]], pair: tuple[str, str], matching: Matching) -> PairRecall:
    first, second = (label_form(label, matching) for label in pair)
    totals = {label: sum(n for (gold, _), n in counts.items() if gold == label) for label in (first, second)}

    def recall(label: str) -> float | None:
        return counts[label, label] / totals[label] if totals[label] else None

    return PairRecall(
        labels=pair,
        recalls=(recall(first), recall(second)),
        num_clips=(totals[first], totals[second]),
        swapped=(counts[first, second], counts[second, first]),
    )


def _rows(gold_forms: Sequence[str], labels: Sequence[str] | None, matching: Matching) -> tuple[str, ...]:
    present = set(gold_forms)
    if labels is None:
        return tuple(sorted(present))
    rows = tuple(dict.fromkeys(label_form(label, matching) for label in labels))
    unknown = sorted(present - set(rows))
    if unknown:
        raise ValueError(
            f"gold labels {', '.join(map(repr, unknown))} are not among {', '.join(map(repr, rows))}; "
            "add them to the labels, or leave the labels out to take all that occur"
        )
    return rows


def _summary(rows: tuple[str, ...], confusion: list[list[int]]) -> EmotionMetrics:
    sizes = {label: sum(row) for label, row in zip(rows, confusion, strict=True)}
    recalls = {label: confusion[i][i] / sizes[label] for i, label in enumerate(rows) if sizes[label]}
    total = sum(sizes.values())
    war = sum(confusion[i][i] for i in range(len(rows))) / total
    most = max(sizes, key=lambda label: sizes[label])
    uar_variance = sum(recall * (1 - recall) / sizes[label] for label, recall in recalls.items())
    return EmotionMetrics(
        labels=rows,
        confusion=tuple(tuple(row) for row in confusion),
        war=war,
        war_standard_error=math.sqrt(war * (1 - war) / total),
        uar=sum(recalls.values()) / len(recalls),
        uar_standard_error=math.sqrt(uar_variance) / len(recalls),
        recalls=recalls,
        intervals=bootstrap_intervals({label: confusion[i][i] for i, label in enumerate(rows)}, sizes),
        constant=ConstantAnswer(label=most, war=sizes[most] / total, uar=1 / len(recalls)),
    )
