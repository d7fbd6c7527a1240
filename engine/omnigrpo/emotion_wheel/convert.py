"""From the published layouts of the emotion-wheel tables to one compact file."""

import csv
from collections.abc import Iterable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from omnigrpo.emotion_wheel.labels import split_labels
from omnigrpo.emotion_wheel.plain_pickle import read_object_arrays
from omnigrpo.emotion_wheel.sectors import Row, wheel_from_rows
from omnigrpo.emotion_wheel.tables import LEVELS, Wheel, WheelError, WheelTables

MAPPING_FILE = "wheel_mapping.npz"
_COLUMNS = ("level1", "level2", "level3")
_LAYOUT = (
    f"give a directory with {MAPPING_FILE}, or with wheel1.xlsx, wheel2.xlsx, ..., synonym.xlsx and format.csv "
    "(each as .xlsx or .csv)"
)


def convert(directory: Path) -> WheelTables:
    """Read what a directory of published tables holds.

    With ``wheel_mapping.npz`` (2026) that is all; else wheels with the columns level1, level2, level3, where an empty
    cell repeats the one above, ``synonym`` with word_run1, synonym_run1, word_run2, ... and ``format`` with name and
    format, lists of words separated by commas. Everything is made lower case.

    Raises:
        WheelError: a file or column that is missing, a wheel with an empty sector or a cycle, a word of ``synonym``
            that is on no wheel.
    """
    if not directory.is_dir():
        raise WheelError(f"{directory} is no directory: {_LAYOUT}")
    mapping = directory / MAPPING_FILE
    return _from_mapping(mapping) if mapping.is_file() else _from_sheets(directory)


def _from_sheets(directory: Path) -> WheelTables:
    paths = [path for number in range(1, 100) if (path := _sheet(directory, f"wheel{number}")) is not None]
    if not paths:
        raise WheelError(f"{directory} holds no wheel1.xlsx: {_LAYOUT}")
    wheels = tuple(wheel_from_rows(path.stem, _wheel_rows(path)) for path in paths)
    on_wheels = {word for wheel in wheels for word in wheel.level1}
    return WheelTables(
        forms=_read_forms(_needed(directory, "format")),
        synonyms=_read_synonyms(_needed(directory, "synonym"), on_wheels),
        wheels=wheels,
    )


def _wheel_rows(path: Path) -> Iterator[Row]:
    for _, row in _records(path, _COLUMNS):
        inner, middle, outer = (row[column] for column in _COLUMNS)
        yield inner, middle, outer


def _read_forms(path: Path) -> dict[str, tuple[str, ...]]:
    pairs: list[tuple[str, str]] = []
    for number, row in _records(path, ("name", "format")):
        base = row["name"].strip().lower()
        if not base:
            raise WheelError(f"{path}, row {number}: the name is empty")
        pairs += [(form, base) for form in (*split_labels(row["format"]), base)]
    return _gathered(pairs)


def _read_synonyms(path: Path, on_wheels: set[str]) -> dict[str, tuple[str, ...]]:
    pairs: list[tuple[str, str]] = []
    for number, row in _records(path, ("word_run1", "synonym_run1")):
        for column in (name for name in row if name.startswith("word_run")):
            word = row[column].strip().lower()
            if not word:
                continue
            if word not in on_wheels:
                raise WheelError(f"{path}, row {number}: {column} is {word!r}, which is on no wheel")
            synonyms = row.get(column.replace("word", "synonym"))
            if synonyms is None:
                raise WheelError(f"{path} has a column {column} but no {column.replace('word', 'synonym')}")
            pairs += [(synonym, word) for synonym in (word, *split_labels(synonyms))]
    return _gathered(pairs)


def _from_mapping(path: Path) -> WheelTables:
    names = ("format_mapping", "raw_mapping", "wheel_map_whole")
    arrays = read_object_arrays(path, names)
    forms, synonyms = (_word_lists(arrays[name], f"{path}: {name}") for name in names[:2])
    wheels = arrays["wheel_map_whole"]
    if not isinstance(wheels, dict) or not wheels:
        raise WheelError(f"{path}: wheel_map_whole is no dictionary of wheels")
    return WheelTables(
        forms=forms,
        synonyms=synonyms,
        wheels=tuple(_mapped_wheel(path, name, wheels[name]) for name in sorted(wheels)),
    )


def _mapped_wheel(path: Path, name: object, levels: object) -> Wheel:
    where = f"{path}: wheel_map_whole[{name!r}]"
    if not isinstance(name, str) or not isinstance(levels, dict):
        raise WheelError(f"{where} is no wheel")
    level1, level2 = (_word_map(levels.get(level), f"{where}[{level!r}]") for level in LEVELS)
    return Wheel(name=name, level1=level1, level2=level2)


def _word_map(content: object, where: str) -> dict[str, str]:
    if not isinstance(content, dict) or not content:
        raise WheelError(f"{where} is no dictionary of words")
    if not all(isinstance(text, str) for item in content.items() for text in item):
        raise WheelError(f"{where} holds something that is no word")
    return content


def _word_lists(content: object, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(content, dict) or not content:
        raise WheelError(f"{where} is no dictionary of words")
    for word, others in content.items():
        if not isinstance(word, str) or not isinstance(others, list):
            raise WheelError(f"{where}[{word!r}] is no list of words")
        if not all(isinstance(other, str) for other in others):
            raise WheelError(f"{where}[{word!r}] holds something that is no word")
    return _gathered((word, other) for word, others in content.items() for other in others)


def _gathered(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, ...]]:
    found: dict[str, set[str]] = {}
    for key, value in pairs:
        found.setdefault(key, set()).add(value)
    return {key: tuple(sorted(found[key])) for key in sorted(found)}


def _needed(directory: Path, stem: str) -> Path:
    path = _sheet(directory, stem)
    if path is None:
        raise WheelError(f"{directory} holds no {stem}.xlsx and no {stem}.csv: {_LAYOUT}")
    return path


def _sheet(directory: Path, stem: str) -> Path | None:
    return next((p for suffix in ("xlsx", "csv") if (p := directory / f"{stem}.{suffix}").is_file()), None)


def _records(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Number (the header is row 1) and cells by column of every row; an empty cell is an empty string."""
    rows = iter(_xlsx_rows(path) if path.suffix == ".xlsx" else _csv_rows(path))
    header = [str(cell or "").strip() for cell in next(rows, [])]
    missing = [column for column in columns if column not in header]
    if missing:
        raise WheelError(f"{path} has no column {', '.join(missing)}; its header is {', '.join(header)}")
    for number, row in enumerate(rows, start=2):
        cells = ["" if cell is None else str(cell) for cell in row]
        yield number, dict(zip(header, cells + [""] * (len(header) - len(cells)), strict=False))


def _csv_rows(path: Path) -> Iterator[list[Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from csv.reader(file)
    except (UnicodeDecodeError, csv.Error) as error:
        raise WheelError(f"{path} is no CSV file in UTF-8: {error}") from error


def _xlsx_rows(path: Path) -> Iterator[tuple[Any, ...]]:
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs openpyxl: pip install openpyxl, or save it as CSV"
        ) from error
    from zipfile import BadZipFile

    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (BadZipFile, KeyError, InvalidFileException) as error:
        raise WheelError(f"{path} is no readable xlsx file: {error}") from error
    sheet = book.worksheets[0]
    yield from sheet.iter_rows(values_only=True)


def made_up_wheel() -> WheelTables:
    """Five small wheels of this project's own, for tests and the demo; scores on them compare with no published one."""
    with as_file(files("omnigrpo.emotion_wheel") / "made_up") as directory:
        return convert(directory)
