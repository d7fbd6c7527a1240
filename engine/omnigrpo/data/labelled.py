"""Clips with labels, as the published emotion datasets annotate them, and R1-Omni's JSON of them."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omnigrpo.data.dataset_files import DatasetError

QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is the most "
    "obvious to you?"
)
"""R1-Omni's question for every clip."""
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledClip:
    """One annotated clip."""

    path: Path
    label: str
    """In R1-Omni's spelling."""
    reasoning: str | None = None
    """A description of the emotional clues, where the dataset has one."""

    @property
    def answer(self) -> str:
        """What the model should say: the bare label, or reasoning and label in tags."""
        if self.reasoning is None:
            return self.label
        return f"<think>{self.reasoning}</think>\n<answer>{self.label}</answer>"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSplits:
    """A published dataset: its splits, and what was left out."""

    splits: Mapping[str, tuple[LabelledClip, ...]]
    labels: tuple[str, ...]
    """The label set, in the order of the dataset."""
    skipped: tuple[str, ...] = ()
    """A sentence for each annotated clip that is not on disk."""


class ClipIndex:
    """Video files below a directory by their stem; numbers are the same with and without leading zeros."""

    def __init__(self, directory: Path) -> None:
        """Raises DatasetError when there is no directory, no clip in it, or two clips of one name."""
        if not directory.is_dir():
            raise DatasetError(f"{directory} is no directory: name the one with the clips")
        self._directory = directory
        self._paths: dict[str, Path] = {}
        for path in sorted(directory.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                other = self._paths.setdefault(_key(path.stem), path)
                if other != path:
                    raise DatasetError(
                        f"{other} and {path} have the same name: name the directory of one of them"
                    )
        if not self._paths:
            raise DatasetError(f"{directory} holds no video files ({', '.join(VIDEO_SUFFIXES)})")

    def find(self, name: str) -> Path | None:
        """The clip of this name, given with or without suffix."""
        path = Path(name)
        return self._paths.get(_key(path.stem if path.suffix.lower() in VIDEO_SUFFIXES else name))

    def __len__(self) -> int:
        return len(self._paths)


def found_clips(
    index: ClipIndex, annotated: Iterable[tuple[str, str, str | None]]
) -> tuple[tuple[LabelledClip, ...], tuple[str, ...]]:
    """Clips of (name, label, reasoning) that are on disk, and a sentence about each that is not."""
    clips: list[LabelledClip] = []
    skipped: list[str] = []
    for name, label, reasoning in annotated:
        path = index.find(name)
        if path is None:
            skipped.append(f"{name} ({label}) is annotated, but not on disk")
        else:
            clips.append(LabelledClip(path=path, label=label, reasoning=reasoning))
    return tuple(clips), tuple(skipped)


def read_table(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and cells by column of a CSV file in UTF-8.

    Raises DatasetError for a column that is missing, and for an empty cell in the first of ``columns``, the name.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise DatasetError(
                    f"{path} has no column {', '.join(missing)}; its header is {', '.join(reader.fieldnames or ())}"
                )
            for row in reader:
                cells = {column: (row[column] or "").strip() for column in columns}
                if not cells[columns[0]]:
                    raise DatasetError(f"{path}, line {reader.line_num}: {columns[0]} is empty")
                yield reader.line_num, cells
    except FileNotFoundError:
        raise DatasetError(f"{path} does not exist: check the dataset's directory and the fold") from None
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is no text in UTF-8: {error}") from error


def write_r1_omni(
    clips: Sequence[LabelledClip], path: Path, *, modalities: str = "<video>\n<audio>\n"
) -> None:
    """Write a split in R1-Omni's format; clip paths are absolute."""
    items = [
        {
            "video": str(clip.path.resolve()),
            "conversations": [
                {"from": "human", "value": f"{modalities}{QUESTION}"},
                {"from": "gpt", "value": clip.answer},
            ],
        }
        for clip in clips
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _key(stem: str) -> str:
    return stem.lstrip("0") or "0" if stem.isdecimal() else stem
