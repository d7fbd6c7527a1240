"""Tower features by content: an LRU tier in memory over an optional tier of shards on disk."""

import hashlib
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from omnigrpo.media.memory_tier import MemoryTier
from omnigrpo.media.shard_store import ShardStore, Stored
from omnigrpo.schema import ClipFeatures

Tier = Literal["memory", "disk"]

DEFAULT_DISK_BUDGET_BYTES = 64 * 2**30

_NDIM = {"vision_FND": 3, "audio_AD": 2}


def feature_key(content_hash: str, recipe: str) -> str:
    """Return the cache key of a clip's features.

    Args:
        content_hash: ``DecodedClip.content_hash``: file bytes and window.
        recipe: everything else that the features depend on: frame count and policy, sizes, padding, the
            towers' hash, the modalities.
    """
    return hashlib.blake2b(f"{content_hash}\n{recipe}".encode(), digest_size=20).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """What the cache did since it was made."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    """Lookups that found nothing usable, damaged entries included."""
    damaged: int = 0
    """Entries on disk that were thrown away because their bytes were not what was written."""
    evictions: int = 0
    """Features that left the memory tier to keep its budget."""
    shard_evictions: int = 0
    """Shards that this cache removed from the disk to keep its budget."""
    refused: int = 0
    """Features that were not written because the disk's budget had no room: all its shards are being written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheHit:
    """Features that were found, and where."""

    features: ClipFeatures
    tier: Tier


class FeatureCache:
    """Maps keys to tower features; safe from many threads, and several processes may share the directory.

    The tensors are shared with later lookups: read them, do not write to them. They live on the CPU.
    """

    def __init__(
        self,
        directory: Path | None,
        memory_budget_bytes: int,
        disk_budget_bytes: int = DEFAULT_DISK_BUDGET_BYTES,
    ) -> None:
        self._lock = threading.Lock()
        self._memory = MemoryTier(memory_budget_bytes)
        self._disk = None if directory is None else ShardStore(directory, disk_budget_bytes)
        self._stats = CacheStats()

    @property
    def stats(self) -> CacheStats:
        """Counts so far."""
        with self._lock:
            evicted = self._disk.num_evicted if self._disk is not None else 0
            return replace(self._stats, shard_evictions=evicted)

    @property
    def memory_bytes(self) -> int:
        """Bytes of features in the memory tier; never more than the budget."""
        with self._lock:
            return self._memory.num_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk, those of other processes and recipes included."""
        return self._disk.num_bytes if self._disk is not None else 0

    def get(self, key: str) -> ClipFeatures | None:
        """Return the features of ``key``, or None: then compute them and ``put`` them."""
        hit = self.find(key)
        return hit.features if hit is not None else None

    def find(self, key: str) -> CacheHit | None:
        """As ``get``, and say which tier had them."""
        _check_key(key)
        with self._lock:
            features = self._memory.get(key)
            if features is not None:
                self._count(memory_hits=1)
                return CacheHit(features=features, tier="memory")
        stored = self._read(key)
        if stored.tensors is None:
            with self._lock:
                self._count(misses=1, damaged=stored.damaged)
            return None
        features = ClipFeatures(**{name: stored.tensors.get(name) for name in _NDIM})
        with self._lock:
            self._count(disk_hits=1, damaged=stored.damaged)
            self._count(evictions=self._memory.put(key, features))
        return CacheHit(features=features, tier="disk")

    def is_kept(self, key: str) -> bool:
        """Whether features outlive this process: a sound entry on disk, which is read to be sure; no hit, no miss.

        Without a directory, whether they are in memory.
        """
        _check_key(key)
        if self._disk is None:
            with self._lock:
                return self._memory.get(key) is not None
        stored = self._read(key)
        with self._lock:
            self._count(damaged=stored.damaged)
        return stored.tensors is not None

    def put(self, key: str, features: ClipFeatures) -> None:
        """Store a copy of features under ``key``, on disk too; OSError when the disk does not take them."""
        _check_key(key)
        kept = ClipFeatures(vision_FND=_own(features.vision_FND), audio_AD=_own(features.audio_AD))
        named = {name: getattr(kept, name) for name in _NDIM}
        tensors: dict[str, Tensor] = {name: tensor for name, tensor in named.items() if tensor is not None}
        if not tensors:
            raise ValueError(f"features of {key} hold neither vision nor audio; there is nothing to cache")
        for name, tensor in tensors.items():
            if tensor.ndim != _NDIM[name]:
                raise ValueError(f"{name} must have {_NDIM[name]} dimensions, got {list(tensor.shape)}")
        written = self._disk is None or self._disk.write(key, tensors)
        with self._lock:
            self._count(refused=int(not written))
            self._count(evictions=self._memory.put(key, kept))

    def close(self) -> None:
        """Let others go on with the shard that this cache was writing; a later ``put`` takes one again."""
        if self._disk is not None:
            self._disk.close()

    def _read(self, key: str) -> Stored:
        """The entry on disk; one that does not hold features counts as damaged."""
        if self._disk is None:
            return Stored(tensors=None, damaged=0)
        stored = self._disk.read(key)
        if stored.tensors is None or all(_NDIM.get(n) == t.ndim for n, t in stored.tensors.items()):
            return stored
        return Stored(tensors=None, damaged=stored.damaged + 1)

    def _count(self, **more: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()}
        )


def _check_key(key: str) -> None:
    if len(key) < 3 or not (key.isascii() and key.isalnum()):
        raise ValueError(f"a cache key is a hex digest, got {key!r}; build it with feature_key()")


def _own(tensor: Tensor | None) -> Tensor | None:
    """Copy to the CPU, so that neither a batch's storage nor the caller's later writes are kept."""
    if tensor is None:
        return None
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
