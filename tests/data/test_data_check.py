"""Checks of datasets: what counts as the same clip, what is asked of each, and what is said of odd labels."""

import json
import shutil
from pathlib import Path

import av
import pytest
from typer.testing import CliRunner

from omnigrpo.cli import app
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.data_check import check_datasets


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """Four real clips and their JSON file, one clip each of four labels."""
    root = tmp_path_factory.mktemp("rendered")
    settings = SyntheticConfig(num_cold_start=0, num_rl=0, num_heldout=4, num_ood=0)
    generate_dataset(root, settings, num_workers=0)
    return root


@pytest.fixture
def data(rendered: Path, tmp_path: Path) -> Path:
    shutil.copytree(rendered, tmp_path / "data")
    return tmp_path / "data"


def items_of(data: Path) -> list[dict]:
    return json.loads((data / "heldout.json").read_text())


def write(data: Path, name: str, items: list[dict]) -> Path:
    (data / name).write_text(json.dumps(items))
    return data / name


def without_sound(source: Path, target: Path) -> None:
    with av.open(str(source)) as whole, av.open(str(target), "w") as silent:
        stream = silent.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                silent.mux(packet)


def test_the_same_bytes_twice_in_one_file(data: Path) -> None:
    items = items_of(data)
    shutil.copy(data / items[0]["video"], data / "copy.mp4")
    path = write(data, "twice.json", [*items, items[0] | {"video": "copy.mp4"}])
    assert check_datasets([path]).is_clean
    assert check_datasets([path], by_content=True).splits[0].repeated == (data / "copy.mp4",)


def test_two_spellings_of_a_path_are_one_clip(data: Path) -> None:
    items = items_of(data)
    spelled = f"clips/../{items[0]['video']}"
    path = write(data, "twice.json", [*items, items[0] | {"video": spelled}])
    assert check_datasets([path]).splits[0].repeated == (data / spelled,)


def test_windows_of_a_clip_are_clips_of_their_own(data: Path) -> None:
    first = items_of(data)[0]
    halves = [first | {"start_seconds": 0, "end_seconds": 1}, first | {"start_seconds": 1}]
    assert check_datasets([write(data, "halves.json", halves)], by_content=True).is_clean
    again = check_datasets([write(data, "thrice.json", [*halves, halves[0]])], by_content=True)
    assert again.splits[0].repeated == (data / first["video"],)


def test_a_clip_must_have_what_its_own_items_ask_for(data: Path) -> None:
    items = items_of(data)
    without_sound(data / items[0]["video"], data / "silent.mp4")
    silent = json.loads(json.dumps(items[0])) | {"video": "silent.mp4"}
    silent["conversations"][0]["value"] = "<video>\nWhich emotion?"
    assert check_datasets([write(data, "mixed.json", [*items, silent])], probe=True).is_clean

    silent["conversations"][0]["value"] = "<video>\n<audio>\nWhich emotion?"
    (sentence,) = check_datasets([write(data, "both.json", [*items, silent])], probe=True).splits[0].unusable
    assert sentence == f"{data / 'silent.mp4'} has no audio stream"


def test_every_clip_is_probed_once_and_counted(data: Path) -> None:
    items = items_of(data)
    path = write(data, "more.json", [*items, items[0], items[1] | {"video": "gone.mp4"}])
    told: list[tuple[int, int]] = []
    found = check_datasets([path], probe=True, on_probe=lambda done, total: told.append((done, total)))
    assert sorted(told) == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(found.splits[0].seconds) == 4
    assert found.splits[0].missing == (data / "gone.mp4",)


def test_an_odd_label_is_named_with_its_first_item(data: Path) -> None:
    items = items_of(data)
    for index in (1, 3):
        items[index]["conversations"][1]["value"] = "bored"
    path = write(data, "odd.json", items)
    labels = {item["conversations"][1]["value"] for item in items} - {"bored"}
    found = check_datasets([path], labels=[*sorted(labels), "calm"])
    assert found.unknown_labels == (f"{path}, item 1: 'bored' (2 items)",)
    assert found.splits[0].absent == ("calm",)
    assert not found.is_clean


def test_a_file_named_twice(data: Path) -> None:
    path = data / "heldout.json"
    with pytest.raises(ValueError, match=r"heldout\.json is named twice"):
        check_datasets([path, data / "clips" / ".." / "heldout.json"])


def test_the_table_tells_shares_durations_and_absent_labels(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    arguments = ["data", "check", str(data / "heldout.json"), "--probe", "--labels", "ravdess"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.output.splitlines()]
    found = check_datasets([data / "heldout.json"], probe=True).splits[0]
    for label in found.labels:
        assert [label, "1", "(25.0%)"] in rows
    assert ["calm", "0", "(", "0.0%)"] in rows
    low, middle, high = min(found.seconds), found.median_seconds, max(found.seconds)
    durations = [f"{low:.1f}", "/", f"{middle:.1f}", "/", f"{high:.1f}"]
    assert ["heldout.json", "4", "0", "0", "0", *durations, f"{sum(found.seconds) / 3600:.2f}"] in rows
