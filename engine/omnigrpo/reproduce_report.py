"""A reproduction as Markdown: the table beside the published one, and the stages behind it."""

from pathlib import Path

from omnigrpo.evaluate.benchmarks import BENCHMARKS, Benchmark
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.recipe import PUBLISHED
from omnigrpo.reproduce import Reproduction, StageFigures

TABLE_FILE = "reproduction.md"
_NOTE = (
    "WAR/UAR in per cent: the same string; in brackets by alias (the same word after case, punctuation and word form). "
    "Published figures: arXiv 2503.05379, Table 1; its prompt is not in the published code, so compare with care."
)


def write_reproduction(result: Reproduction, output: Path) -> Path:
    """Write ``reproduction.md``; returns its path."""
    path = output / TABLE_FILE
    path.write_text(as_markdown(result), encoding="utf-8")
    return path


def as_markdown(result: Reproduction) -> str:
    """Both tables."""
    presets = "faithful" if result.faithful else "mended"
    parts = [f"# R1-Omni, {presets} presets", _evaluations(result), _NOTE, "## Stages", _stages(result)]
    return "\n\n".join(parts) + "\n"


def _evaluations(result: Reproduction) -> str:
    """A row per model, with the published one below it where a split is of a benchmark."""
    first = next(iter(result.rows.values()))
    benchmarks = {split: BENCHMARKS.get(report.benchmark or "") for split, report in first.items()}
    lines = [["model", *(_title(split, benchmarks[split]) for split in first), "format"]]
    for row, reports in result.rows.items():
        rate = sum(r.format_rate * len(r.clips) for r in reports.values()) / sum(
            len(r.clips) for r in reports.values()
        )
        lines.append([row.replace("_", " "), *map(_measured, reports.values()), f"{100 * rate:.1f}"])
        if any(benchmarks.values()):
            published = [_published(benchmarks[split], PUBLISHED[row]) for split in reports]
            lines.append([f"{PUBLISHED[row]}, published", *published, ""])
    return _table(lines)


def _title(split: str, benchmark: Benchmark | None) -> str:
    return split if benchmark is None else benchmark.title


def _measured(report: EvaluationReport) -> str:
    strict, alias = report.strict, report.alias
    return (
        f"{100 * strict.war:.2f}/{100 * strict.uar:.2f} ({100 * alias.war:.2f}/{100 * alias.uar:.2f}), "
        f"n={len(report.clips)}"
    )


def _published(benchmark: Benchmark | None, model: str) -> str:
    if benchmark is None:
        return ""
    (row,) = (p for p in benchmark.published if p.model == model)
    return f"{row.war:.2f}/{row.uar:.2f}"


def _stages(result: Reproduction) -> str:
    lines = [["stage", "steps", "hours", "samples/s", "loss", "reward"]]
    return _table([*lines, *([name.replace("_", " "), *_row(f)] for name, f in result.stages.items())])


def _row(figures: StageFigures) -> list[str]:
    reward = "" if figures.reward is None else f"{figures.reward:.3f}"
    return [
        str(figures.steps),
        f"{figures.hours:.3g}",
        f"{figures.samples_per_second:.3g}",
        f"{figures.loss:.4g}",
        reward,
    ]


def _table(lines: list[list[str]]) -> str:
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))
