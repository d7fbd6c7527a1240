"""A study as a Markdown table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from omnigrpo.study import ROWS, SPLITS, Cell, StudyResult

_COLOURS = {"heldout": "#3b6fb6", "ood": "#d9822b"}


def write_study(result: StudyResult, output: Path) -> tuple[Path, Path]:
    """Write ``study.md`` and ``study.png``; returns both paths."""
    table, picture = output / "study.md", output / "study.png"
    table.write_text(as_markdown(result), encoding="utf-8")
    draw_study(result, picture)
    return table, picture


def as_markdown(result: StudyResult) -> str:
    """Mean and standard deviation over the seeds, per cent, and what each row's training was given."""
    header = [
        "model",
        *(f"{measure}, {name}" for name in SPLITS.values() for measure in ("WAR", "UAR")),
        "format",
    ]
    lines = [header]
    for row in ROWS:
        cells = [result.cells[row][split] for split in SPLITS]
        figures = [text for cell in cells for text in (_spread(cell.war), _spread(cell.uar))]
        lines.append([row, *figures, _spread(cells[0].format_rate)])
    seeds = ", ".join(map(str, result.seeds))
    note = f"Per cent, mean ± standard deviation over the seeds {seeds}. {result.verdict()}"
    return "\n\n".join([_table(lines), note, _budgets(result)]) + "\n"


def _budgets(result: StudyResult) -> str:
    header = ["training", "clips", "steps x clips", "passes", "completions learnt from", "seconds"]
    lines = [header]
    for row, budget in result.budgets.items():
        answers = budget.steps * budget.clips_per_step * budget.completions_per_clip
        lines.append(
            [
                row,
                str(budget.clips),
                f"{budget.steps} x {budget.clips_per_step}",
                f"{budget.epochs:.1f}",
                str(answers),
                f"{sum(budget.seconds) / len(budget.seconds):.0f}",
            ]
        )
    return _table(lines)


def _table(lines: Sequence[Sequence[str]]) -> str:
    header, *rows = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows))


def draw_study(result: StudyResult, path: Path) -> None:
    """Bars of mean WAR and UAR with their standard deviation, and a dot for every seed."""
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10.5, 3.6), layout="constrained", dpi=150)
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, measure in ((left, "WAR"), (right, "UAR")):
            _draw_bars(axes, result, measure)
        left.set_ylim(0, 119)
        left.set_yticks(range(0, 101, 20))
        left.set_ylabel("per cent")
        left.legend(frameon=False, loc="upper left")
        figure.suptitle("Same labelled clips: imitation of labels against rewards", x=0.01, ha="left")
        figure.savefig(path)


def _draw_bars(axes: Axes, result: StudyResult, measure: str) -> None:
    width = 0.38
    for offset, (split, name) in zip((-0.5, 0.5), SPLITS.items(), strict=True):
        for place, row in enumerate(ROWS):
            values = [100 * value for value in _values(result.cells[row][split], measure)]
            x, mean = place + offset * width, fmean(values)
            spread = stdev(values) if len(values) > 1 else 0.0
            label = name if place == 0 else None
            axes.bar(x, mean, width * 0.94, yerr=spread, color=_COLOURS[split], ecolor="#222222", label=label)
            axes.plot([x] * len(values), values, "o", color="#222222", markersize=3)
            axes.text(x, max(*values, mean + spread) + 3, f"{mean:.0f}", ha="center", fontsize=9)
    axes.set_xticks(range(len(ROWS)), ROWS)
    axes.set_title(measure, loc="left", fontsize=11)


def _values(cell: Cell, measure: str) -> tuple[float, ...]:
    return cell.war if measure == "WAR" else cell.uar


def _spread(values: tuple[float, ...]) -> str:
    deviation = stdev(values) if len(values) > 1 else 0.0
    return f"{100 * fmean(values):.1f} ± {100 * deviation:.1f}"
