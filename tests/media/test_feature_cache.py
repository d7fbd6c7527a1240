"""The feature cache: what was put comes back bit for bit, or not at all."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from omnigrpo.media.feature_cache import CacheStats, FeatureCache, feature_key
from omnigrpo.schema import ClipFeatures

MIB = 1 << 20


def _features(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> ClipFeatures:
    generator = torch.Generator().manual_seed(seed)
    return ClipFeatures(
        vision_FND=torch.randn(4, 9, 16, generator=generator).to(dtype),
        audio_AD=torch.randn(20, 32, generator=generator).to(dtype),
    )


def _same(ours: ClipFeatures | None, expected: ClipFeatures) -> bool:
    return (
        ours is not None
        and _same_tensor(ours.vision_FND, expected.vision_FND)
        and _same_tensor(ours.audio_AD, expected.audio_AD)
    )


def _same_tensor(ours: torch.Tensor | None, expected: torch.Tensor | None) -> bool:
    if ours is None or expected is None:
        return ours is expected
    return ours.dtype == expected.dtype and torch.equal(ours, expected)


KEY = feature_key("content", "recipe")
NUM_BYTES = (4 * 9 * 16 + 20 * 32) * 2
"""Of one ``_features()`` in bfloat16."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_through_memory_and_disk(tmp_path: Path, dtype: torch.dtype):
    cache = FeatureCache(tmp_path, MIB)
    assert cache.get(KEY) is None
    cache.put(KEY, _features(dtype=dtype))
    assert _same(cache.get(KEY), _features(dtype=dtype))
    restarted = FeatureCache(tmp_path, MIB)
    assert _same(restarted.get(KEY), _features(dtype=dtype))
    assert _same(restarted.get(KEY), _features(dtype=dtype))
    assert cache.stats == CacheStats(memory_hits=1, misses=1)
    assert restarted.stats == CacheStats(memory_hits=1, disk_hits=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


@pytest.mark.parametrize("absent", ["vision_FND", "audio_AD"])
def test_one_modality_alone(tmp_path: Path, absent: str):
    whole = _features()
    kept = {n: getattr(whole, n) for n in ("vision_FND", "audio_AD") if n != absent}
    part = ClipFeatures(**{absent: None}, **kept)
    FeatureCache(tmp_path, 0).put(KEY, part)
    assert _same(FeatureCache(tmp_path, 0).get(KEY), part)


def test_a_cache_without_a_directory_lives_in_memory(tmp_path: Path):
    cache = FeatureCache(None, MIB)
    cache.put(KEY, _features())
    assert _same(cache.get(KEY), _features())
    assert FeatureCache(None, MIB).get(KEY) is None


def test_a_hit_says_which_tier_it_came_from(tmp_path: Path):
    FeatureCache(tmp_path, MIB).put(KEY, _features())
    cache = FeatureCache(tmp_path, MIB)
    hits = [cache.find(KEY) for _ in range(2)]
    assert [hit.tier if hit is not None else None for hit in hits] == ["disk", "memory"]


def test_what_is_kept_is_on_disk_where_there_is_one(tmp_path: Path):
    cache, in_memory = FeatureCache(tmp_path, MIB), FeatureCache(None, MIB)
    for each in (cache, in_memory):
        assert not each.is_kept(KEY)
        each.put(KEY, _features())
        assert each.is_kept(KEY)
        assert each.stats == CacheStats()
    for path in tmp_path.iterdir():
        path.unlink()
    assert not cache.is_kept(KEY)
    assert cache.get(KEY) is not None


def test_keys_tell_contents_and_recipes_apart():
    keys = {feature_key("a", "b"), feature_key("a", "c"), feature_key("b", "b"), feature_key("ab", "")}
    assert len(keys) == 4
    assert feature_key("a", "b") == feature_key("a", "b")


def test_memory_keeps_the_youngest_within_its_budget():
    cache = FeatureCache(None, 3 * NUM_BYTES)
    keys = [feature_key(str(n), "recipe") for n in range(4)]
    for n, key in enumerate(keys[:3]):
        cache.put(key, _features(n))
    cache.get(keys[0])
    cache.put(keys[3], _features(3))
    assert cache.get(keys[1]) is None
    assert all(_same(cache.get(keys[n]), _features(n)) for n in (0, 2, 3))
    assert cache.memory_bytes == 3 * NUM_BYTES
    assert cache.stats.evictions == 1


def test_replacing_an_entry_counts_its_bytes_once_and_what_is_too_large_stays_out():
    cache = FeatureCache(None, NUM_BYTES)
    cache.put(KEY, _features(0))
    cache.put(KEY, _features(1))
    assert cache.memory_bytes == NUM_BYTES
    assert _same(cache.get(KEY), _features(1))
    large = ClipFeatures(vision_FND=torch.zeros(100, 10, 100), audio_AD=None)
    cache.put(feature_key("large", "recipe"), large)
    assert cache.get(feature_key("large", "recipe")) is None
    assert _same(cache.get(KEY), _features(1))


def test_what_is_kept_is_a_copy_that_does_not_hold_the_batch():
    batch = torch.ones(64, 4, 9, 16)
    cache = FeatureCache(None, MIB)
    cache.put(KEY, ClipFeatures(vision_FND=batch[3], audio_AD=None))
    batch.zero_()
    features = cache.get(KEY)
    assert features is not None
    kept = features.vision_FND
    assert kept is not None
    assert (kept == 1).all()
    assert kept.untyped_storage().nbytes() == kept.nbytes
    assert not kept.requires_grad


def test_many_threads_on_few_entries(tmp_path: Path):
    cache = FeatureCache(tmp_path, 3 * NUM_BYTES)
    expected = [_features(n) for n in range(8)]

    def work(turn: int) -> bool:
        n = turn * 7 % 8
        key = feature_key(str(n), "recipe")
        found = cache.get(key)
        if found is None:
            cache.put(key, expected[n])
            return True
        return _same(found, expected[n])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))
    stats = cache.stats
    assert stats.memory_hits + stats.disk_hits + stats.misses == 400
    assert stats.damaged == 0
    assert cache.memory_bytes <= 3 * NUM_BYTES


def test_what_cannot_be_cached_is_refused(tmp_path: Path):
    cache = FeatureCache(tmp_path, MIB)
    with pytest.raises(ValueError, match="neither vision nor audio"):
        cache.put(KEY, ClipFeatures(vision_FND=None, audio_AD=None))
    with pytest.raises(ValueError, match="vision_FND must have 3 dimensions, got"):
        cache.put(KEY, ClipFeatures(vision_FND=torch.zeros(2, 3), audio_AD=None))
    with pytest.raises(ValueError, match=r"a cache key is a hex digest, got '\.\./escape'"):
        cache.put("../escape", _features())
    with pytest.raises(ValueError, match=r"vision_FND is torch\.int64; features are one of"):
        cache.put(KEY, ClipFeatures(vision_FND=torch.zeros(2, 3, 4, dtype=torch.int64), audio_AD=None))
    with pytest.raises(ValueError, match="memory_budget_bytes must not be negative, got -1"):
        FeatureCache(None, -1)
    with pytest.raises(ValueError, match="disk_budget_bytes must not be negative, got -1"):
        FeatureCache(tmp_path, 0, -1)
    assert cache.stats == CacheStats()
