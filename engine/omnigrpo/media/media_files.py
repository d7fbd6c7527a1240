"""Media files that paths stand for."""

import os
from collections.abc import Sequence
from pathlib import Path

MEDIA_SUFFIXES = frozenset(
    (
        *(
            ".3gp",
            ".avi",
            ".flv",
            ".m2ts",
            ".m4v",
            ".mkv",
            ".mov",
            ".mp4",
            ".mpeg",
            ".mpg",
            ".mts",
            ".ogv",
            ".ts",
        ),
        *(".webm", ".wmv", ".aac", ".flac", ".m4a", ".mp3", ".oga", ".ogg", ".opus", ".wav", ".wma"),
    )
)
"""Extensions of the files that a directory stands for."""


def media_files(paths: Sequence[Path]) -> list[Path]:
    """The paths, each directory replaced by the media files below it; one without any stays, to be told as such."""
    files: list[Path] = []
    for path in paths:
        is_directory = os.path.isdir(path)  # noqa: PTH112 (Path.is_dir raises where it may not look)
        inside = _inside(path) if is_directory else []
        files.extend(inside or [path])
    return files


def _inside(directory: Path) -> list[Path]:
    found = (path for path in directory.rglob("*") if path.suffix.lower() in MEDIA_SUFFIXES)
    return sorted(path for path in found if not os.path.isdir(path))  # noqa: PTH112 (does not raise)
