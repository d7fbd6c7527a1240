"""The published layouts: spreadsheets, CSV, and the npz file of pickled dictionaries."""

import csv
import pickle
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import openpyxl
import pytest

from omnigrpo.emotion_wheel.convert import MAPPING_FILE, convert, made_up_wheel
from omnigrpo.emotion_wheel.tables import LEVELS, WheelError, WheelTables


@pytest.fixture
def sheets(tmp_path: Path) -> Path:
    """The made-up wheel's own CSV files."""
    with as_file(files("omnigrpo.emotion_wheel") / "made_up") as directory:
        shutil.copytree(directory, tmp_path / "sheets")
    return tmp_path / "sheets"


def as_xlsx(directory: Path) -> None:
    for path in directory.glob("*.csv"):
        if path.stem == "format":
            continue
        book = openpyxl.Workbook()
        assert book.active is not None
        with path.open() as file:
            for row in csv.reader(file):
                book.active.append([cell.title() or None for cell in row] if row[0] != "level1" else row)
        if path.stem == "synonym":
            for number, cell in enumerate(book.active[1], start=1):
                book.active.cell(1, number, str(cell.value).lower())
        book.save(path.with_suffix(".xlsx"))
        path.unlink()


def mapping_of(tables: WheelTables) -> dict[str, object]:
    return {
        "format_mapping": {form: list(reversed(bases)) for form, bases in tables.forms.items()},
        "raw_mapping": {base: [*words, words[0]] for base, words in tables.synonyms.items()},
        "wheel_map_whole": {w.name: {level: dict(w.nodes(level)) for level in LEVELS} for w in tables.wheels},
    }


def test_spreadsheets_give_the_same_as_csv(sheets: Path) -> None:
    as_xlsx(sheets)
    assert convert(sheets).content_hash == made_up_wheel().content_hash


def test_pickled_dictionaries_give_the_same(tmp_path: Path) -> None:
    np.savez(tmp_path / MAPPING_FILE, **mapping_of(made_up_wheel()))  # type: ignore[arg-type]
    assert convert(tmp_path).content_hash == made_up_wheel().content_hash


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_that_numpy_writes(tmp_path: Path, protocol: int) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / MAPPING_FILE, "w") as archive:
        for name, content in mapping_of(made_up_wheel()).items():
            with archive.open(f"{name}.npy", "w") as file:
                header = {"descr": "|O", "fortran_order": False, "shape": ()}
                np.lib.format.write_array_header_1_0(file, header)
                file.write(pickle.dumps(np.array(content, dtype=object), protocol=protocol))
    assert convert(tmp_path).content_hash == made_up_wheel().content_hash


class Touch:
    """What a hostile file could hold."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_nothing_in_a_pickle_is_run(tmp_path: Path) -> None:
    mapping = mapping_of(made_up_wheel()) | {"raw_mapping": {"happy": Touch(tmp_path / "was-run")}}
    np.savez(tmp_path / MAPPING_FILE, **mapping)  # type: ignore[arg-type]
    with pytest.raises(WheelError, match=r"raw_mapping.* which no table of words needs"):
        convert(tmp_path)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("format_mapping", [1], "format_mapping is no dictionary"),
        ("format_mapping", {"happy": "happy"}, r"format_mapping\['happy'\] is no list of words"),
        ("raw_mapping", {"happy": [3]}, "holds something that is no word"),
        ("wheel_map_whole", {}, "no dictionary of wheels"),
        ("wheel_map_whole", {"wheel1": {"level1": {"a": "a"}}}, r"\['level2'\] is no dictionary"),
    ],
)
def test_pickled_content_that_is_no_table(tmp_path: Path, name: str, content: object, message: str) -> None:
    boxed = np.empty((), dtype=object)
    boxed[()] = content
    np.savez(tmp_path / MAPPING_FILE, **mapping_of(made_up_wheel()) | {name: boxed})  # type: ignore[arg-type]
    with pytest.raises(WheelError, match=message):
        convert(tmp_path)


def test_a_truncated_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / MAPPING_FILE, **mapping_of(made_up_wheel()))  # type: ignore[arg-type]
    whole = (tmp_path / MAPPING_FILE).read_bytes()
    (tmp_path / MAPPING_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WheelError, match="is no npz file"):
        convert(tmp_path)


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("wheel2.csv", "level2", "middle", "wheel2.csv has no column level2"),
        ("format.csv", "name", "word", "format.csv has no column name"),
        ("synonym.csv", "synonym_run2", "synonyms", "column word_run2 but no synonym_run2"),
        ("synonym.csv", "happy", "hoppy", "row 2: word_run1 is 'hoppy', which is on no wheel"),
        ("wheel3.csv", "quiet,calm,relaxed", "quiet,,", "the sector 'quiet' is empty"),
        ("format.csv", "puzzled,", ",", "the name is empty"),
    ],
)
def test_sheets_that_cannot_be_used(sheets: Path, file: str, old: str, new: str, message: str) -> None:
    rewrite(sheets / file, old, new)
    with pytest.raises(WheelError, match=message):
        convert(sheets)


@pytest.mark.parametrize("absent", ["wheel1.csv", "synonym.csv", "format.csv"])
def test_absent_files_are_named(sheets: Path, absent: str) -> None:
    (sheets / absent).unlink()
    if absent == "wheel1.csv":
        for path in sheets.glob("wheel*.csv"):
            path.unlink()
    with pytest.raises(WheelError, match=f"holds no {Path(absent).stem}"):
        convert(sheets)


def test_a_text_file_named_xlsx(sheets: Path) -> None:
    (sheets / "wheel1.xlsx").write_text("level1,level2,level3\n")
    with pytest.raises(WheelError, match="is no readable xlsx file"):
        convert(sheets)
