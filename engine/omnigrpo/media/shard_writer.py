"""Who may write a shard: whoever holds the lock of its file, which a kill releases."""

import fcntl
import os
import secrets
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from torch import Tensor

from omnigrpo.media.shard_file import (
    LENGTH_BYTES,
    Entry,
    describe,
    header_parts,
    join_header,
    read_data_start,
    read_header,
)
from omnigrpo.media.shard_journal import (
    append_line,
    drop_line,
    entry_line,
    read_journal,
    remaining,
    replace_journal,
)

SHARD_SUFFIX = ".safetensors"
JOURNAL_SUFFIX = ".journal"
SMALLEST_HEADER_BYTES = 4096
HEADER_SHARE = 1024
"""A shard's header may take this part of its size: 256 KiB of 256 MiB, room for some 700 entries."""
HEADER_BYTES_PER_ENTRY = 320
"""What an entry of two tensors takes there at most, besides its key three times."""


class ShardWriter:
    """Appends entries to a shard of its own; not for several threads at once.

    Each append leaves the disk as it was or with the whole entry, wherever it is interrupted: the journal's line
    comes last. Nothing is flushed to the device: a power cut may cost entries, which their checksums tell.
    """

    def __init__(self, path: Path, lock: int, max_bytes: int) -> None:
        """Take over a locked shard; use ``create`` or ``adopt``."""
        self.path = path
        self._handle = lock
        self._max_bytes = max_bytes
        self._journal = os.open(
            journal_of(path), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        self._data_start = self._end = 0
        self._header: list[tuple[str, str]] = []
        self._header_bytes = len(join_header(()))
        self._keys: set[str] = set()

    @classmethod
    def create(cls, directory: Path, max_bytes: int) -> Self:
        """Begin a shard."""
        while True:
            path = directory / f"shard-{time.time_ns():020d}-{secrets.token_hex(4)}{SHARD_SUFFIX}"
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
            lock = lock_shard(path)
            if lock is not None:
                writer = cls(path, lock, max_bytes)
                writer._begin()
                return writer

    @classmethod
    def adopt(cls, path: Path, max_bytes: int) -> Self | None:
        """Go on with a shard that its writer left, and cut off what it left unfinished; None if that cannot be."""
        lock = lock_shard(path)
        if lock is None:
            return None
        writer = cls(path, lock, max_bytes)
        if writer._resume():
            return writer
        writer.close()
        return None

    def takes(self, key: str, num_bytes: int) -> bool:
        """Whether there is room for an entry, and no other of this key; an empty shard takes any."""
        if not self._keys:
            return True
        room = self._data_start - LENGTH_BYTES - self._header_bytes
        return (
            key not in self._keys
            and self._end + num_bytes <= self._max_bytes
            and 3 * len(key) + HEADER_BYTES_PER_ENTRY <= room
        )

    def append(self, key: str, tensors: Mapping[str, Tensor]) -> Entry:
        """Write an entry; when that fails, the shard is given up and ``adopt`` mends it."""
        entry, parts = describe(key, tensors, offset=self._end)
        assert key not in self._keys, f"{self.path} holds {key} already, and a header names each tensor once"
        try:
            position = self._end
            for part in parts:
                write_all(self._handle, part.numpy().data, position)
                position += part.nbytes
            self._add_to_header(entry)
            self._write_header()
            append_line(self._journal, entry_line(entry))
        except BaseException:
            self.close()
            raise
        self._end = entry.end
        return entry

    def drop(self, offset: int) -> None:
        """Note that the entry at an offset is damaged."""
        append_line(self._journal, drop_line(offset))

    def close(self) -> None:
        """Release the shard; others may go on with it or remove it."""
        if self._handle >= 0:
            os.close(self._journal)
            os.close(self._handle)
            self._handle = self._journal = -1

    def _begin(self) -> None:
        header_bytes = max(SMALLEST_HEADER_BYTES, self._max_bytes // HEADER_SHARE)
        os.ftruncate(self._handle, 0)
        os.ftruncate(self._journal, 0)
        blank = struct.pack("<Q", header_bytes) + join_header(()).ljust(header_bytes)
        write_all(self._handle, memoryview(blank), 0)
        self._data_start = self._end = len(blank)

    def _resume(self) -> bool:
        """Bring the file to the end of its last entry in the journal; False if there is no room or it is damaged."""
        journal = read_journal(journal_of(self.path))
        entries = [record for record in journal.records if isinstance(record, Entry)]
        start, size = read_data_start(self._handle), os.fstat(self._handle).st_size
        if not entries and not journal.damaged:
            self._begin()
            return True
        end = max((entry.end for entry in entries), default=0)
        if journal.damaged or start is None or not start < end <= min(size, self._max_bytes):
            return False
        self._data_start, self._end = start, end
        for entry in entries:
            self._add_to_header(entry)
        os.ftruncate(self._journal, journal.end)
        os.ftruncate(self._handle, end)
        self._write_header()
        return True

    def _add_to_header(self, entry: Entry) -> None:
        parts = header_parts(entry, self._data_start)
        self._header.append(parts)
        self._header_bytes += sum(len(part) for part in parts)
        self._keys.add(entry.key)

    def _write_header(self) -> None:
        space = self._data_start - LENGTH_BYTES
        header = join_header(self._header)
        assert len(header) <= space, f"{len(header)} bytes of header for {space}"
        write_all(self._handle, memoryview(header.ljust(space)), LENGTH_BYTES)


def journal_of(shard: Path) -> Path:
    """The journal of a shard."""
    return shard.with_suffix(JOURNAL_SUFFIX)


def lock_shard(path: Path) -> int | None:
    """Open a shard as the only writer; None when somebody else is, or there is no such shard any more."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # Locked by another, or removed between opening and locking.
    os.close(handle)
    return None


@contextmanager
def locked(path: Path) -> Iterator[int | None]:
    """``lock_shard`` for the time of a block."""
    handle = lock_shard(path)
    try:
        yield handle
    finally:
        if handle is not None:
            os.close(handle)


def note_damage(path: Path, offset: int) -> None:
    """Take an entry out of the journal of a shard that nobody writes; others find out by its checksum."""
    with locked(path) as handle:
        if handle is None:
            return
        end = read_journal(journal_of(path)).end
        with journal_of(path).open("r+b") as journal:
            journal.truncate(end)  # A line that a kill cut short must not swallow this one.
            journal.seek(end)
            journal.write(drop_line(offset))


def rebuild_journal(path: Path) -> bool:
    """Make the journal of a shard anew, from its sound lines and the shard's header; False while somebody writes it."""
    with locked(path) as handle:
        if handle is None:
            return False
        named = {(entry.key, entry.offset): entry for entry in read_header(handle)}
        if journal_of(path).exists():
            for entry in remaining(read_journal(journal_of(path)).records):
                named[entry.key, entry.offset] = entry
        replace_journal(journal_of(path), sorted(named.values(), key=lambda entry: entry.offset))
        return True


def remove_shard(path: Path) -> bool:
    """Delete a shard that nobody writes, its bytes first; returns whether it is gone."""
    with locked(path) as handle:
        if handle is None:
            return not path.exists()
        path.unlink(missing_ok=True)
        journal_of(path).unlink(missing_ok=True)
        return True


def write_all(handle: int, content: memoryview, position: int) -> None:
    """Write at a position, in as many calls as it takes."""
    while content:
        written = os.pwrite(handle, content, position)
        content, position = content[written:], position + written
