"""Tower features by content: an LRU tier in memory over an optional tier of safetensors files on disk."""

import hashlib
import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from omnigrpo.schema import ClipFeatures

_NDIM = {"vision_FND": 3, "audio_AD": 2}
_FORMAT = "1"


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


class FeatureCache:
    """Maps keys to tower features; safe from many threads, and several processes may share the directory.

    The tensors are shared with later lookups: read them, do not write to them. They live on the CPU.
    """

    def __init__(self, directory: Path | None, memory_budget_bytes: int) -> None:
        if memory_budget_bytes < 0:
            raise ValueError(f"memory_budget_bytes must not be negative, got {memory_budget_bytes}")
        self._directory = directory
        self._budget_bytes = memory_budget_bytes
        self._lock = threading.Lock()
        self._memory: OrderedDict[str, ClipFeatures] = OrderedDict()
        self._memory_bytes = 0
        self._stats = CacheStats()

    @property
    def stats(self) -> CacheStats:
        """Counts so far."""
        with self._lock:
            return self._stats

    @property
    def memory_bytes(self) -> int:
        """Bytes of features in the memory tier; never more than the budget."""
        with self._lock:
            return self._memory_bytes

    def get(self, key: str) -> ClipFeatures | None:
        """Return the features of ``key``, or None: then compute them and ``put`` them."""
        with self._lock:
            features = self._memory.get(key)
            if features is not None:
                self._memory.move_to_end(key)
                self._count(memory_hits=1)
                return features
        features, damaged = self._read(key)
        with self._lock:
            self._count(
                disk_hits=int(features is not None), misses=int(features is None), damaged=int(damaged)
            )
            if features is not None:
                self._remember(key, features)
        return features

    def put(self, key: str, features: ClipFeatures) -> None:
        """Store features under ``key``, on disk by writing a temporary file and renaming it."""
        kept = ClipFeatures(vision_FND=_own(features.vision_FND), audio_AD=_own(features.audio_AD))
        tensors = _tensors(kept)
        if not tensors:
            raise ValueError(f"features of {key} hold neither vision nor audio; there is nothing to cache")
        for name, tensor in tensors.items():
            if tensor.ndim != _NDIM[name]:
                raise ValueError(f"{name} must have {_NDIM[name]} dimensions, got {list(tensor.shape)}")
        if self._directory is not None:
            self._write(self._path(self._directory, key), key, tensors)
        with self._lock:
            self._remember(key, kept)

    @staticmethod
    def _path(directory: Path, key: str) -> Path:
        if len(key) < 3 or not key.isalnum():
            raise ValueError(f"a cache key is a hex digest, got {key!r}; build it with feature_key()")
        return directory / key[:2] / f"{key}.safetensors"

    def _read(self, key: str) -> tuple[ClipFeatures | None, bool]:
        """Read an entry from disk; returns (features or None, whether a damaged entry was removed)."""
        if self._directory is None:
            return None, False
        path = self._path(self._directory, key)
        try:
            features = _load(path, key)
        except FileNotFoundError:
            return None, False
        except SafetensorError:
            features = None
        if features is None:
            path.unlink(missing_ok=True)
        return features, features is None

    @staticmethod
    def _write(path: Path, key: str, tensors: dict[str, Tensor]) -> None:
        metadata = {"format": _FORMAT, "key": key, "crc32": _crc32(tensors)}
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(save(tensors, metadata))
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def _remember(self, key: str, features: ClipFeatures) -> None:
        """Put features at the young end of the memory tier; the lock is held."""
        old = self._memory.pop(key, None)
        self._memory_bytes -= _num_bytes(old) if old is not None else 0
        if _num_bytes(features) > self._budget_bytes:
            return
        self._memory[key] = features
        self._memory_bytes += _num_bytes(features)
        while self._memory_bytes > self._budget_bytes:
            _, evicted = self._memory.popitem(last=False)
            self._memory_bytes -= _num_bytes(evicted)
            self._count(evictions=1)

    def _count(self, **more: int) -> None:
        self._stats = replace(
            self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()}
        )


def _load(path: Path, key: str) -> ClipFeatures | None:
    """Read one entry; None when it is not what was written under this key."""
    with safe_open(path, framework="pt", device="cpu") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    expected = {"format": _FORMAT, "key": key, "crc32": _crc32(tensors)}
    shapes_ok = all(_NDIM.get(name) == tensor.ndim for name, tensor in tensors.items())
    if metadata != expected or not tensors or not shapes_ok:
        return None
    return ClipFeatures(vision_FND=tensors.get("vision_FND"), audio_AD=tensors.get("audio_AD"))


def _own(tensor: Tensor | None) -> Tensor | None:
    """Copy to the CPU, so that neither a batch's storage nor the caller's later writes are kept."""
    if tensor is None:
        return None
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _tensors(features: ClipFeatures) -> dict[str, Tensor]:
    named = {"vision_FND": features.vision_FND, "audio_AD": features.audio_AD}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _num_bytes(features: ClipFeatures) -> int:
    return sum(tensor.nbytes for tensor in _tensors(features).values())


def _crc32(tensors: dict[str, Tensor]) -> str:
    """Checksum of names, dtypes, shapes and bytes."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
