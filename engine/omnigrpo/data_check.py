"""What is wrong with datasets before a run finds out: missing clips, duplicates across splits, odd labels."""

import hashlib
import itertools
import os
import statistics
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.data.dataset_files import read_items
from omnigrpo.media.decode import DEFAULT_TIMEOUT_SECONDS
from omnigrpo.media.probe import ClipProbe, ProbedClip, probe_each
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, ClipStatus, Modality, Prompt

_CHUNK = 1 << 20

Key = tuple[object, ...]
"""What two uses of the same clip share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCheck:
    """One dataset file."""

    file: Path
    num_items: int
    labels: dict[str, int]
    """Items of each label, most frequent first."""
    absent: tuple[str, ...]
    """Labels of the set that was asked for without any item; no fault."""
    missing: tuple[Path, ...]
    """Clips that are not there."""
    repeated: tuple[Path, ...]
    """Clips that were there before in the file, once for every time, as it names them."""
    unusable: tuple[str, ...] = ()
    """With probing: a sentence about each other clip that cannot be used."""
    seconds: tuple[float, ...] = ()
    """With probing: duration of every clip that says one."""

    @property
    def median_seconds(self) -> float | None:
        """Median duration; None without any."""
        return statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """Clips that two files share."""

    first: Path
    second: Path
    clips: tuple[Path, ...]
    """As the second file names them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataCheck:
    """What was found in some files."""

    splits: tuple[SplitCheck, ...]
    overlaps: tuple[Overlap, ...]
    unknown_labels: tuple[str, ...]
    """For every label outside the set that was asked for its first item, e.g. ``a.json, item 3: 'bored' (2 items)``."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is missing, repeated, shared, unusable or unknown."""
        faults = (s.missing or s.repeated or s.unusable for s in self.splits)
        return not (any(faults) or self.overlaps or self.unknown_labels)


def check_datasets(
    files: Sequence[Path],
    *,
    labels: Sequence[str] | None = None,
    media_root: Path | None = None,
    by_content: bool = False,
    probe: bool = False,
    num_workers: int | None = None,
    on_probe: Callable[[int, int], None] | None = None,
) -> DataCheck:
    """Check files with each other.

    Args:
        files: datasets in any form that ``read_dataset`` takes.
        labels: what a solution may be; None allows everything.
        media_root: as in a run.
        by_content: clips are the same when their bytes are, not only when their paths are.
        probe: decode every clip as a run would, for durations and for what cannot be used.
        num_workers: threads that probe; one per core by default.
        on_probe: called with (clips probed, clips in total) after each clip, from the thread that decoded it.

    Windows of one clip that differ are different clips, whether or not they overlap.

    Raises DatasetError for a file that cannot be read, ValueError for one that is named twice.
    """
    twice = next((file for file, count in Counter(f.resolve() for f in files).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice: every clip of it would count as a duplicate")
    prompts = {file: read_dataset(file, PromptStyle(), media_root=media_root) for file in files}
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    key = _key_by(by_content)
    keys = {file: [key(prompt.clip) for prompt in of_file] for file, of_file in prompts.items()}
    needs = {file: _needed(of_file) if probe else {} for file, of_file in prompts.items()}
    count = _counter(sum(map(len, needs.values())), on_probe)
    return DataCheck(
        splits=tuple(
            _split(file, prompts[file], keys[file], labels or (), _probed(needs[file], workers, count))
            for file in files
        ),
        overlaps=_overlaps(prompts, keys),
        unknown_labels=tuple(line for file in files for line in _unknown(file, prompts[file], labels)),
    )


def _split(
    file: Path,
    prompts: Sequence[Prompt],
    keys: Sequence[Key],
    labels: Sequence[str],
    probes: Sequence[ClipProbe],
) -> SplitCheck:
    seen: set[Key] = set()
    repeated: list[Path] = []
    for prompt, key in zip(prompts, keys, strict=True):
        if key in seen:
            repeated.append(prompt.clip.path)
        seen.add(key)
    counts = Counter(prompt.solution for prompt in prompts)
    return SplitCheck(
        file=file,
        num_items=len(prompts),
        labels=dict(counts.most_common()),
        absent=tuple(label for label in labels if label not in counts),
        missing=tuple(sorted({p.clip.path for p in prompts if not p.clip.path.is_file()})),
        repeated=tuple(sorted(repeated)),
        unusable=tuple(f"{p.clip.path} {p.reason}" for p in probes if p.status is not ClipStatus.OK),
        seconds=tuple(p.duration_seconds for p in probes if p.duration_seconds is not None),
    )


def _unknown(file: Path, prompts: Sequence[Prompt], labels: Sequence[str] | None) -> list[str]:
    """One line for each label outside the set."""
    if labels is None or all(prompt.solution in labels for prompt in prompts):
        return []
    places: dict[str, list[str]] = defaultdict(list)
    for item, prompt in zip(read_items(file), prompts, strict=True):
        if prompt.solution not in labels:
            places[prompt.solution].append(item.where)
    return [
        f"{where[0]}: {label!r} ({len(where)} item{'s' if len(where) > 1 else ''})"
        for label, where in places.items()
    ]


def _needed(prompts: Sequence[Prompt]) -> dict[Clip, tuple[Modality, ...]]:
    """Every clip that is there, and what its prompts ask of it."""
    asked: dict[Clip, set[Modality]] = defaultdict(set)
    for prompt in prompts:
        if prompt.clip.path.is_file():
            asked[prompt.clip].update(prompt.modalities)
    return {clip: tuple(m for m in get_args(Modality) if m in wanted) for clip, wanted in asked.items()}


def _counter(total: int, on_probe: Callable[[int, int], None] | None) -> Callable[[], None]:
    done, lock = itertools.count(1), threading.Lock()

    def count() -> None:
        if on_probe is not None:
            with lock:
                on_probe(next(done), total)

    return count


def _probed(
    needs: Mapping[Clip, tuple[Modality, ...]], num_workers: int, count: Callable[[], None]
) -> list[ClipProbe]:
    def facts(probed: ProbedClip) -> ClipProbe:
        count()
        return probed.probe

    return [
        probe
        for modalities in dict.fromkeys(needs.values())
        for probe in probe_each(
            [clip for clip, wanted in needs.items() if wanted == modalities],
            modalities,
            SamplingConfig(),
            facts,
            num_workers=num_workers,
            timeout_seconds=DEFAULT_TIMEOUT_SECONDS,
        )
    ]


def _key_by(by_content: bool) -> Callable[[Clip], Key]:
    """What makes two clips the same: path and window, or bytes and window."""
    hashes: dict[Path, str] = {}

    def key(clip: Clip) -> Key:
        path = clip.path.resolve()
        if not by_content or not path.is_file():
            return path, clip.start_seconds, clip.end_seconds
        if path not in hashes:
            hashes[path] = _content_hash(path)
        return hashes[path], clip.start_seconds, clip.end_seconds

    return key


def _overlaps(
    prompts: Mapping[Path, Sequence[Prompt]], keys: Mapping[Path, Sequence[Key]]
) -> tuple[Overlap, ...]:
    paths = {
        file: {key: prompt.clip.path for key, prompt in zip(keys[file], of_file, strict=True)}
        for file, of_file in prompts.items()
    }
    files = list(prompts)
    found: list[Overlap] = []
    for index, first in enumerate(files):
        for second in files[index + 1 :]:
            shared = sorted(paths[second][key] for key in paths[first].keys() & paths[second].keys())
            if shared:
                found.append(Overlap(first=first, second=second, clips=tuple(shared)))
    return tuple(found)


def _content_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
