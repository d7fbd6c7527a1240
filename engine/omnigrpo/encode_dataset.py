"""`omnigrpo encode`: fills the feature cache ahead of a run, and goes on where it was interrupted."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from omnigrpo.config import ConfigError, RunConfig
from omnigrpo.data.dataset import read_dataset
from omnigrpo.feature_source import EncodedClips, FeatureSource, LoadedClips, request_of
from omnigrpo.media.prefetch import PrefetchQueue
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.progress import Report, reporting
from omnigrpo.run import open_parts
from omnigrpo.schema import ClipStatus, DecodedClip, Prompt

CLIPS_PER_WORKER = 2
"""Clips of a batch per decoding thread: what a kill costs, and what the threads wait for at its end."""
BATCHES_AHEAD = 2
REASONS_PER_STATUS = 3


@dataclass(kw_only=True, slots=True)
class EncodeSummary:
    """What became of the clips of a dataset; prompts that ask the same of a clip count once."""

    total: int
    cached: int = 0
    """Were in the cache, whole."""
    encoded: int = 0
    unusable: Counter[ClipStatus] = field(default_factory=Counter)
    reasons: dict[ClipStatus, list[str]] = field(default_factory=dict)
    """The first sentences of each status; they name the file."""
    seconds: float = 0.0
    """Time spent on clips that were not cached."""

    @property
    def done(self) -> int:
        """Clips that need no more work."""
        return self.cached + self.encoded + self.unusable.total()

    @property
    def clips_per_second(self) -> float:
        """Of those that were not cached."""
        return (self.encoded + self.unusable.total()) / self.seconds if self.seconds else 0.0

    def figures(self) -> str:
        """One line, e.g. ``12 encoded, 88 cached, 1 unusable, 3.10 clips/s``."""
        parts = [f"{self.encoded} encoded", f"{self.cached} cached", f"{self.unusable.total()} unusable"]
        if self.seconds:
            parts.append(f"{self.clips_per_second:.2f} clips/s")
        return ", ".join(parts)

    def lines(self) -> list[str]:
        """The summary as text: the figures, and what was wrong with the rest."""
        lines = [f"{self.total} clips: {self.figures()}"]
        for status, count in sorted(self.unusable.items()):
            lines.append(f"  {count} {status}:")
            lines += [f"    {reason}" for reason in self.reasons[status]]
            if count > len(self.reasons[status]):
                lines.append(f"    and {count - len(self.reasons[status])} more")
        return lines


def encode_dataset(config: RunConfig) -> EncodeSummary:
    """Decode and encode every clip of ``config.data.train`` that the cache on disk does not hold.

    A run with the same media settings and the same towers in the same dtype then decodes none of them. Raises
    ConfigError when there is no cache directory, or the features do not fit into the disk's budget.
    """
    if config.media.cache_directory is None:
        raise ConfigError("there is no cache to fill: give --cache DIRECTORY, or set media.cache_directory")
    prompts = read_dataset(config.data.train, config.data.style, media_root=config.data.media_root)
    wanted = list({request_of(prompt): prompt for prompt in prompts if prompt.modalities}.values())
    with open_parts(config, None) as parts, reporting("encode", len(wanted)) as report:
        _check_budget(config, parts.loaded.model, wanted)
        features = parts.source.features
        summary = EncodeSummary(total=len(wanted))
        missing = _missing(features, wanted, summary, report, num_threads=config.media.num_workers)
        _encode(features, missing, summary, report, batch_size=CLIPS_PER_WORKER * config.media.num_workers)
        _check_kept(config, features, wanted, summary)
    return summary


def _missing(
    features: FeatureSource,
    prompts: Sequence[Prompt],
    summary: EncodeSummary,
    report: Report,
    *,
    num_threads: int,
) -> list[Prompt]:
    """The prompts whose features the disk does not hold; reads every file and every entry once."""

    def is_kept(prompt: Prompt) -> bool:
        key = features.key_of(prompt)
        return key is not None and features.cache.is_kept(key)

    missing: list[Prompt] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for prompt, kept in zip(prompts, pool.map(is_kept, prompts), strict=True):
            if kept:
                summary.cached += 1
                report(summary.done, summary.figures())
            else:
                missing.append(prompt)
    return missing


def _encode(
    features: FeatureSource,
    prompts: Sequence[Prompt],
    summary: EncodeSummary,
    report: Report,
    *,
    batch_size: int,
) -> None:
    """Decode some clips while the towers run over the ones before them; each batch is on disk before the next."""

    def load(position: int) -> LoadedClips:
        return features.load(prompts[position * batch_size : (position + 1) * batch_size])

    started = time.perf_counter()
    queue = PrefetchQueue(load, features.encode, depth=BATCHES_AHEAD)
    try:
        for position in range(math.ceil(len(prompts) / batch_size)):
            _count(summary, queue.get(position))
            summary.seconds = time.perf_counter() - started
            report(summary.done, summary.figures())
    finally:
        features.stop()
        queue.close()


def _count(summary: EncodeSummary, clips: EncodedClips) -> None:
    for result in clips.results.values():
        if not isinstance(result, DecodedClip):
            summary.encoded += 1
            continue
        summary.unusable[result.status] += 1
        reasons = summary.reasons.setdefault(result.status, [])
        if len(reasons) < REASONS_PER_STATUS:
            reasons.append(result.error or result.status)


def _check_budget(config: RunConfig, model: HumanOmni, prompts: Sequence[Prompt]) -> None:
    """Refuse, before any clip is decoded, a dataset whose features would evict each other."""
    needed, budget = _feature_mib(model, prompts), config.media.cache_disk_budget_mib
    least = needed + needed // 8 + 1  # Shards have headers, and are seldom filled to the last byte.
    if least > budget:
        raise ConfigError(
            f"the features of {len(prompts)} clips take {needed} MiB, but media.cache_disk_budget_mib is {budget}: "
            f"raise it to {least} or more"
        )


def _check_kept(
    config: RunConfig, features: FeatureSource, prompts: Sequence[Prompt], summary: EncodeSummary
) -> None:
    """Raise ConfigError if features had to leave the disk again, for want of space."""
    stats = features.cache.stats
    if not stats.refused and not stats.shard_evictions:
        return
    keys = [features.key_of(prompt) for prompt in prompts]
    kept = sum(key is not None and features.cache.is_kept(key) for key in keys)
    lost = summary.cached + summary.encoded - kept
    if lost > 0:
        raise ConfigError(
            f"{lost} of {len(prompts)} clips' features found no room in {config.media.cache_directory}, whose "
            f"budget of {config.media.cache_disk_budget_mib} MiB other entries share: raise media.cache_disk_budget_mib"
        )


def _feature_mib(model: HumanOmni, prompts: Sequence[Prompt]) -> int:
    vision, audio = model.config.vision, model.config.audio
    sizes = {
        "video": vision.num_frames * vision.grid**2 * vision.width,
        "audio": audio.num_tokens * audio.width,
    }
    numbers = sum(sizes[modality] for prompt in prompts for modality in prompt.modalities)
    return math.ceil(numbers * model.head_weight_VD.dtype.itemsize / 2**20)
