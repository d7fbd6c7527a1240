"""Miniature trees in each published dataset's own layout, with real clips."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omnigrpo.cli import app
from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.data.dataset_files import DatasetError
from omnigrpo.data.dfew import read_dfew
from omnigrpo.data.emer import read_emer
from omnigrpo.data.mafw import read_mafw
from omnigrpo.data.published import label_set, read_published
from omnigrpo.data.ravdess import read_ravdess
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> list[Path]:
    """Seven real clips."""
    root = tmp_path_factory.mktemp("clips")
    generate_dataset(
        root, SyntheticConfig(num_cold_start=0, num_rl=7, num_heldout=0, num_ood=0), num_workers=0
    )
    return sorted((root / "clips" / "rl").glob("*.mp4"))


def place(clips: list[Path], *paths: Path) -> None:
    for source, path in zip(clips, paths, strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def dfew(clips: list[Path], tmp_path: Path) -> Path:
    root = tmp_path / "DFEW"
    place(clips, *(root / "Clip" / "original" / f"part_{n}" / f"{n}.mp4" for n in range(1, 6)))
    split = root / "EmoLabel_DataSplit"
    write(split / "train(single-labeled)" / "set_1.csv", "video_name,label", "00001,1", "2,7", "9,2")
    write(split / "test(single-labeled)" / "set_1.csv", "video_name,label", "3,5", "4,3", "5,6")
    return root


def test_dfew(dfew: Path) -> None:
    found = read_dfew(dfew)
    assert [(clip.path.name, clip.label) for clip in found.splits["train"]] == [
        ("1.mp4", "happy"),
        ("2.mp4", "fear"),
    ]
    assert [clip.label for clip in found.splits["test"]] == ["surprise", "neutral", "disgust"]
    assert found.skipped == ("9 (sad) is annotated, but not on disk",)


def test_dfew_in_the_flat_layout(dfew: Path) -> None:
    write(dfew / "label" / "single_trainset_2.csv", "video_name,label", "1,4")
    write(dfew / "label" / "single_testset_2.csv", "video_name,label", "2,4")
    found = read_dfew(dfew, fold=2)
    assert [len(split) for split in found.splits.values()] == [1, 1]


@pytest.mark.parametrize("label", ["0", "8", "happy", ""])
def test_dfew_label_outside_the_set(dfew: Path, label: str) -> None:
    path = write(
        dfew / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv",
        "video_name,label",
        "3,5",
        f"4,{label}",
    )
    with pytest.raises(DatasetError, match="line 3: label must be a number from 1 to 7, got") as caught:
        read_dfew(dfew)
    assert str(path) in str(caught.value)


def test_dfew_faults(dfew: Path) -> None:
    with pytest.raises(DatasetError, match="folds 1 to 5, got 6"):
        read_dfew(dfew, fold=6)
    with pytest.raises(DatasetError, match=r"set_3\.csv does not exist"):
        read_dfew(dfew, fold=3)
    write(dfew / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv", "name,label", "3,5")
    with pytest.raises(DatasetError, match="has no column video_name; its header is name, label"):
        read_dfew(dfew)


def test_two_clips_of_one_number(dfew: Path, clips: list[Path]) -> None:
    place(clips, dfew / "Clip" / "original" / "other" / "00001.mp4")
    with pytest.raises(DatasetError, match="have the same name"):
        read_dfew(dfew)
    assert read_dfew(dfew, clips=dfew / "Clip" / "original" / "part_1").splits["train"]


def test_dfews_cropped_clips_beside_the_original_ones(dfew: Path, clips: list[Path]) -> None:
    place(clips, *(dfew / "Clip" / "clip_224x224_avi" / f"{n:05d}.avi" for n in range(1, 6)))
    assert {clip.path.parts[-3] for clip in read_dfew(dfew).splits["test"]} == {"original"}


def test_a_row_without_a_name(dfew: Path) -> None:
    path = dfew / "EmoLabel_DataSplit" / "train(single-labeled)" / "set_1.csv"
    write(path, "video_name,label", "1,1", ",2")
    with pytest.raises(DatasetError, match="line 3: video_name is empty") as caught:
        read_dfew(dfew)
    assert str(path) in str(caught.value)


def test_a_split_without_clips_is_a_failure(dfew: Path, tmp_path: Path) -> None:
    write(dfew / "EmoLabel_DataSplit" / "test(single-labeled)" / "set_1.csv", "video_name,label", "77,1")
    arguments = ["data", "convert", "dfew", str(dfew), "-o", str(tmp_path / "json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "test: no annotated clip is on disk; nothing written" in result.output
    assert not (tmp_path / "json" / "dfew_test.json").exists()


@pytest.fixture
def mafw(clips: list[Path], tmp_path: Path) -> Path:
    root = tmp_path / "MAFW"
    place(clips, *(root / "data" / "clips" / f"{n:05d}.mp4" for n in range(1, 5)))
    split = root / "Train & Test Set" / "single" / "no_caption" / "set_1"
    write(split / "train.txt", "00001.mp4 anger", "00002.mp4 helplessness", "", "00003.mp4 happiness")
    write(split / "test.txt", "00004.mp4\tcontempt", "00009.mp4  fear")
    return root


def test_mafw(mafw: Path) -> None:
    found = read_mafw(mafw)
    assert [clip.label for clip in found.splits["train"]] == ["angry", "helpless", "happy"]
    assert [clip.label for clip in found.splits["test"]] == ["contemptuous"]
    assert found.skipped == ("00009.mp4 (fear) is annotated, but not on disk",)
    assert len(found.labels) == 11


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("00004.mp4 joy", "line 1: label must be one of anger, disgust, .* got 'joy'"),
        ("00004.mp4", "line 1: expected a file name and a label, got '00004.mp4'"),
    ],
)
def test_mafw_lines_of_another_form(mafw: Path, line: str, message: str) -> None:
    write(mafw / "Train & Test Set" / "single" / "no_caption" / "set_1" / "test.txt", line)
    with pytest.raises(DatasetError, match=message):
        read_mafw(mafw)


def test_ravdess(clips: list[Path], tmp_path: Path) -> None:
    actor = tmp_path / "RAVDESS" / "Actor_12"
    names = [
        "01-01-06-01-02-01-12",  # fearful -> fear
        "01-01-08-02-01-02-12",  # surprised -> surprise
        "01-01-02-01-01-01-12",  # calm
        "02-01-03-01-01-01-12",  # picture alone
        "01-02-03-01-01-01-12",  # song
    ]
    place(clips, *(actor / f"{name}.mp4" for name in names))
    labels = {clip.path.stem: clip.label for clip in read_ravdess(actor.parent).splits["test"]}
    assert labels == {names[0]: "fear", names[1]: "surprise", names[2]: "calm"}
    assert len(read_ravdess(actor.parent, speech_only=False).splits["test"]) == 4
    place(clips, actor / "01-01-09-01-02-01-12.mp4")
    with pytest.raises(DatasetError, match=r"the emotion \(third number\) must be 01 to 08, got 09"):
        read_ravdess(actor.parent)
    (actor / "01-01-09-01-02-01-12.mp4").rename(actor / "holiday.mp4")
    with pytest.raises(DatasetError, match=r"holiday\.mp4: a RAVDESS name is seven numbers"):
        read_ravdess(actor.parent)


def test_emer_with_labels_of_its_own_file(clips: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "EMER"
    place(clips, root / "video" / "sample_00000001.mp4", root / "video" / "sample_00000002.mp4")
    write(
        root / "final-EMER-reason.csv",
        "name,chinese,english",
        'sample_00000001,x,"She frowns, and her voice rises."',
        "sample_00000002,x,He smiles.",
    )
    with pytest.raises(DatasetError, match="descriptions but no labels"):
        read_emer(root)
    labels = write(tmp_path / "labels.csv", "name,label", "sample_00000001,angry", "sample_00000002,Happy")
    first, second = read_emer(root, labels=labels).splits["train"]
    assert first.answer == "<think>She frowns, and her voice rises.</think>\n<answer>angry</answer>"
    assert second.label == "happy"
    write(labels, "name,label", "sample_00000001,angry")
    with pytest.raises(DatasetError, match=r"line 3: .* has no label for 'sample_00000002'"):
        read_emer(root, labels=labels)


def test_emers_first_release(clips: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "EMER"
    place(clips, root / "a.mp4")
    write(
        root / "gt-eng.csv",
        "name,emotions,subtitles,reasons",
        "a,\"['worried', 'sad']\",hm,His brows are knit.",
    )
    (clip,) = read_emer(root).splits["train"]
    assert (clip.label, clip.reasoning) == ("worried", "His brows are knit.")
    write(root / "gt-eng.csv", "name,emotions,subtitles,reasons", "a,worried,hm,")
    with pytest.raises(DatasetError, match="line 2: reasons is empty"):
        read_emer(root)


def test_unknown_names() -> None:
    with pytest.raises(DatasetError, match="unknown dataset 'meld': known are dfew, mafw, ravdess, emer"):
        read_published("meld", Path())
    assert label_set("happy, sad") == ("happy", "sad")
    with pytest.raises(DatasetError, match="labels must be one of"):
        label_set("happy")


def test_converted_files_are_what_a_run_reads(mafw: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["data", "convert", "mafw", str(mafw), "--output", str(tmp_path / "json")]
    )
    assert result.exit_code == 0, result.output
    assert "mafw_train.json: 3 clips" in result.output
    assert "left out: 00009.mp4 (fear)" in result.output
    prompts = read_dataset(tmp_path / "json" / "mafw_train.json", PromptStyle())
    assert [prompt.solution for prompt in prompts] == ["angry", "helpless", "happy"]
    assert all(prompt.clip.path.is_file() and prompt.modalities == ("video", "audio") for prompt in prompts)


def converted(root: Path, name: str, output: Path) -> tuple[Path, Path]:
    assert CliRunner().invoke(app, ["data", "convert", name, str(root), "-o", str(output)]).exit_code == 0
    return output / f"{name}_train.json", output / f"{name}_test.json"


def test_a_clean_check(mafw: Path, tmp_path: Path) -> None:
    # The synthetic clips differ; each of them is in one split.
    files = converted(mafw, "mafw", tmp_path)
    arguments = ["data", "check", *map(str, files), "--labels", "mafw", "--content", "--probe"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found["is_clean"] is True
    assert found["splits"][0]["labels"] == {"angry": 1, "helpless": 1, "happy": 1}
    assert all(1 < seconds < 6 for seconds in found["splits"][0]["seconds"])


def test_every_fault_is_found(mafw: Path, clips: list[Path], tmp_path: Path) -> None:
    train, test = converted(mafw, "mafw", tmp_path)
    items = json.loads(train.read_text())
    copy = tmp_path / "copy.mp4"
    shutil.copy(items[0]["video"], copy)
    others = json.loads(test.read_text())
    others.append(others[0] | {"video": str(copy)})
    others.append(items[1])
    others.append(others[0])
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(copy.read_bytes()[:200])
    others.append(others[0] | {"video": str(broken)})
    others.append(others[0] | {"video": str(tmp_path / "gone.mp4")})
    test.write_text(json.dumps(others))
    arguments = ["data", "check", str(train), str(test), "--labels", "dfew", "--probe"]

    result = CliRunner().invoke(app, [*arguments, "--content", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.output)
    second = found["splits"][1]
    assert second["missing"] == [str(tmp_path / "gone.mp4")]
    assert second["repeated"] == [others[0]["video"]]
    assert len(second["unusable"]) == 1
    assert "broken.mp4" in second["unusable"][0]
    (overlap,) = found["overlaps"]
    assert sorted(overlap["clips"]) == sorted([items[1]["video"], str(copy)])
    assert any("contemptuous" in line for line in found["unknown_labels"])

    by_path = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert by_path["overlaps"][0]["clips"] == [items[1]["video"]]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 1
    assert "gone.mp4" in shown.output
