"""What is wrong with datasets before a run finds out: missing clips, duplicates across splits, odd labels."""

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnigrpo.data.dataset import PromptStyle, read_dataset
from omnigrpo.media.decode import DEFAULT_TIMEOUT_SECONDS
from omnigrpo.media.probe import ClipProbe, ProbedClip, probe_each
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, ClipStatus, Prompt

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitCheck:
    """One dataset file."""

    file: Path
    num_items: int
    labels: dict[str, int]
    """Items of each label, most frequent first."""
    missing: tuple[Path, ...]
    """Clips that are not there."""
    repeated: tuple[Path, ...]
    """Clips that occur more than once in it."""
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
    """``file: label`` for labels outside the set that was asked for."""

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
    num_workers: int = 2,
) -> DataCheck:
    """Check files with each other.

    Args:
        files: datasets in any form that ``read_dataset`` takes.
        labels: what a solution may be; None allows everything.
        media_root: as in a run.
        by_content: clips are the same when their bytes are, not only when their paths are.
        probe: decode every clip as a run would, for durations and for what cannot be used.
        num_workers: threads that probe.

    Raises DatasetError for a file that cannot be read.
    """
    prompts = {file: read_dataset(file, PromptStyle(), media_root=media_root) for file in files}
    splits = tuple(_split(file, prompts[file], probe, num_workers) for file in files)
    unknown = [
        f"{file}: {label!r} ({count} items)"
        for file, split in zip(files, splits, strict=True)
        for label, count in split.labels.items()
        if labels is not None and label not in labels
    ]
    return DataCheck(
        splits=splits, overlaps=_overlaps(prompts, by_content=by_content), unknown_labels=tuple(unknown)
    )


def _split(file: Path, prompts: Sequence[Prompt], probe: bool, num_workers: int) -> SplitCheck:
    clips = list(dict.fromkeys(prompt.clip for prompt in prompts))
    counts = Counter(prompt.clip for prompt in prompts)
    missing = tuple(sorted({clip.path for clip in clips if not clip.path.is_file()}))
    probes = _probed([clip for clip in clips if clip.path.is_file()], prompts, num_workers) if probe else []
    return SplitCheck(
        file=file,
        num_items=len(prompts),
        labels=dict(Counter(prompt.solution for prompt in prompts).most_common()),
        missing=missing,
        repeated=tuple(sorted(clip.path for clip, count in counts.items() if count > 1)),
        unusable=tuple(f"{p.clip.path} {p.reason}" for p in probes if p.status is not ClipStatus.OK),
        seconds=tuple(p.duration_seconds for p in probes if p.duration_seconds is not None),
    )


def _probed(clips: Sequence[Clip], prompts: Sequence[Prompt], num_workers: int) -> list[ClipProbe]:
    needed = {modality for prompt in prompts for modality in prompt.modalities}
    return probe_each(
        clips,
        tuple(modality for modality in ("video", "audio") if modality in needed),
        SamplingConfig(),
        _facts,
        num_workers=num_workers,
        timeout_seconds=DEFAULT_TIMEOUT_SECONDS,
    )


def _facts(probed: ProbedClip) -> ClipProbe:
    return probed.probe


def _overlaps(prompts: dict[Path, tuple[Prompt, ...]], *, by_content: bool) -> tuple[Overlap, ...]:
    hashes: dict[Path, str] = {}

    def key(clip: Clip) -> tuple[object, ...]:
        window = clip.start_seconds, clip.end_seconds
        if not by_content or not clip.path.is_file():
            return clip.path.resolve(), *window
        if clip.path not in hashes:
            hashes[clip.path] = _content_hash(clip.path)
        return hashes[clip.path], *window

    keys = {file: {key(p.clip): p.clip.path for p in items} for file, items in prompts.items()}
    files = list(prompts)
    found: list[Overlap] = []
    for index, first in enumerate(files):
        for second in files[index + 1 :]:
            shared = sorted(keys[second][k] for k in keys[first].keys() & keys[second].keys())
            if shared:
                found.append(Overlap(first=first, second=second, clips=tuple(shared)))
    return tuple(found)


def _content_hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
