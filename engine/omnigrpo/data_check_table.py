"""A check of datasets for people, and for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from omnigrpo.data_check import DataCheck, SplitCheck

_SHOWN = 5
_SHOWN_LABELS = 12


def as_text(check: DataCheck) -> str:
    """JSON: the fields of ``DataCheck``, paths as text, and ``is_clean``."""
    return json.dumps(asdict(check) | {"is_clean": check.is_clean}, indent=2, default=str)


def show_check(check: DataCheck) -> None:
    """Print a table of the files, then a line for every fault."""
    console = Console(highlight=False)
    table = Table("file", "items", "labels", "missing", "repeated", "unusable", "duration")
    for split in check.splits:
        table.add_row(
            split.file.name,
            str(split.num_items),
            _balance(split),
            str(len(split.missing)),
            str(len(split.repeated)),
            str(len(split.unusable)) if split.seconds or split.unusable else "-",
            _durations(split),
        )
    console.print(table)
    for split in check.splits:
        _list(console, f"{split.file.name}: missing", [str(path) for path in split.missing])
        _list(console, f"{split.file.name}: more than once", [str(path) for path in split.repeated])
        _list(console, f"{split.file.name}: unusable", split.unusable)
        if split.absent:
            console.print(f"{split.file.name}: no item of: {', '.join(split.absent)}", markup=False)
    for overlap in check.overlaps:
        title = f"in {overlap.first.name} and in {overlap.second.name}"
        _list(console, title, [str(path) for path in overlap.clips])
    _list(console, "label outside the set", check.unknown_labels)


def _balance(split: SplitCheck) -> str:
    """Labels with their items and, of so many, the share."""
    shown = list(split.labels.items())[:_SHOWN_LABELS]
    more = f", and {len(split.labels) - len(shown)} more" if len(split.labels) > len(shown) else ""
    return ", ".join(f"{label} {count} ({count / split.num_items:.0%})" for label, count in shown) + more


def _durations(split: SplitCheck) -> str:
    """Shortest, median and longest, and all together."""
    if split.median_seconds is None:
        return "-"
    least, most, total = min(split.seconds), max(split.seconds), sum(split.seconds)
    return f"{least:.1f} / {split.median_seconds:.1f} / {most:.1f} s, {total / 60:.1f} min"


def _list(console: Console, title: str, entries: Sequence[str]) -> None:
    for entry in entries[:_SHOWN]:
        console.print(f"{title}: {entry}", soft_wrap=True, markup=False)
    if len(entries) > _SHOWN:
        console.print(f"{title}: {len(entries) - _SHOWN} more", markup=False)
