"""Look-ups by hand, sectors and their faults, and the compact file."""

from pathlib import Path

import pytest

from omnigrpo.emotion_wheel.convert import made_up_wheel
from omnigrpo.emotion_wheel.labels import check_labels, split_labels
from omnigrpo.emotion_wheel.sectors import Row, wheel_from_rows
from omnigrpo.emotion_wheel.tables import Wheel, WheelError, WheelTables
from omnigrpo.emotion_wheel.wheel import EmotionWheel


def test_the_three_look_ups() -> None:
    wheel = EmotionWheel(made_up_wheel())
    # "fear" is a form of "afraid" and of "fearful"; base word: the first of both.
    assert wheel.base_word("fear") == "afraid"
    assert wheel.wheel_word("fear") == "afraid"
    # "unease" -> "uneasy" -> anxious, nervous, worried -> the first of them that is on the wheel.
    assert wheel.base_word("unease") == "uneasy"
    assert wheel.wheel_word("unease") == "anxious"
    assert wheel.nodes("unease", "level2") == ("worried", "angry", "nervous", "anxious", "afraid")
    # In a table of forms, but a synonym of nothing.
    assert wheel.is_known("puzzlement")
    assert wheel.base_word("puzzlement") == "puzzled"
    assert wheel.wheel_word("puzzlement") is None
    assert set(wheel.nodes("puzzlement")) == {None}
    assert not wheel.is_known("neutral")
    assert wheel.base_word("neutral") is None


ROWS: list[Row] = [
    ("Good", "Glad", "Merry"),
    ("", "", " sunny "),
    ("", "Calm", "Quiet"),
    ("Bad", "Sad", "Quiet"),
]


def test_empty_cells_repeat_and_the_last_sector_wins() -> None:
    wheel = wheel_from_rows("wheel", ROWS)
    assert wheel.level1["sunny"] == "good"
    assert wheel.level1["quiet"] == "bad"
    assert wheel.level2["quiet"] == "sad"
    assert wheel.level2["good"] == "calm"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ([("", "Glad", "Merry")], "row 2: the first row must fill"),
        ([*ROWS, ("Odd", "", "")], "row 6: the sector 'odd' is empty; give level2"),
        ([*ROWS, ("", "Odd", "")], "row 6: the sector 'odd' is empty; give level3"),
        ([("a", "b", "c"), ("b", "a", "d")], "cycle: a -> b -> a"),
        ([("a", "b", "c"), ("c", "d", "a")], "cycle: "),
    ],
    ids=["no rows", "first row", "empty sector", "empty middle", "cycle", "long cycle"],
)
def test_wheels_that_cannot_be(rows: list[Row], message: str) -> None:
    with pytest.raises(WheelError, match=message):
        wheel_from_rows("wheel9", rows)


def test_a_word_beside_itself_is_one_node() -> None:
    assert wheel_from_rows("wheel", [("a", "b", "b")]).level2["b"] == "b"


def test_the_compact_file_holds_all(tmp_path: Path) -> None:
    tables = made_up_wheel()
    tables.save(tmp_path / "wheel.json")
    loaded = WheelTables.load(tmp_path / "wheel.json")
    assert loaded.content_hash == tables.content_hash
    assert EmotionWheel(loaded).nodes("joy") == EmotionWheel(tables).nodes("joy")


def test_the_hash_depends_on_every_table() -> None:
    tables = made_up_wheel()
    hashes = {
        tables.content_hash,
        WheelTables(forms=tables.forms, synonyms=tables.synonyms, wheels=tables.wheels[:4]).content_hash,
        WheelTables(forms={}, synonyms=tables.synonyms, wheels=tables.wheels).content_hash,
        WheelTables(forms=tables.forms, synonyms={}, wheels=tables.wheels).content_hash,
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[]", "is no omnigrpo-emotion-wheel-1 file"),
        ('{"format": "omnigrpo-emotion-wheel-1", "forms": {}}', "is damaged"),
    ],
    ids=["absent", "no JSON", "another file", "incomplete"],
)
def test_files_that_cannot_be_loaded(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "wheel.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(WheelError, match=message):
        WheelTables.load(path)


def test_more_nodes_than_a_mask_has_bits() -> None:
    words = {f"w{i}": f"w{i}" for i in range(65)}
    with pytest.raises(WheelError, match="65 nodes on level1"):
        EmotionWheel(WheelTables(forms={}, synonyms={}, wheels=(Wheel(name="big", level1=words, level2={}),)))


def test_wheels_that_need_several_words() -> None:
    words = {f"w{i}": f"w{i}" for i in range(40)}
    tables = WheelTables(
        forms={word: (word,) for word in words},
        synonyms={word: (word,) for word in words},
        wheels=tuple(Wheel(name=f"wheel{i}", level1=words, level2=words) for i in range(3)),
    )
    masks = EmotionWheel(tables).node_sets([["w0", "w39"], []]).masks_NW
    bit = {word: 1 << position for position, word in enumerate(sorted(words))}
    assert masks.tolist() == [[bit["w0"] | bit["w39"]] * 3, [0] * 3]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("[happy, Sad]", ["happy", "sad"]),
        ("['keyed up', \"sad\"]", ["keyed up", "sad"]),
        (" happy ,, ", ["happy"]),
        ("[]", []),
        ("", []),
        ("[[happy]]", ["[happy]"]),
    ],
)
def test_lists_as_models_write_them(text: str, labels: list[str]) -> None:
    assert split_labels(text) == labels


@pytest.mark.parametrize("labels", ["happy", ["happy", 3], None, [["happy"]]])
def test_labels_that_are_no_strings(labels: object) -> None:
    with pytest.raises(ValueError, match="item 4 must be a list of strings"):
        check_labels(labels, "item 4")
