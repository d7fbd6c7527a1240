"""Sections about the evaluations: figures by stage, confusion matrices, recalls, pairs."""

import math
from collections.abc import Callable
from html import escape
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omnigrpo.evaluate.emotion_metrics import EmotionMetrics
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.report.charts import draw_confusion, draw_recalls
from omnigrpo.report.html import Cell, Markup, figure, missing, percent, section, table
from omnigrpo.report.inputs import AFTER_STAGE, BASE_STAGE, BEFORE_STAGE, RunData
from omnigrpo.report.theme import VARIABLES, chart_style, svg

_STAGES = {BASE_STAGE: "base", BEFORE_STAGE: "cold start", AFTER_STAGE: "GRPO"}
_SPLITS = {"heldout": "held-out", "held_out": "held-out", "ood": "out of distribution"}
_NO_EVALUATIONS = "evaluations/ holds no report: the run has not been evaluated (`omnigrpo eval` does it)."
_EARLIER_KEY = "border:2px solid var(--orange);border-radius:50%"
_LATER_KEY = "background:var(--blue);border-radius:50%"


def stage_name(stage: str) -> str:
    """A stage in words."""
    return _STAGES.get(stage, stage.replace("_", " "))


def split_name(split: str) -> str:
    """A split in words."""
    return _SPLITS.get(split, split.replace("_", " "))


def results_section(run: RunData) -> str:
    """WAR and UAR by split and stage."""
    if not run.evaluations:
        return section("results", "Results", missing(_NO_EVALUATIONS))
    rows: list[tuple[Cell, ...]] = []
    for split in run.splits:
        reports = [report for report in run.evaluations if report.split == split]
        rows += [_row(report) for report in reports]
        rows += [_gain(before, after) for before, after in pairwise(reports)]
    header = (
        "split", "stage", "WAR strict", "UAR strict", "WAR alias", "UAR alias",
        "format", "tokens", "clips", "dropped",
    )  # fmt: skip
    note = (
        "Percent, ± one standard error. WAR is the accuracy, UAR the mean recall over the classes present. "
        "Strict: the same string; alias: the same word after case, punctuation and word form."
    )
    return section("results", "Results", table(header, rows, numeric_from=2), note)


def confusion_section(run: RunData) -> str:
    """Confusion matrices of each split, of the two stages compared."""
    if not run.evaluations:
        return section("confusion", "Confusion matrices", missing(_NO_EVALUATIONS))
    body = "".join(
        f"<h3>{escape(split_name(split))}</h3>" + _side_by_side(run, split, confusion_figure)
        for split in run.splits
    )
    note = "Clips by gold label and answer; the shade is the share of the row. Alias matching."
    return section("confusion", "Confusion matrices", body, note)


def recalls_section(run: RunData) -> str:
    """Recall of each class at the two stages compared, and of the pairs that need one modality."""
    if not run.evaluations:
        return section("recalls", "Recall by class", missing(_NO_EVALUATIONS))
    figures = "".join(_recall_figure(run, split) for split in run.splits)
    return section("recalls", "Recall by class", f'<div class="pairs">{figures}</div>{_pairs(run)}')


def _row(report: EvaluationReport) -> tuple[Cell, ...]:
    return (
        split_name(report.split),
        stage_name(report.stage),
        _with_error(report.strict.war, report.strict.war_standard_error),
        _with_error(report.strict.uar, report.strict.uar_standard_error),
        _with_error(report.alias.war, report.alias.war_standard_error),
        _with_error(report.alias.uar, report.alias.uar_standard_error),
        percent(report.format_rate),
        f"{report.mean_completion_tokens:.1f}",
        str(report.alias.num_clips),
        str(report.num_dropped),
    )


def _gain(before: EvaluationReport, after: EvaluationReport) -> tuple[Cell, ...]:
    def change(read: Callable[[EmotionMetrics], tuple[float, float]], matching: str) -> Markup:
        (low, low_error), (high, high_error) = (read(getattr(report, matching)) for report in (before, after))
        error = math.hypot(low_error, high_error)
        return Markup(f"<b>{100 * (high - low):+.1f}</b> ± {100 * error:.1f}")

    def war(metrics: EmotionMetrics) -> tuple[float, float]:
        return metrics.war, metrics.war_standard_error

    def uar(metrics: EmotionMetrics) -> tuple[float, float]:
        return metrics.uar, metrics.uar_standard_error

    changes = (change(war, "strict"), change(uar, "strict"), change(war, "alias"), change(uar, "alias"))
    return ("", f"by {stage_name(after.stage)}", *changes, "", "", "", "")


def _with_error(value: float, error: float) -> Markup:
    return Markup(f"{percent(value)} ± {percent(error)}")


def _side_by_side(run: RunData, split: str, draw: Callable[[EvaluationReport], str]) -> str:
    reports = run.compared(split)
    parts = [draw(report) for report in reports]
    if len(reports) == 1:
        stage = stage_name(reports[0].stage)
        parts.append(missing(f"Only {stage} was evaluated on this split: there is nothing to compare with."))
    return f'<div class="pairs">{"".join(parts)}</div>'


def confusion_figure(report: EvaluationReport) -> str:
    """One report's confusion matrix."""
    title = f"{stage_name(report.stage)}, {split_name(report.split)}: {percent(report.alias.war)} % right"
    size = 0.42 * (len(report.alias.labels) + 1) + 1.2
    return figure(
        title,
        picture(
            (size, size - 0.3),
            f"confusion-{report.stage}-{report.split}",
            title,
            lambda axes: draw_confusion(axes, report.alias, VARIABLES),
        ),
    )


def _recall_figure(run: RunData, split: str) -> str:
    *before, after = run.compared(split)
    earlier = before[0].alias.recalls if before else {}
    title = f"Recall, {split_name(split)}"
    height = 0.3 * len({*earlier, *after.alias.recalls}) + 0.7
    drawn = picture(
        (4.3, height),
        f"recall-{split}",
        title,
        lambda axes: draw_recalls(axes, earlier, after.alias.recalls, VARIABLES),
    )
    return figure(
        title,
        drawn,
        [(stage_name(report.stage), _EARLIER_KEY) for report in before]
        + [(stage_name(after.stage), _LATER_KEY)],
    )


def _pairs(run: RunData) -> str:
    rows = [
        (
            " / ".join(pair.labels),
            split_name(report.split),
            stage_name(report.stage),
            *(
                f"{percent(recall)} ({clips})"
                for recall, clips in zip(pair.recalls, pair.num_clips, strict=True)
            ),
            percent(pair.mean_recall),
            f"{pair.swapped[0]} + {pair.swapped[1]}",
        )
        for report in run.evaluations
        for pair in report.pairs
    ]
    if not rows:
        return ""
    note = (
        "Both labels of a pair look alike in one modality and differ in the other, so only a model that uses "
        "the other one gets both right. Recall in percent (number of clips); swapped: clips taken for the "
        "partner."
    )
    header = ("pair", "split", "stage", "first", "second", "mean", "swapped")
    return f'<h3>Pairs that one modality alone separates</h3><p class="note">{note}</p>' + table(
        header, sorted(rows, key=lambda row: row[0]), numeric_from=3
    )


def picture(size: tuple[float, float], name: str, title: str, draw: Callable[[Axes], None]) -> str:
    """A chart of this size in inches as inline SVG; ``name`` is unique on the page."""
    with chart_style(VARIABLES):
        chart = Figure(figsize=size, layout="constrained")
        draw(chart.subplots())
        return svg(chart, name=name, title=title)
