"""Clip features on disk: shards that several processes fill and read at once, within a budget."""

import errno
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from omnigrpo.media.shard_file import read_entry
from omnigrpo.media.shard_index import Place, ShardIndex, list_shards
from omnigrpo.media.shard_writer import ShardWriter, note_damage, remove_shard

SHARD_BYTES = 256 * 2**20
SMALLEST_SHARE = 8
"""A shard takes at most this part of the budget, so that eviction takes little at a time."""
NEW_FILES_BYTES = 8192
"""Reserved for the header and the journal when a shard may have to be begun."""
TOUCH_SECONDS = 60.0
"""A shard that is read is marked as used this often."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """What a lookup on disk found."""

    tensors: dict[str, Tensor] | None
    """None when there is no sound entry."""
    damaged: int
    """Entries that were thrown away on the way, because their bytes were not what was written."""


class ShardStore:
    """Maps keys to named tensors in a directory; safe from many threads and many processes.

    Each process that writes has a shard of its own, and its lock; another goes on with it once its writer ended, in
    whatever way. Entries of one key are interchangeable: a key says everything that its tensors depend on.
    """

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"disk_budget_bytes must not be negative, got {budget_bytes}")
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._budget_bytes = budget_bytes
        self._shard_bytes = min(SHARD_BYTES, budget_bytes // SMALLEST_SHARE)
        self._lock = threading.Lock()
        self._index = ShardIndex(directory)
        self._writer: ShardWriter | None = None
        self._full: set[Path] = set()
        """Shards that this store does not go on with."""
        self._touched: dict[Path, float] = {}
        self.num_evicted = 0
        """Shards that this store removed to keep the budget."""
        with self._lock:
            self._index.refresh()

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards and journals now."""
        return sum(shard.num_bytes for shard in list_shards(self._directory))

    def read(self, key: str) -> Stored:
        """Return the tensors of a key; one that is unknown is looked for in what other processes wrote since."""
        damaged = 0
        for refresh in (False, True):
            while (place := self._find(key, refresh=refresh)) is not None:
                tensors = self._read(place)
                if tensors is not None:
                    return Stored(tensors=tensors, damaged=damaged)
                damaged += self._give_up(place)
        return Stored(tensors=None, damaged=damaged)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Append an entry; False when the budget has no room that may be freed."""
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        with self._lock:
            if self._writer is not None and not (
                self._writer.path.exists() and self._writer.takes(key, num_bytes)
            ):
                self._close_writer()
            if not self._make_room(num_bytes):
                return False
            writer = self._writer if self._writer is not None else self._open_writer(key, num_bytes)
            try:
                entry = writer.append(key, tensors)
            except BaseException:
                self._writer = None  # It gave its shard up; the next one mends it.
                raise
            self._writer = writer
            self._index.refresh()
            self._index.add(writer.path, entry)
        return True

    def close(self) -> None:
        """Release the shard that was being written."""
        with self._lock:
            self._close_writer()

    def _find(self, key: str, *, refresh: bool) -> Place | None:
        with self._lock:
            if refresh:
                self._index.refresh()
            return self._index.find(key)

    def _read(self, place: Place) -> dict[str, Tensor] | None:
        try:
            tensors = read_entry(place.shard, place.entry)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EIO):
                return None  # Evicted by another process; or the disk cannot read it.
            raise
        if tensors is not None:
            self._touch(place.shard)
        return tensors

    def _give_up(self, place: Place) -> int:
        """Forget an entry that could not be read; returns 1 if it was damaged, 0 if its shard is gone."""
        with self._lock:
            if not place.shard.exists():
                self._index.forget(place.shard)
                return 0
            self._index.drop(place.shard, place.entry.offset)
            if self._writer is not None and self._writer.path == place.shard:
                self._writer.drop(place.entry.offset)
                return 1
        note_damage(place.shard, place.entry.offset)
        return 1

    def _touch(self, shard: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(shard, -TOUCH_SECONDS) >= TOUCH_SECONDS:
            self._touched[shard] = now
            try:
                os.utime(shard)
            except (FileNotFoundError, PermissionError):
                return  # Gone, or a directory that we may only read: nobody evicts there for us.

    def _open_writer(self, key: str, num_bytes: int) -> ShardWriter:
        """Go on with a shard that nobody writes, or begin one."""
        for shard in list_shards(self._directory):
            if shard.path in self._full:
                continue
            self._full.add(shard.path)
            if shard.num_bytes + num_bytes > self._shard_bytes:
                continue
            writer = ShardWriter.adopt(shard.path, self._shard_bytes)
            if writer is not None and writer.takes(key, num_bytes):
                return writer
            if writer is not None:
                writer.close()
        return ShardWriter.create(self._directory, self._shard_bytes)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._full.add(self._writer.path)
            self._writer.close()
            self._writer = None

    def _make_room(self, num_bytes: int) -> bool:
        """Remove the least recently used shards until an entry fits; False when those left are all being written."""
        shards = list_shards(self._directory)
        wanted = num_bytes + NEW_FILES_BYTES + self._shard_bytes // 1024
        total = sum(shard.num_bytes for shard in shards) + wanted
        for shard in shards:
            if total <= self._budget_bytes:
                break
            own = self._writer is not None and shard.path == self._writer.path
            if not own and remove_shard(shard.path):
                total -= shard.num_bytes
                self.num_evicted += 1
                self._index.forget(shard.path)
        return total <= self._budget_bytes
