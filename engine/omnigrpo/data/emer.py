"""EMER (Lian et al., 2023): clips of MER2023/24 with descriptions of their emotional clues, for the cold start.

Descriptions are read from ``final-EMER-reason.csv`` (columns ``name``, ``chinese``, ``english``; 332 clips) and labels
from a CSV of the user's own with the columns ``name`` and ``label``, as the published file has no discrete label; or
both from ``gt-eng.csv`` (100 clips: ``name``, ``emotions``, ``reasons``), whose first emotion is the label.
"""

from pathlib import Path

from omnigrpo.data.dataset_files import DatasetError
from omnigrpo.data.labelled import ClipIndex, LabelledSplits, found_clips, read_table

REASONS_FILE = "final-EMER-reason.csv"
FIRST_FILE = "gt-eng.csv"


def read_emer(root: Path, *, labels: Path | None = None, clips: Path | None = None) -> LabelledSplits:
    """Read all clips as the split ``train``; ``clips`` is their directory where it is not below ``root``.

    Raises:
        DatasetError: no description file, none of labels beside ``final-EMER-reason.csv``, a clip without label, or an
            empty cell (named with file and line).
    """
    index = ClipIndex(clips or root)
    if (root / REASONS_FILE).is_file():
        annotated = _with_labels(root / REASONS_FILE, labels)
    elif (root / FIRST_FILE).is_file():
        annotated = _first_release(root / FIRST_FILE)
    else:
        raise DatasetError(f"{root} holds neither {REASONS_FILE} nor {FIRST_FILE}: give EMER's directory")
    found, skipped = found_clips(index, annotated)
    present = tuple(sorted({label for _, label, _ in annotated}))
    return LabelledSplits(splits={"train": found}, labels=present, skipped=skipped)


def _with_labels(path: Path, labels: Path | None) -> list[tuple[str, str, str | None]]:
    if labels is None:
        raise DatasetError(
            f"{path} has descriptions but no labels: give a CSV with the columns name and label (--labels)"
        )
    label_of = {row["name"]: row["label"].lower() for _, row in read_table(labels, ("name", "label"))}
    annotated: list[tuple[str, str, str | None]] = []
    for line, row in read_table(path, ("name", "english")):
        _check_filled(row, path, line)
        if not label_of.get(row["name"]):
            raise DatasetError(f"{path}, line {line}: {labels} has no label for {row['name']!r}")
        annotated.append((row["name"], label_of[row["name"]], row["english"]))
    return annotated


def _first_release(path: Path) -> list[tuple[str, str, str | None]]:
    annotated: list[tuple[str, str, str | None]] = []
    for line, row in read_table(path, ("name", "emotions", "reasons")):
        _check_filled(row, path, line)
        label = row["emotions"].strip("[] ").split(",")[0].strip(" '\"").lower()
        if not label:
            raise DatasetError(f"{path}, line {line}: emotions names none, got {row['emotions']!r}")
        annotated.append((row["name"], label, row["reasons"]))
    return annotated


def _check_filled(row: dict[str, str], path: Path, line: int) -> None:
    empty = [column for column, text in row.items() if not text]
    if empty:
        raise DatasetError(f"{path}, line {line}: {', '.join(empty)} is empty")
