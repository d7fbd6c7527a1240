"""Writes a whole dataset: .mp4 clips, R1-Omni's JSON files, and a manifest of what was made."""

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np

from omnigrpo.data.synthetic.clip import (
    FRAMES_PER_SECOND,
    SPLITS,
    Difficulty,
    Split,
    SyntheticClip,
    render_clip,
    stream,
)
from omnigrpo.data.synthetic.emotions import CELLS, LABELS, labels_with_face
from omnigrpo.data.synthetic.encode import write_mp4
from omnigrpo.data.synthetic.reasoning import HUMAN_TURN, reasoning, response, vocabulary_texts
from omnigrpo.data.synthetic.voice import SAMPLE_RATE_HZ

__all__ = ["DatasetManifest", "SyntheticConfig", "generate_dataset", "labels_of", "vocabulary_texts"]

Annotator = Literal["face", "both"]

MANIFEST = "manifest.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """What to generate; counts that are multiples of 7 give equally many clips of every emotion."""

    seed: int = 0
    num_cold_start: int = 112
    num_rl: int = 1008
    num_heldout: int = 210
    num_ood: int = 210
    annotator: Annotator = "face"
    """What the writer of the cold-start answers goes by. ``face``: a guess among the emotions of the face, so that
    imitation teaches the format and the words but is right on 4 of 7 clips only; ``both``: the true emotion. The notes
    on face and voice are true either way, and so is every other split's label."""
    size: int = 112
    """Side of the video, pixels, even."""
    difficulty: Difficulty = field(default_factory=Difficulty)

    def __post_init__(self) -> None:
        for split in SPLITS:
            if self.num_clips(split) < 0:
                raise ValueError(f"num_{split} must be at least 0, got {self.num_clips(split)}")
        if self.size < 48 or self.size % 2:
            raise ValueError(f"size must be even and at least 48 pixels (H.264 yuv420p), got {self.size}")

    def num_clips(self, split: Split) -> int:
        """Clips of one split."""
        return int(getattr(self, f"num_{split}"))


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetManifest:
    """A generated dataset on disk."""

    directory: Path
    config: SyntheticConfig
    reused: bool
    """True when the directory already held exactly this dataset and nothing was rendered."""

    def json_path(self, split: Split) -> Path:
        """The R1-Omni file of one split: ``cold_start`` has reasoning, the others bare labels."""
        return self.directory / f"{split}.json"

    @property
    def attributes_path(self) -> Path:
        """JSON: per clip path its label, face, voice and the attributes behind them."""
        return self.directory / "attributes.json"


def labels_of(config: SyntheticConfig, split: Split) -> tuple[str, ...]:
    """The label of each clip of a split: as balanced as the count allows, in a random order."""
    count = config.num_clips(split)
    order = np.random.default_rng([config.seed, SPLITS.index(split)]).permutation(count)
    return tuple(LABELS[position % len(LABELS)] for position in order)


def generate_dataset(
    directory: Path,
    config: SyntheticConfig,
    *,
    num_workers: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetManifest:
    """Render every clip and write the JSON files; an equal dataset already there is reused.

    Args:
        directory: created if missing.
        config: what to make; equal configs give equal frames, samples and texts.
        num_workers: processes; one per core by default, 0 renders in this process.
        on_progress: called with (clips done, clips in total).

    Raises:
        ValueError: the directory holds a dataset of another configuration.
    """
    if _holds(directory, config):
        return DatasetManifest(directory=directory, config=config, reused=True)
    for split in SPLITS:
        (directory / "clips" / split).mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(split=split, index=index, label=label)
        for split in SPLITS
        for index, label in enumerate(labels_of(config, split))
    ]
    items: dict[Split, list[dict[str, object]]] = {split: [] for split in SPLITS}
    attributes: dict[str, dict[str, str | float]] = {}
    for done, (job, made) in enumerate(_run(directory, config, jobs, num_workers), start=1):
        items[job.split].append(made.item)
        attributes[job.relative_path] = made.attributes
        if on_progress is not None:
            on_progress(done, len(jobs))
    manifest = DatasetManifest(directory=directory, config=config, reused=False)
    for split in SPLITS:
        _write_json(manifest.json_path(split), items[split])
    _write_json(manifest.attributes_path, attributes)
    _write_json(directory / MANIFEST, _fingerprint(config))
    return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    split: Split
    index: int
    label: str

    @property
    def relative_path(self) -> str:
        return f"clips/{self.split}/{self.index:05d}.mp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Made:
    item: dict[str, object]
    attributes: dict[str, str | float]


def _run(
    directory: Path, config: SyntheticConfig, jobs: list[_Job], num_workers: int | None
) -> Iterator[tuple[_Job, _Made]]:
    work = partial(_make, directory, config)
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    if workers == 0:
        yield from zip(jobs, map(work, jobs), strict=True)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from zip(jobs, pool.map(work, jobs, chunksize=16), strict=True)


def _make(directory: Path, config: SyntheticConfig, job: _Job) -> _Made:
    clip = render_clip(
        job.label,
        seed=config.seed,
        split=job.split,
        index=job.index,
        difficulty=config.difficulty,
        size=config.size,
    )
    write_mp4(
        directory / job.relative_path,
        clip.face.frames_FHWC,
        clip.voice.waveform,
        frames_per_second=FRAMES_PER_SECOND,
        sample_rate_hz=SAMPLE_RATE_HZ,
    )
    face, voice = CELLS[job.label]
    rounded = {name: round(value, 4) for name, value in clip.attributes().items()}
    return _Made(
        item={
            "video": job.relative_path,
            "conversations": [
                {"from": "human", "value": HUMAN_TURN},
                {"from": "gpt", "value": _answer(config, job, clip)},
            ],
        },
        attributes={"label": job.label, "face": face.value, "voice": voice.value} | rounded,
    )


def _answer(config: SyntheticConfig, job: _Job, clip: SyntheticClip) -> str:
    if job.split != "cold_start":
        return job.label
    rng = stream(config.seed, job.split, job.index, "text")
    concluded = job.label if config.annotator == "both" else str(rng.choice(labels_with_face(job.label)))
    return response(reasoning(clip.face.expression, clip.voice.prosody, concluded, rng), concluded)


def _fingerprint(config: SyntheticConfig) -> dict[str, object]:
    return {"format_version": _FORMAT_VERSION, "config": asdict(config)}


def _holds(directory: Path, config: SyntheticConfig) -> bool:
    path = directory / MANIFEST
    if not path.exists():
        return False
    if json.loads(path.read_text(encoding="utf-8")) == _fingerprint(config):
        return True
    raise ValueError(
        f"{directory} holds a dataset of another configuration (see {path}); "
        "give another directory or remove this one"
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
