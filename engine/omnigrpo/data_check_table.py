"""A check of datasets for people, and for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from omnigrpo.data_check import DataCheck, SplitCheck

_SHOWN = 5


def as_text(check: DataCheck) -> str:
    """JSON: the fields of ``DataCheck``, paths as text, and ``is_clean``."""
    return json.dumps(asdict(check) | {"is_clean": check.is_clean}, indent=2, default=str)


def show(check: DataCheck) -> None:
    """Print a table of the files, then a line for every fault."""
    console = Console(highlight=False)
    table = Table("file", "items", "labels", "missing", "repeated", "unusable", "median duration")
    for split in check.splits:
        median = split.median_seconds
        table.add_row(
            split.file.name,
            str(split.num_items),
            _balance(split),
            str(len(split.missing)),
            str(len(split.repeated)),
            str(len(split.unusable)) if split.seconds or split.unusable else "-",
            "-" if median is None else f"{median:.1f} s",
        )
    console.print(table)
    for split in check.splits:
        _list(console, f"{split.file.name}: missing", [str(path) for path in split.missing])
        _list(console, f"{split.file.name}: more than once", [str(path) for path in split.repeated])
        _list(console, f"{split.file.name}: unusable", split.unusable)
    for overlap in check.overlaps:
        title = f"in {overlap.first.name} and in {overlap.second.name}"
        _list(console, title, [str(path) for path in overlap.clips])
    _list(console, "label outside the set", check.unknown_labels)


def _balance(split: SplitCheck) -> str:
    shown = list(split.labels.items())[:12]
    more = f", and {len(split.labels) - len(shown)} more" if len(split.labels) > len(shown) else ""
    return ", ".join(f"{label} {count}" for label, count in shown) + more


def _list(console: Console, title: str, entries: Sequence[str]) -> None:
    for entry in entries[:_SHOWN]:
        console.print(f"{title}: {entry}", soft_wrap=True, markup=False)
    if len(entries) > _SHOWN:
        console.print(f"{title}: {len(entries) - _SHOWN} more", markup=False)
