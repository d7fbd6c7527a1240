"""`omnigrpo probe` as a user meets it: the table, JSON, exit statuses, and the contact sheet's pixels."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import ClipRecipe, read_numbers, write_clip
from mp4_boxes import set_rotation
from PIL import Image

from omnigrpo import cli, contact_sheet, probe
from omnigrpo.contact_sheet import DPI, HEADER, LINK, MARGIN, STAMP, TITLE, WAVE
from omnigrpo.report.theme import LIGHT

FASTSTART = {"movflags": "faststart"}
EIGHT_OF_50 = [3, 9, 15, 21, 28, 34, 40, 46]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """What a command printed, and how it ended."""

    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Shown]:
    """Run ``omnigrpo probe`` in this process, for speed: importing torch takes seconds."""

    def call(*arguments: object, columns: int | None = 120) -> Shown:
        monkeypatch.setattr(sys, "argv", ["omnigrpo", "probe", *map(str, arguments)])
        if columns is None:
            monkeypatch.delenv("COLUMNS", raising=False)
        else:
            monkeypatch.setenv("COLUMNS", str(columns))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        status = end.value.code
        assert isinstance(status, int)
        printed = capsys.readouterr()
        return Shown(status=status, out=printed.out, err=printed.err)

    return call


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with good clips, one turned, one of sound alone, a cut one, and a file that is no media."""
    directory = tmp_path_factory.mktemp("clips")
    write_clip(directory / "good.mp4", ClipRecipe(width=160, height=96))
    set_rotation(write_clip(directory / "turned.mov", ClipRecipe(rate=30, audio_delay_seconds=0.5)), 90)
    write_clip(directory / "voice.m4a", ClipRecipe(num_frames=0))
    cut = write_clip(directory / "cut.mp4", ClipRecipe(container_options=FASTSTART))
    cut.write_bytes(cut.read_bytes()[:-9000])
    (directory / "notes.txt").write_text("no media")
    return directory


def test_a_good_file_ends_with_status_0(run, clips: Path):
    shown = run(clips / "good.mp4")
    assert shown.status == 0, shown.err
    for words in (
        f"in {clips}", "good.mp4", "mp4", "2.0 s", "h264 160x96 25 fps", "50 frames", "aac 44.1 kHz stereo", "ok",
        "8 frames at 0.12 0.36 0.60 0.84 1.12 1.36", "of 50 pictures decoded", "s of sound", "1 of 1 file can be used",
    ):  # fmt: skip
        assert words in " ".join(shown.out.split()) or words in shown.out, words
    assert "turned" not in shown.out


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_every_file_is_shown_whole_and_a_bad_one_makes_status_1(run, clips: Path, columns: int):
    shown = run(clips, columns=columns)
    assert shown.status == 1
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if ".m" in line] == [
        "cut.mp4",
        "good.mp4",
        "turned.mov",
        "voice.m4a",
    ]
    words = _words_by_column(lines)
    assert "truncated 38 of 50 video packets are there" in _without_count(words[3])
    assert "no_video has no video stream" in words[3]
    assert "h264 96x64 30 fps, 50 frames, turned 90°" in words[2]
    assert "no video aac 44.1 kHz stereo" in words[2]
    assert lines[-1] == "2 of 4 files can be used: 1 truncated, 1 no_video"
    assert "notes.txt" not in shown.out


def _words_by_column(lines: Sequence[str]) -> list[str]:
    """The text of each of the four columns, read downwards."""
    header = next(line for line in lines if "container" in line)
    starts = [header.index(name) for name in ("file", "container", "streams", "what is taken")]
    columns = zip(starts, [*starts[1:], None], strict=True)
    return [" ".join(" ".join(line[start:stop] for line in lines).split()) for start, stop in columns]


def _without_count(words: str) -> str:
    """The cut file's number of packets depends on the encoder."""
    before, _, behind = words.partition(" of 50 video")
    return f"{before[: before.rindex(' ')]} 38 of 50 video{behind}"


def test_without_a_terminal_rows_are_120_columns_wide(run, clips: Path):
    assert max(map(len, run(clips, columns=None).out.splitlines())) == 120


def test_a_real_process_prints_to_a_pipe(clips: Path):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "omnigrpo", "probe", "good.mp4", "cut.mp4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=clips, env=environment)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "1 of 2 files can be used: 1 truncated" in done.stdout


def test_json(run, clips: Path):
    shown = run(
        clips / "good.mp4", clips / "cut.mp4", clips / "nowhere.mp4", "--json", "--start", 0.6, "--end", 1.4
    )
    assert shown.status == 1
    assert shown.err == ""
    good, cut, missing = json.loads(shown.out)
    assert good["path"] == str(clips / "good.mp4")
    assert (good["start_seconds"], good["end_seconds"]) == (0.6, 1.4)
    assert (good["status"], good["reason"]) == ("ok", None)
    assert good["video"] == {
        "codec": "h264", "width": 160, "height": 96, "frames_per_second": 25.0, "num_frames": 50, "rotation_degrees": 0
    }  # fmt: skip
    assert good["audio"] == {"codec": "aac", "sample_rate_hz": 44_100, "num_channels": 2, "layout": "stereo"}
    assert good["frames"]["indices"] == [15 + i for i in (1, 4, 6, 8, 11, 13, 15, 18)]
    assert good["frames"]["seconds"] == pytest.approx([i / 25 for i in good["frames"]["indices"]])
    assert good["num_decoded"] < 50
    assert good["sound_seconds"] == 0.8
    assert (cut["status"], cut["video"]["codec"], cut["frames"]) == ("truncated", "h264", None)
    assert (missing["status"], missing["container"]) == ("missing", None)


def test_frames_and_min_frames(run, clips: Path):
    (many,) = json.loads(run(clips / "good.mp4", "--json", "--frames", 50).out)
    assert many["frames"]["indices"] == [round((i + 0.5) * 49 / 50 + 1e-6) for i in range(50)]
    shown = run(clips / "good.mp4", "--min-frames", 51)
    assert shown.status == 1
    assert "too_short" in shown.out
    lines = run(clips / "good.mp4", "-k", 50).out.splitlines()
    assert "50 frames at 0.00 0.04 0.08 0.12 0.16 … 1.96 s" in _words_by_column(lines)[3]


def test_what_is_needed(run, clips: Path):
    assert run(clips / "voice.m4a", "--need", "audio").status == 0
    assert run(clips / "voice.m4a", "--need", "video").status == 1
    (record,) = json.loads(run(clips / "good.mp4", "--need", "video", "--json").out)
    assert record["sound_seconds"] is None
    assert record["audio"]["codec"] == "aac"


def test_directories_stand_for_the_media_files_below_them(run, clips: Path, tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("a/2.MP4", "a/b/1.mp4", "3.mp4"):
        (tmp_path / name).write_bytes((clips / "good.mp4").read_bytes())
    records = json.loads(run(tmp_path / "3.mp4", tmp_path / "a", tmp_path / "empty", "--json").out)
    assert [record["path"] for record in records] == [
        str(tmp_path / n) for n in ("3.mp4", "a/2.MP4", "a/b/1.mp4", "empty")
    ]
    assert [record["status"] for record in records] == ["ok", "ok", "ok", "unreadable"]
    assert records[3]["reason"] == "is a directory without media files"


def test_names_that_terminals_do_not_like(run, clips: Path, tmp_path: Path):
    names = [b"broken \xff.mp4", b"two\nlines \x1b[31m.mp4", b"[bold]x.mp4", "ü \U0001f600.mp4".encode()]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes((clips / "good.mp4").read_bytes())
    shown = run(tmp_path, "--contact-sheet", tmp_path / "sheet.png")
    assert shown.status == 0, shown.err
    for words in ("broken \\udcff.mp4", "two\\nlines \\x1b[31m.mp4", "[bold]x.mp4", "ü"):
        assert words in shown.out
    assert len(json.loads(run(tmp_path, "--json").out)) == 4


def test_many_files_show_how_far_it_is(run, clips: Path, tmp_path: Path):
    for number in range(20):
        (tmp_path / f"{number}.mp4").write_bytes(
            (clips / ("cut.mp4" if number == 7 else "good.mp4")).read_bytes()
        )
    shown = run(tmp_path, "--json")
    assert len(json.loads(shown.out)) == 20
    assert "probe 20/20" in shown.err
    assert "1 cannot be used" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--need", "smell"], "--need takes video or audio, got 'smell'"),
        (["--start", "-1"], "--start must be at least 0 seconds, got -1"),
        (["--start", "2", "--end", "2"], "--end must lie behind --start, got 2 s and 2 s"),
        (["--timeout", "0"], "--timeout must be positive, got 0"),
        (["--contact-sheet", "sheet.jpg"], "give a path that ends in .png, got sheet.jpg"),
        (["--contact-sheet", "nowhere/sheet.png"], "the directory nowhere does not exist"),
        (["--contact-sheet", "sheet.png", "--frames", "65"], "at most 64 frames per file, got --frames 65"),
        (["--frames", "0"], "Invalid value for '--frames'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_end_with_status_2_and_a_message(run, clips: Path, arguments: list[str], message: str):
    shown = run(clips / "good.mp4", *arguments)
    assert shown.status == 2
    assert message in " ".join(shown.err.split())
    assert shown.out == ""


def test_a_sheet_of_too_many_files_is_refused_before_they_are_decoded(run, clips: Path, tmp_path: Path):
    shown = run(*[clips / "good.mp4"] * 101, "--contact-sheet", tmp_path / "sheet.png")
    assert shown.status == 2
    assert "at most 100 files, got 101" in shown.err
    assert not (tmp_path / "sheet.png").exists()


def _sheet(run, path: Path, *arguments: object) -> np.ndarray:
    run(*arguments, "--contact-sheet", path)
    return np.asarray(Image.open(path).convert("RGB"))


def _is(picture_HWC: np.ndarray, colour: str, tolerance: int = 60) -> np.ndarray:
    wanted = np.asarray([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    distances = np.abs(picture_HWC.astype(int) - wanted).sum(axis=2)
    return np.asarray(distances <= tolerance)


def _pixel(inches: float) -> int:
    return round(inches * DPI)


def _draws_nothing_at_its_edges(picture_HWC: np.ndarray) -> bool:
    border = 6
    edges = (picture_HWC[:border], picture_HWC[-border:], picture_HWC[:, :border], picture_HWC[:, -border:])
    return all((edge == 255).all() for edge in edges)


def _thumbnails(picture_HWC: np.ndarray, num_frames: int, top: int, height: int, width: int) -> torch.Tensor:
    """What is drawn where the frames of a 12-inch row belong."""
    cell = 12.0 / num_frames
    lefts = [round((MARGIN + (i + 0.5) * cell) * DPI - width / 2) for i in range(num_frames)]
    return torch.from_numpy(
        np.stack([picture_HWC[top : top + height, left : left + width] for left in lefts])
    )


def test_the_sheet_shows_the_frames_above_the_marks_on_the_waveform(run, clips: Path, tmp_path: Path):
    picture = _sheet(run, tmp_path / "sheet.png", clips / "good.mp4")
    width, height = _pixel(12.0 / 8 * 0.95), round(12.0 / 8 * 0.95 * DPI * 96 / 160)
    assert picture.shape[1] == _pixel(12.0 + 2 * MARGIN)
    assert _draws_nothing_at_its_edges(picture)
    top = _pixel(HEADER + TITLE)
    assert read_numbers(_thumbnails(picture, 8, top, height, width)) == EIGHT_OF_50
    wave = top + height + _pixel(STAMP + LINK)
    band = picture[wave + 4 : wave + _pixel(WAVE) - 4]
    marked = np.asarray(_is(band, LIGHT.orange).all(axis=0))
    left, right = MARGIN * DPI, (MARGIN + 12.0) * DPI
    end = json.loads(run(clips / "good.mp4", "--json").out)[0]["sound_seconds"]
    places = [round(left + (right - left) * number / 25 / end) for number in EIGHT_OF_50]
    assert all(marked[place - 1 : place + 2].any() for place in places)
    runs = np.flatnonzero(np.diff(marked.astype(int)) == 1)
    assert len(runs) == 8
    loud = np.asarray(_is(band, LIGHT.blue).any(axis=0))
    assert loud[round(left) + 4 : round(right) - 40].mean() > 0.9


def test_the_sheet_shows_late_sound_late_and_turned_pictures_upright(run, clips: Path, tmp_path: Path):
    picture = _sheet(run, tmp_path / "sheet.png", clips / "turned.mov", "-k", 4)
    height = _pixel(contact_sheet._MOST_FRAME_HEIGHT)
    width = int(64 * height / 96)
    drawn = _thumbnails(picture, 4, _pixel(HEADER + TITLE), height, width)
    assert read_numbers(torch.rot90(drawn, k=1, dims=(1, 2))) == [6, 18, 31, 43]
    wave = _pixel(HEADER + TITLE + STAMP + LINK) + height
    loud = _is(picture[wave + 4 : wave + _pixel(WAVE) // 2 - 4], LIGHT.blue).any(axis=0)
    (record,) = json.loads(run(clips / "turned.mov", "--json").out)
    begin = np.flatnonzero(loud)[0] / DPI - MARGIN
    assert begin / 12.0 * record["sound_seconds"] == pytest.approx(0.5, abs=0.05)


def test_files_that_cannot_be_used_have_a_row_with_their_sentence(run, clips: Path, tmp_path: Path):
    usable = _sheet(run, tmp_path / "usable.png", clips / "good.mp4")
    assert not _is(usable[: _pixel(HEADER + TITLE)], LIGHT.rose).any()
    both = _sheet(run, tmp_path / "both.png", clips / "good.mp4", clips / "cut.mp4")
    row = both[len(usable) :]
    assert 40 < len(row) < 130
    assert _is(row, LIGHT.rose).sum() > 200
    assert _draws_nothing_at_its_edges(both)
    sound = _sheet(run, tmp_path / "sound.png", clips / "voice.m4a")
    assert _is(sound, LIGHT.rose).any()
    assert _is(sound, LIGHT.blue).sum() > 10_000
    assert _sheet(run, tmp_path / "nothing.png", tmp_path / "nowhere.mp4").shape[0] < 200


def test_many_frames_widen_the_sheet_and_few_do_not(run, clips: Path, tmp_path: Path):
    widths = [
        _sheet(run, tmp_path / "sheet.png", clips / "good.mp4", "-k", k).shape[1] for k in (1, 15, 32, 64)
    ]
    assert widths == [_pixel(inches + 2 * MARGIN) for inches in (12.0, 12.0, 25.6, 40.0)]


def test_a_directory_of_names_of_suffixes(tmp_path: Path):
    (tmp_path / "x.mp4").mkdir()
    (tmp_path / "x.mp4" / "y.wav").touch()
    (tmp_path / "dangling.mkv").symlink_to(tmp_path / "nowhere")
    assert probe.media_files([tmp_path]) == [tmp_path / "dangling.mkv", tmp_path / "x.mp4" / "y.wav"]
