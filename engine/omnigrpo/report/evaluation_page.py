"""Evaluations as one page: Markdown, and HTML that loads nothing."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from omnigrpo.evaluate.benchmarks import BENCHMARKS, Benchmark
from omnigrpo.evaluate.bootstrap import Interval
from omnigrpo.evaluate.emotion_metrics import EmotionMetrics, Matching, label_form
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.report.charts import draw_lengths
from omnigrpo.report.html import NOTHING, figure, section, table
from omnigrpo.report.page import document
from omnigrpo.report.results import confusion_figure, picture, split_name, stage_name
from omnigrpo.report.theme import VARIABLES

Table = tuple[str, Sequence[str], list[Sequence[str]]]
"""Title, header, rows."""

NOTE = (
    "Per cent. WAR is the accuracy, UAR the mean recall over the classes present; brackets: 95 % bootstrap intervals, "
    "clips resampled within each class. Strict: the same string; alias: the same word after case, punctuation and word "
    "form. Constant: always the most frequent label. ±: one standard error."
)
PUBLISHED_NOTE = (
    "Published figures: arXiv 2503.05379, Table 1. Its prompt and answer extraction are not in the published code, so "
    "compare with care. Standard errors of published WARs are binomial, for test sets of the size that the "
    "published figures imply."
)


def write_evaluation(reports: Sequence[EvaluationReport], output: Path, stage: str) -> tuple[Path, Path]:
    """Write ``<stage>.md`` and ``<stage>.html``; returns both paths."""
    markdown, html = output / f"{stage}.md", output / f"{stage}.html"
    markdown.write_text(as_markdown(reports, stage), encoding="utf-8")
    html.write_text(as_html(reports, stage), encoding="utf-8")
    return markdown, html


def as_markdown(reports: Sequence[EvaluationReport], stage: str) -> str:
    """The tables, and the confusion matrices as tables."""
    parts = [f"# Evaluation: {stage_name(stage)}", NOTE]
    for title, header, rows in (*_tables(reports), *map(_confusion_table, reports)):
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join([*parts, PUBLISHED_NOTE]) + "\n"


def as_html(reports: Sequence[EvaluationReport], stage: str) -> str:
    """The same with the matrices as pictures."""
    sections = [
        section(f"table-{number}", title, table(header, rows), NOTE if number == 0 else "")
        for number, (title, header, rows) in enumerate(_tables(reports))
    ]
    figures = "".join(confusion_figure(report) for report in reports)
    sections.append(
        section("confusion", "Confusion matrices", f'<div class="pairs">{figures}</div>', PUBLISHED_NOTE)
    )
    lengths = "".join(map(_lengths_figure, reports))
    sections.append(section("lengths", "Completion lengths", f'<div class="pairs">{lengths}</div>'))
    title = f"Evaluation: {stage_name(stage)}"
    return document(title, f"<h1>{escape(title)}</h1>{''.join(sections)}")


def _tables(reports: Sequence[EvaluationReport]) -> list[Table]:
    return [
        _results(reports),
        *(t for report in reports if (t := _beside_published(report)) is not None),
        *map(_recalls, reports),
    ]


def _results(reports: Sequence[EvaluationReport]) -> Table:
    header = (
        *("split", "clips", "dropped", "WAR strict", "UAR strict", "WAR alias", "UAR alias", "WAR constant"),
        *("format", "cut off", "tokens (min / median / max)"),
    )
    rows: list[Sequence[str]] = []
    for report in reports:
        tokens = report.completion_tokens
        rows.append(
            (
                split_name(report.split),
                str(len(report.clips)),
                str(report.num_dropped),
                _with_interval(report.strict.war, report.strict.intervals.war),
                _with_interval(report.strict.uar, report.strict.intervals.uar),
                _with_interval(report.alias.war, report.alias.intervals.war),
                _with_interval(report.alias.uar, report.alias.intervals.uar),
                f"{_percent(report.strict.constant.war)} ({report.strict.constant.label})",
                _percent(report.format_rate),
                _percent(report.truncated_rate),
                f"{tokens.least} / {tokens.median:g} / {tokens.most}",
            )
        )
    return "Results", header, rows


def _beside_published(report: EvaluationReport) -> Table | None:
    benchmark = BENCHMARKS.get(report.benchmark or "")
    if benchmark is None:
        return None
    rows: list[Sequence[str]] = [
        (p.model, f"{p.war:.2f}", f"{p.uar:.2f}", _error(benchmark.war_standard_error(p)), NOTHING)
        for p in benchmark.published
    ]
    for name, metrics in (("measured, strict", report.strict), ("measured, alias", report.alias)):
        errors = (_error(100 * metrics.war_standard_error), _error(100 * metrics.uar_standard_error))
        rows.append((name, f"{100 * metrics.war:.2f}", f"{100 * metrics.uar:.2f}", *errors))
    constant = report.strict.constant
    rows.append(
        (
            f"always {constant.label}",
            f"{100 * constant.war:.2f}",
            f"{100 * constant.uar:.2f}",
            NOTHING,
            NOTHING,
        )
    )
    return (
        f"{benchmark.title}: published and measured{_size(benchmark, report)}",
        ("model", "WAR", "UAR", "s.e. of WAR", "s.e. of UAR"),
        rows,
    )


def _size(benchmark: Benchmark, report: EvaluationReport) -> str:
    if benchmark.num_clips in (None, len(report.clips)):
        return ""
    return f" ({len(report.clips)} clips here, {benchmark.num_clips} there)"


def _recalls(report: EvaluationReport) -> Table:
    strict, alias = report.strict, report.alias
    rows: list[Sequence[str]] = [
        (
            label,
            str(strict.class_size(label)),
            _recall(strict, label),
            _recall(alias, label_form(label, Matching.ALIAS)),
        )
        for label in strict.recalls
    ]
    return f"Recall by class, {split_name(report.split)}", ("class", "clips", "strict", "alias"), rows


def _recall(metrics: EmotionMetrics, label: str) -> str:
    return f"{_percent(metrics.recalls[label])} ± {_percent(metrics.recall_standard_error(label))}"


def _confusion_table(report: EvaluationReport) -> Table:
    metrics = report.alias
    header = ("gold \\ answer", *metrics.labels, "other")
    rows: list[Sequence[str]] = [
        (label, *map(str, counts)) for label, counts in zip(metrics.labels, metrics.confusion, strict=True)
    ]
    return f"Confusion, {split_name(report.split)} (alias)", header, rows


def _lengths_figure(report: EvaluationReport) -> str:
    title = f"Completion length, {split_name(report.split)}: {_percent(report.truncated_rate)} % cut off"
    lengths = [clip.num_tokens for clip in report.clips]
    name = f"lengths-{report.stage}-{report.split}"
    return figure(
        title, picture((4.3, 2.5), name, title, lambda axes: draw_lengths(axes, lengths, VARIABLES))
    )


def _error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def _with_interval(value: float, interval: Interval) -> str:
    return f"{_percent(value)} [{_percent(interval.low)}, {_percent(interval.high)}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
