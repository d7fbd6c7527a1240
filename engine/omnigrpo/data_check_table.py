"""A check of datasets for people, and for programs."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from omnigrpo.data_check import DataCheck, SplitCheck

_SHOWN = 5
_SHOWN_LABELS = 20


def as_text(check: DataCheck) -> str:
    """JSON: the fields of ``DataCheck``, paths as text, and ``is_clean``."""
    return json.dumps(asdict(check) | {"is_clean": check.is_clean}, indent=2, default=str)


def show_check(check: DataCheck) -> None:
    """Print a table of the files and one of their labels, then a line for every fault."""
    console = Console(highlight=False)
    console.print(_files_table(check))
    console.print(_labels_table(check))
    for split in check.splits:
        _list(console, f"{split.file.name}: missing", [str(path) for path in split.missing])
        _list(console, f"{split.file.name}: more than once", [str(path) for path in split.repeated])
        _list(console, f"{split.file.name}: unusable", split.unusable)
    for overlap in check.overlaps:
        title = f"in {overlap.first.name} and in {overlap.second.name}"
        _list(console, title, [str(path) for path in overlap.clips])
    _list(console, "label outside the set", check.unknown_labels)


def _files_table(check: DataCheck) -> Table:
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    table.add_column("file", overflow="fold")
    for column in ("items", "missing", "repeated", "unusable", "min / median / max, s", "hours"):
        table.add_column(column, justify="right")
    for split in check.splits:
        is_probed = bool(split.seconds or split.unusable)
        table.add_row(
            Text(split.file.name),
            str(split.num_items),
            str(len(split.missing)),
            str(len(split.repeated)),
            str(len(split.unusable)) if is_probed else "-",
            _durations(split),
            f"{sum(split.seconds) / 3600:.2f}" if is_probed else "-",
        )
    return table


def _labels_table(check: DataCheck) -> Table:
    """Items and share of every label, the most frequent one of all files first."""
    total: Counter[str] = Counter()
    for split in check.splits:
        total.update(split.labels)
        total.update(dict.fromkeys(split.absent, 0))
    shown = [label for label, _ in total.most_common()]
    table = Table(box=box.HORIZONTALS, pad_edge=False)
    table.add_column("label", overflow="fold")
    for split in check.splits:
        table.add_column(Text(split.file.name), justify="right")
    for label in shown[:_SHOWN_LABELS]:
        counts = [split.labels.get(label, 0) for split in check.splits]
        cells = (f"{n} ({n / s.num_items:5.1%})" for n, s in zip(counts, check.splits, strict=True))
        table.add_row(Text(label), *cells)
    if len(shown) > _SHOWN_LABELS:
        table.caption = f"{len(shown) - _SHOWN_LABELS} more labels: --json has them all"
    return table


def _durations(split: SplitCheck) -> str:
    if split.median_seconds is None:
        return "-"
    return f"{min(split.seconds):.1f} / {split.median_seconds:.1f} / {max(split.seconds):.1f}"


def _list(console: Console, title: str, entries: Sequence[str]) -> None:
    for entry in entries[:_SHOWN]:
        console.print(f"{title}: {entry}", soft_wrap=True, markup=False)
    if len(entries) > _SHOWN:
        console.print(f"{title}: {len(entries) - _SHOWN} more", markup=False)
