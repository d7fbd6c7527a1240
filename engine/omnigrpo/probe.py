"""`omnigrpo probe`: what files hold, what a run would take from them, and which it cannot use."""

import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar, get_args

from rich.console import Console

from omnigrpo.media.media_files import media_files
from omnigrpo.media.probe import ClipProbe, ProbedClip, probe_each
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.probe_table import printable, probe_table
from omnigrpo.progress import reporting
from omnigrpo.schema import Clip, ClipStatus, Modality

R = TypeVar("R")

_PIPE_COLUMNS = 120
"""Width of a table that goes to no terminal."""
_SHOW_PROGRESS_FROM = 20
"""Files from which a bar tells how far it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeConfig:
    """What is asked of the files, and how the answer is given."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    needed: tuple[Modality, ...] = ("video", "audio")
    """What every file must have."""
    start_seconds: float | None = None
    """The same window for every file."""
    end_seconds: float | None = None
    timeout_seconds: float = 60.0
    """Per file."""
    is_json: bool = False
    contact_sheet: Path | None = None
    """Where a picture of all files is written."""

    def __post_init__(self) -> None:
        start, end = self.start_seconds or 0.0, self.end_seconds
        if start < 0:
            raise ValueError(f"--start must be at least 0 seconds, got {start:g}")
        if end is not None and end <= start:
            raise ValueError(f"--end must lie behind --start, got {end:g} s and {start:g} s")
        if self.timeout_seconds <= 0:
            raise ValueError(f"--timeout must be positive, got {self.timeout_seconds:g}")


def run_probe(paths: Sequence[Path], config: ProbeConfig) -> bool:
    """Probe files and those in directories, print them, draw them if asked to; whether all can be used."""
    clips = [
        Clip(path=path, start_seconds=config.start_seconds, end_seconds=config.end_seconds)
        for path in media_files(paths)
    ]
    probes = (
        _probe(clips, config, _facts)
        if config.contact_sheet is None
        else _draw(clips, config, config.contact_sheet)
    )
    if config.is_json:
        print(as_json(probes))
    else:
        console = _console()
        console.print(probe_table(probes, console.width))
        console.print(summary(probes), highlight=False)
        if config.contact_sheet is not None:
            console.print(
                f"wrote {printable(config.contact_sheet)}", highlight=False, markup=False, soft_wrap=True
            )
    return all(probe.is_usable for probe in probes)


def _facts(probed: ProbedClip) -> ClipProbe:
    return probed.probe


def _draw(clips: Sequence[Clip], config: ProbeConfig, path: Path) -> list[ClipProbe]:
    """Probe and write the contact sheet; matplotlib is loaded for it alone."""
    from omnigrpo.contact_sheet import check_sheet, sheet_row, write_contact_sheet

    check_sheet(path, len(clips), config.sampling.num_frames)
    rows = _probe(clips, config, sheet_row)
    write_contact_sheet(rows, path)
    return [row.probe for row in rows]


def modalities(names: Sequence[str]) -> tuple[Modality, ...]:
    """Names as given on the command line, in the usual order; ValueError for others."""
    known = get_args(Modality)
    for name in names:
        if name not in known:
            raise ValueError(f"--need takes {' or '.join(known)}, got {name!r}")
    return tuple(modality for modality in known if modality in names)


def as_json(probes: Sequence[ClipProbe]) -> str:
    """A list with an object per file: its path, its window, and the fields of ``ClipProbe``."""
    records = []
    for probe in probes:
        fields = asdict(probe)
        clip = fields.pop("clip")
        records.append({"path": str(clip.pop("path")), **clip, **fields})
    return json.dumps(records, indent=2)


def summary(probes: Sequence[ClipProbe]) -> str:
    """One line: how many can be used, and why others cannot."""
    statuses = Counter(probe.status for probe in probes)
    num_usable = statuses.pop(ClipStatus.OK, 0)
    files = "file" if len(probes) == 1 else "files"
    line = f"{num_usable} of {len(probes)} {files} can be used"
    return line + (
        ": " + ", ".join(f"{n} {status}" for status, n in statuses.most_common()) if statuses else ""
    )


def _probe(clips: Sequence[Clip], config: ProbeConfig, then: Callable[[ProbedClip], R]) -> list[R]:
    """On all cores; with a bar on stderr where there are many files."""

    def probe(then: Callable[[ProbedClip], R]) -> list[R]:
        return probe_each(
            clips,
            config.needed,
            config.sampling,
            then,
            num_workers=len(os.sched_getaffinity(0)),
            timeout_seconds=config.timeout_seconds,
        )

    if len(clips) < _SHOW_PROGRESS_FROM:
        return probe(then)
    statuses, lock = Counter[ClipStatus](), threading.Lock()
    with reporting("probe", len(clips), console=Console(stderr=True)) as show:

        def counted(probed: ProbedClip) -> R:
            result = then(probed)
            with lock:
                statuses[probed.probe.status] += 1
                show(statuses.total(), f"{statuses.total() - statuses[ClipStatus.OK]} cannot be used")
            return result

        return probe(counted)


def _console() -> Console:
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        return Console(width=_PIPE_COLUMNS)
    return console
