"""The forms of file that hold a dataset."""

import json
from pathlib import Path

import pytest

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.data.dataset_files import DatasetError, read_items


def item(name: str) -> dict:
    turns = [{"from": "human", "value": "<video>\nWhich emotion?"}, {"from": "gpt", "value": "happy"}]
    return {"video": f"{name}.mp4", "conversations": turns}


def names(path: Path) -> list[str]:
    return [prompt.clip.path.stem for prompt in read_dataset(path, PromptStyle())]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(item(name)) for name in "abc") + "\n\n")
    assert names(path) == ["a", "b", "c"]
    path.write_text(json.dumps(item("a")) + "\n{")
    with pytest.raises(DatasetError, match=r"a\.jsonl, line 2 is not valid JSON"):
        read_items(path)
    path.write_text(json.dumps(item("a")) + "\n" + json.dumps({"video": "b.mp4"}))
    with pytest.raises(DatasetError, match=r"a\.jsonl, line 2: 'conversations' must list"):
        names(path)
    path.write_text("\n")
    with pytest.raises(DatasetError, match="has no lines"):
        read_items(path)


def test_braces_stand_for_several_files(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.json").write_text(json.dumps([item(name)]))
    assert names(tmp_path / "{one,two}.json") == ["one", "two"]
    with pytest.raises(DatasetError, match=r"three\.json does not exist"):
        names(tmp_path / "{one,three}.json")


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("all", "abcdefgh"),
        ("first:3", "abc"),
        ("end:2", "gh"),
        ("first:30%", "abc"),
        ("first:99", "abcdefgh"),
    ],
)
def test_yaml_lists_files_and_what_is_taken_of_each(tmp_path: Path, strategy: str, expected: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.json").write_text(json.dumps([item(name) for name in "abcdefgh"]))
    path = tmp_path / "all.yaml"
    path.write_text(f"datasets:\n  - json_path: sub/a.json\n    sampling_strategy: {strategy}\n")
    prompts = read_dataset(path, PromptStyle())
    assert "".join(prompt.clip.path.stem for prompt in prompts) == expected
    assert prompts[0].clip.path.parent == tmp_path / "sub"


def test_a_random_part_is_the_same_every_time(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([item(name) for name in "abcdefgh"]))
    path = tmp_path / "all.yaml"
    path.write_text("datasets:\n  - json_path: a.json\n    sampling_strategy: random:50%\n")
    drawn = names(path)
    assert drawn == names(path)
    assert len(set(drawn)) == 4
    assert drawn != list("abcd")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("datasets: []", "must list 'datasets'"),
        ("- a", "must list 'datasets'"),
        ("datasets:\n  - path: a.json", r"datasets\[0\]: needs the key 'json_path'"),
        (
            "datasets:\n  - json_path: a.json\n    sampling_strategy: last:3",
            "sampling_strategy must be all, first:N",
        ),
        ("datasets: [", "is not valid YAML"),
    ],
)
def test_yaml_of_another_form(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([item("a")]))
    path = tmp_path / "all.yaml"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_items(path)


def test_a_label_outside_the_set_is_named_with_its_line(tmp_path: Path) -> None:
    odd = item("b")
    odd["conversations"][1]["value"] = "<think>Hm.</think><answer>bored</answer>"
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(["", json.dumps(item("a")), json.dumps(odd)]))
    assert len(read_dataset(path, PromptStyle(), labels=("happy", "bored"))) == 2
    with pytest.raises(
        DatasetError, match=r"a\.jsonl, line 3: the label in conversations\[1\]\.value must be"
    ):
        read_dataset(path, PromptStyle(), labels=("happy", "sad"))
