"""Where each key is, over all shards of a directory; follows the journals of other processes."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from omnigrpo.media.shard_file import Entry
from omnigrpo.media.shard_journal import Drop, read_journal
from omnigrpo.media.shard_writer import JOURNAL_SUFFIX, SHARD_SUFFIX, journal_of, rebuild_journal


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """One copy of a key's entry."""

    shard: Path
    entry: Entry


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A shard as the directory lists it."""

    path: Path
    num_bytes: int
    """Of the shard and its journal."""
    used_ns: int
    """When it was last written or read, nanoseconds since the epoch."""


@dataclass(kw_only=True, slots=True)
class _Known:
    """How much of a shard's journal is in the index."""

    inode: int
    end: int = 0
    keys: dict[int, str] = field(default_factory=dict)
    """Key by offset."""


class ShardIndex:
    """Keys to places; the caller holds a lock."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[Path, _Known] = {}
        self._places: dict[str, dict[tuple[Path, int], Place]] = {}

    def find(self, key: str) -> Place | None:
        """The latest place of a key that is known; shards are named by the time of their making."""
        places = self._places.get(key)
        return places[max(places)] if places else None

    def add(self, shard: Path, entry: Entry) -> None:
        """Make an entry of a shard known; twice is as once."""
        if shard in self._known:
            self._known[shard].keys[entry.offset] = entry.key
            self._places.setdefault(entry.key, {})[shard, entry.offset] = Place(shard=shard, entry=entry)

    def drop(self, shard: Path, offset: int) -> None:
        """Forget an entry, if it is known."""
        key = self._known[shard].keys.pop(offset, None) if shard in self._known else None
        places = self._places.get(key, {}) if key is not None else {}
        places.pop((shard, offset), None)
        if key is not None and not places:
            self._places.pop(key, None)

    def forget(self, shard: Path) -> None:
        """Forget a shard that is no more."""
        for offset in list(self._known[shard].keys) if shard in self._known else ():
            self.drop(shard, offset)
        self._known.pop(shard, None)

    def refresh(self) -> None:
        """Read what journals say since the last time; a journal that is damaged or lost is made anew."""
        present = {shard.path for shard in list_shards(self._directory)}
        for gone in self._known.keys() - present:
            self.forget(gone)
        for path in sorted(present):
            if self._read(path) and rebuild_journal(path):
                self._read(path)

    def _read(self, path: Path) -> bool:
        """Take in the new part of a journal; returns whether it needs mending."""
        try:
            status = journal_of(path).stat()
            known = self._known.get(path)
            if known is None or known.inode != status.st_ino or status.st_size < known.end:
                self.forget(path)
                known = self._known[path] = _Known(inode=status.st_ino)
            if status.st_size == known.end:
                return False
            tail = read_journal(journal_of(path), known.end)
        except FileNotFoundError:
            return path.exists()
        known.end = tail.end
        for record in tail.records:
            if isinstance(record, Drop):
                self.drop(path, record.offset)
            else:
                self.add(path, record)
        return tail.damaged


def list_shards(directory: Path) -> list[ShardFile]:
    """The shards of a directory, the least recently used first; journals whose shard is gone are removed."""
    shards: dict[str, os.stat_result] = {}
    journals: dict[str, int] = {}
    with os.scandir(directory) as items:
        for item in items:
            stem, suffix = os.path.splitext(item.name)  # noqa: PTH122 (no Path per file of a large directory)
            if suffix not in (SHARD_SUFFIX, JOURNAL_SUFFIX) or not stem.startswith("shard-"):
                continue
            try:
                status = item.stat()
            except FileNotFoundError:
                continue  # Another process removed it meanwhile.
            if suffix == SHARD_SUFFIX:
                shards[stem] = status
            else:
                journals[stem] = status.st_size
    for stem in journals.keys() - shards.keys():
        _remove_orphan(directory / f"{stem}{SHARD_SUFFIX}")
    found = [
        ShardFile(
            path=directory / f"{stem}{SHARD_SUFFIX}",
            num_bytes=status.st_size + journals.get(stem, 0),
            used_ns=status.st_mtime_ns,
        )
        for stem, status in shards.items()
    ]
    return sorted(found, key=lambda shard: (shard.used_ns, shard.path))


def _remove_orphan(shard: Path) -> None:
    """Delete the journal that a killed eviction left; a shard comes before its journal, so it cannot be a new one."""
    if not shard.exists():
        journal_of(shard).unlink(missing_ok=True)
