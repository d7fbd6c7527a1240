"""The index of a shard: a journal beside it, one checked line per entry that is whole.

A line is ``<crc32 of the rest> <JSON>``. It is appended after the entry's bytes, so what a kill leaves unfinished is
in no line, and a line that a kill cut short has no end.
"""

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from omnigrpo.media.shard_file import Entry, parse_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """Says that the entry at an offset turned out to be damaged."""

    offset: int


@dataclass(kw_only=True, slots=True)
class JournalTail:
    """What a journal says from some byte on."""

    records: list[Entry | Drop] = field(default_factory=list)
    """In the order written."""
    end: int = 0
    """The byte after the last complete line."""
    damaged: bool = False
    """Whether complete lines were left out because they are not what was written."""


def entry_line(entry: Entry) -> bytes:
    """The line that makes an entry known."""
    tensors = [[tensor.name, tensor.dtype, tensor.shape] for tensor in entry.tensors]
    return _line({"key": entry.key, "crc32": entry.crc32, "offset": entry.offset, "tensors": tensors})


def drop_line(offset: int) -> bytes:
    """The line that takes an entry back."""
    return _line({"drop": offset})


def read_journal(path: Path, start: int = 0) -> JournalTail:
    """Read the complete lines from byte ``start`` on; FileNotFoundError when there is no journal."""
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    *lines, unfinished = content.split(b"\n")
    tail = JournalTail(end=start + len(content) - len(unfinished))
    for line in lines:
        record = _parse(line)
        if record is None:
            tail.damaged = True
        else:
            tail.records.append(record)
    return tail


def replace_journal(path: Path, entries: Iterable[Entry]) -> None:
    """Write a journal anew, under another name first."""
    temporary = path.with_suffix(".rebuilt")
    temporary.write_bytes(b"".join(entry_line(entry) for entry in entries))
    temporary.replace(path)


def append_line(handle: int, line: bytes) -> None:
    """Write a line to a journal that was opened for appending; OSError when the disk takes only a part of it."""
    written = os.write(handle, line)
    if written < len(line):
        raise OSError(f"only {written} of {len(line)} bytes of a journal line could be written")


def remaining(records: Iterable[Entry | Drop]) -> list[Entry]:
    """The entries that no later record takes back."""
    left: dict[int, Entry] = {}
    for record in records:
        if isinstance(record, Drop):
            left.pop(record.offset, None)
        else:
            left[record.offset] = record
    return list(left.values())


def _line(record: dict[str, object]) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> Entry | Drop | None:
    checksum, _, text = line.partition(b" ")
    if checksum != b"%08x" % zlib.crc32(text):
        return None
    try:
        record = json.loads(text)
        if "drop" in record:
            return Drop(offset=int(record["drop"]))
        return Entry(
            key=str(record["key"]),
            crc32=int(record["crc32"]),
            offset=int(record["offset"]),
            tensors=parse_tensors(record["tensors"]),
        )
    except (ValueError, KeyError, TypeError):
        return None  # A line of another version, with a checksum that is right.
