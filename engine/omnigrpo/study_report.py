"""A study as a Markdown table and a picture."""

from pathlib import Path

from matplotlib import rc_context
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
    """The table: mean and standard deviation over the seeds, per cent."""
    header = [
        "model",
        *(f"{measure}, {name}" for name in SPLITS.values() for measure in ("WAR", "UAR")),
        "format",
    ]
    lines = [header, ["---"] * len(header)]
    for row in ROWS:
        cells = [result.cells[row][split] for split in SPLITS]
        figures = [text for cell in cells for text in (_spread(cell.war), _spread(cell.uar))]
        lines.append([row, *figures, _spread(cells[0].format_rate)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    seeds = ", ".join(map(str, result.seeds))
    return f"{table}\n\nPer cent, mean ± standard deviation over the seeds {seeds}. {result.verdict()}\n"


def draw_study(result: StudyResult, path: Path) -> None:
    """Bars of WAR with a dot for every seed."""
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.5, 3.6), layout="constrained", dpi=150)
        axes = figure.subplots()
        width = 0.38
        for offset, (split, name) in zip((-0.5, 0.5), SPLITS.items(), strict=True):
            for place, row in enumerate(ROWS):
                cell: Cell = result.cells[row][split]
                x = place + offset * width
                axes.bar(
                    x,
                    100 * cell.mean_war,
                    width * 0.94,
                    color=_COLOURS[split],
                    label=name if place == 0 else None,
                )
                axes.plot(
                    [x] * len(cell.war), [100 * war for war in cell.war], "o", color="#222222", markersize=3
                )
                axes.text(x, 100 * cell.mean_war + 3.5, f"{100 * cell.mean_war:.0f}", ha="center", fontsize=9)
        axes.set_xticks(range(len(ROWS)), ROWS)
        axes.set_ylim(0, 112)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("WAR, per cent")
        axes.set_title("Same labelled clips: imitation of labels against rewards", loc="left", fontsize=11)
        axes.legend(frameon=False, loc="upper left")
        figure.savefig(path)


def _spread(values: tuple[float, ...]) -> str:
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5
    return f"{100 * mean:.1f} ± {100 * deviation:.1f}"
