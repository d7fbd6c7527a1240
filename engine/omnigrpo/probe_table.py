"""Probed files as a table, and the words for what was found."""

import os.path
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from omnigrpo.media.probe import AudioFacts, ClipProbe, VideoFacts

_MOST_COLUMNS = 140
"""Beyond it rows are hard to follow."""
_MOST_TIMES = 8
"""Frames of which every time stamp is shown; of more the first and the last ones."""
_SHOWN_AT_THE_START = 5


def probe_table(probes: Sequence[ClipProbe], columns: int) -> Table:
    """A row per file, as wide as the terminal's columns, from 60 on."""
    directory = common_directory([probe.clip.path for probe in probes])
    table = Table(
        box=box.HORIZONTALS,
        show_lines=True,
        pad_edge=False,
        width=min(columns, _MOST_COLUMNS),
        title=None if directory is None else Text(f"in {printable(directory)}"),
        title_justify="left",
    )
    table.add_column("file", overflow="fold", ratio=20)
    table.add_column("container", width=9)
    table.add_column("streams", ratio=22)
    table.add_column("what is taken, or why not", overflow="fold", ratio=32)
    for probe in probes:
        path = probe.clip.path
        table.add_row(
            Text(printable(path if directory is None else path.relative_to(directory))),
            Text(f"{probe.container or '-'}\n{length_words(probe)}"),
            Text("\n".join(stream_words(probe) or ["-"])),
            _outcome(probe),
        )
    return table


def common_directory(paths: Sequence[Path]) -> Path | None:
    """The directory that all paths begin with, as they were given; None when that is the working directory."""
    parents = {path.parent for path in paths}
    if len({parent.is_absolute() for parent in parents}) != 1:
        return None
    common = Path(os.path.commonpath(parents))
    return None if common in (Path(), Path("/")) else common


def _outcome(probe: ClipProbe) -> Text:
    style = "green" if probe.is_usable else "bold red"
    return Text.assemble((str(probe.status), style), "\n", outcome_words(probe))


def printable(text: str | Path) -> str:
    """The text with what no terminal shows, or a file name's broken encoding, written as escapes."""
    readable = str(text).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in readable)


def length_words(probe: ClipProbe) -> str:
    """E.g. ``10.0 s``; nothing when the length is unknown."""
    seconds = probe.duration_seconds
    return "" if seconds is None else f"{seconds:.{1 if seconds >= 1 else 3}f} s"


def stream_words(probe: ClipProbe) -> list[str]:
    """A line per stream; none when the file is not media."""
    if probe.container is None:
        return []
    return [
        "no video" if probe.video is None else video_words(probe.video),
        "no audio" if probe.audio is None else audio_words(probe.audio),
    ]


def video_words(video: VideoFacts) -> str:
    """E.g. ``h264 1280x720 29.97 fps, 300 frames, turned 90°``."""
    size = f" {video.width}x{video.height}" if video.width else ""
    rate = "" if video.frames_per_second is None else f" {_short(video.frames_per_second)} fps"
    count = "" if video.num_frames is None else f", {_count(video.num_frames, 'frame')}"
    turn = f", turned {video.rotation_degrees}°" if video.rotation_degrees else ""
    return f"{video.codec}{size}{rate}{count}{turn}"


def audio_words(audio: AudioFacts) -> str:
    """E.g. ``aac 44.1 kHz stereo``."""
    rate = f" {_short(audio.sample_rate_hz / 1000)} kHz" if audio.sample_rate_hz else ""
    return f"{audio.codec}{rate} {audio.layout}"


def reason_words(probe: ClipProbe) -> str:
    """Why a clip cannot be used, to be read behind its status; nothing when it can."""
    return printable((probe.reason or "").removeprefix(f"is {probe.status}: "))


def outcome_words(probe: ClipProbe) -> str:
    """What is taken of a clip that can be used, or why it cannot."""
    if not probe.is_usable:
        return reason_words(probe)
    return "\n".join([*_frame_words(probe), *_sound_words(probe)]) or "-"


def _frame_words(probe: ClipProbe) -> list[str]:
    if probe.frames is None or probe.num_decoded is None:
        return []
    seconds, total = probe.frames.seconds, probe.frames.num_pictures
    shown = [f"{at:.2f}" for at in seconds]
    if len(seconds) > _MOST_TIMES:
        shown[_SHOWN_AT_THE_START:-1] = ["…"]
    different = len(set(seconds))
    repeated = "" if different == len(seconds) else f" ({different} different)"
    if probe.is_sparse:
        cost = f"{probe.num_decoded} of {total} pictures decoded"
    else:
        cost = f"{_count(probe.num_decoded, 'picture')} decoded, to count {total}"
    return [f"{_count(len(seconds), 'frame')}{repeated} at {' '.join(shown)} s", cost]


def _sound_words(probe: ClipProbe) -> list[str]:
    return [] if probe.sound_seconds is None else [f"{probe.sound_seconds:.2f} s of sound"]


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
