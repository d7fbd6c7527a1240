"""The figures of a data set as tables, for a terminal and in Markdown."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from omnigrpo.attribution.attention_mass import ROW_KINDS
from omnigrpo.attribution.clip_attribution import Value
from omnigrpo.attribution.shapley import Coalition
from omnigrpo.attribution.summary import DatasetAttribution, Mean, ValueSummary

UNITS = {
    Value.ACCURACY: "accuracy",
    Value.GOLD: "gold answer",
    Value.GOLD_FIXED: "gold answer, reasoning held",
    Value.OWN_FIXED: "own answer, reasoning held",
    Value.REASONING: "reasoning, per token",
}
"""Value functions in words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """One table; every cell is text, and the first column names the row."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, box=box.HORIZONTALS, title_justify="left", pad_edge=False)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """With the title as a heading."""
        lines = [
            self.header,
            tuple("---:" if index else "---" for index in range(len(self.header))),
            *self.rows,
        ]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def all_figures(summary: DatasetAttribution) -> list[Figures]:
    """The tables of a data set; those without rows are left out."""
    tables = [
        Figures(
            title="Value by the clip's own modalities: share or nats, mean +- standard error",
            header=("value", *Coalition),
            rows=tuple(
                (UNITS[value], *(str(each.coalitions[coalition]) for coalition in Coalition))
                for value, each in summary.values.items()
            ),
        ),
        Figures(
            title="Shapley values, in the same units",
            header=("value", "video", "audio", "both - neither"),
            rows=tuple(_shapley_row(UNITS[value], each) for value, each in summary.values.items()),
        ),
        Figures(
            title="Shapley values of the gold answer by label, nats",
            header=("label", "video", "audio", "both - neither"),
            rows=tuple(_shapley_row(label, each) for label, each in summary.by_label.items()),
        ),
        Figures(
            title="Claims of the reasoning: log-prob lost when the cited modality is swapped",
            header=("claims about", "count", "unfounded", "nats per token", "other swapped"),
            rows=tuple(
                (modality, str(each.drop.count), str(each.unfounded), str(each.drop), str(each.drop_other))
                for modality, each in summary.claims.items()
            ),
        ),
        Figures(
            title="Attention mass, mean over layers (share of the visible rows)",
            header=("from", *ROW_KINDS),
            rows=tuple(
                (
                    f"{name} tokens",
                    *(_mass(each.mass[kind], each.rows[kind]) for kind in ROW_KINDS),
                )
                for name, each in summary.attention.items()
            ),
        ),
    ]
    return [table for table in tables if table.rows]


def _shapley_row(name: str, each: ValueSummary) -> tuple[str, ...]:
    total = each.coalitions[Coalition.BOTH].mean - each.coalitions[Coalition.NEITHER].mean
    return name, str(each.video), str(each.audio), f"{total:.2f}"


def _mass(layers: Sequence[Mean], rows: float) -> str:
    return f"{statistics.fmean(layer.mean for layer in layers):.3f} ({rows:.3f})"
