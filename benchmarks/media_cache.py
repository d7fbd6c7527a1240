"""What a clip's features cost once they are cached."""

import statistics
import tempfile
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from harness import Bench, Variant
from omnigrpo.media.feature_cache import FeatureCache, feature_key
from omnigrpo.model.config import HumanOmniConfig, tiny
from omnigrpo.schema import ClipFeatures
from report import Check
from step_job import clips_job, random_features
from step_work import Sizes

NUM_CLIPS = 64
FROM_MEMORY_MS, FROM_DISK_MS = 0.2, 5.0
"""At most, a clip."""
STEP = Sizes(prompts=4, prefix=None, samples=2, completion=4)


def measure_cache(bench: Bench, *, smoke: bool) -> None:
    """Serve the features of R1-Omni's clips from either tier, bfloat16, checksums included; one clip a run."""
    config = tiny() if smoke else HumanOmniConfig()
    num_clips = 4 if smoke else NUM_CLIPS
    keys = [feature_key(str(number), "bench_media") for number in range(num_clips)]
    with tempfile.TemporaryDirectory() as directory:
        memory, disk = FeatureCache(None, 2**40, 0), FeatureCache(Path(directory), 0, 2**40)
        try:
            features = [_bfloat16(random_features(config)) for _ in keys]
            for key, of_clip in zip(keys, features, strict=True):
                memory.put(key, of_clip)
                disk.put(key, of_clip)
            variants = [
                Variant(name="memory", run=partial(_serve, memory, cycle(keys))),
                Variant(name="disk", run=partial(_serve, disk, cycle(keys))),
            ]
            timings = bench.compare(_section(features[0]), variants)
        finally:
            memory.close()
            disk.close()
    for name, limit in (("memory", FROM_MEMORY_MS), ("disk", FROM_DISK_MS)):
        median = 1e3 * statistics.median(timings[name].seconds)
        bench.checks.append(Check.at_most(f"ms to serve a clip from {name}", median, limit))


def measure_cached_step(bench: Bench) -> None:
    """Count the clips that a whole GRPO step decodes when all of its clips are cached."""
    with tempfile.TemporaryDirectory() as directory:
        job = clips_job(Path(directory), STEP, torch.device("cpu"))
        source = job.trainer.sampler.source
        before = source.num_decoded
        job.trainer.step()
        bench.checks += [
            Check.at_least("clips decoded to fill the cache", before, STEP.prompts),
            Check.at_most("clips decoded by a step over cached clips", source.num_decoded - before, 0),
        ]
        source.close()


def _serve(cache: FeatureCache, keys: "cycle[str]") -> ClipFeatures:
    hit = cache.find(next(keys))
    assert hit is not None, "the clip was put before"
    return hit.features


def _bfloat16(features: ClipFeatures) -> ClipFeatures:
    assert features.vision_FND is not None
    assert features.audio_AD is not None
    return ClipFeatures(
        vision_FND=features.vision_FND.to(torch.bfloat16), audio_AD=features.audio_AD.to(torch.bfloat16)
    )


def _section(features: ClipFeatures) -> str:
    assert features.vision_FND is not None
    assert features.audio_AD is not None
    mib = (features.vision_FND.nbytes + features.audio_AD.nbytes) / 2**20
    return f"features of one clip, {mib:.1f} MiB, from the cache"
