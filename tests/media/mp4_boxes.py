"""Edits the boxes of an mp4 file, for what the muxer does not write.

Only for files whose index (moov) lies behind the media, which then stays in its place.
"""

import struct
from collections.abc import Sequence
from pathlib import Path

_TRACK = (b"moov", b"trak")
_SAMPLES = (*_TRACK, b"mdia", b"minf", b"stbl")


def set_rotation(path: Path, degrees_clockwise: int) -> Path:
    """Write a quarter turn into the first track's header."""
    cosine, sine = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees_clockwise]
    matrix = struct.pack(">9i", cosine << 16, sine << 16, 0, -sine << 16, cosine << 16, 0, 0, 0, 1 << 30)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = matrix
    path.write_bytes(content)
    return path


def set_edits(path: Path, edits: Sequence[tuple[int, int]]) -> Path:
    """Replace the first track's edit list by (duration, start).

    Durations count in the movie's time base, starts in the track's; a start of -1 is a pause.
    """
    entries = b"".join(struct.pack(">Ii2h", duration, start, 1, 0) for duration, start in edits)
    table = _box(b"elst", struct.pack(">2I", 0, len(edits)) + entries)
    path.write_bytes(_with_box(path.read_bytes(), (*_TRACK, b"edts"), table))
    return path


def add_description(path: Path, other: Path, first_sample: int) -> Path:
    """Give the first track the description of another file's from a sample on, as a joined file has it."""
    content = path.read_bytes()
    sizes = _samples(content)
    begin, _ = _span(content, (*_SAMPLES, b"stco"))
    start = int.from_bytes(content[begin + 16 : begin + 20], "big")
    chunks = struct.pack(">4I", 0, 2, start, start + sum(sizes[:first_sample]))
    entries = struct.pack(">8I", 0, 2, 1, first_sample, 1, 2, len(sizes) - first_sample, 2)
    descriptions = struct.pack(">2I", 0, 2) + _description(content) + _description(other.read_bytes())
    for kind, body in ((b"stco", chunks), (b"stsc", entries), (b"stsd", descriptions)):
        content = _with_box(content, (*_SAMPLES, kind), body)
    path.write_bytes(content)
    return path


def time_scales(path: Path) -> tuple[int, int]:
    """Units per second of the movie and of the first track."""
    content = path.read_bytes()
    movie, media = content.index(b"mvhd") + 16, content.index(b"mdhd") + 16
    return int.from_bytes(content[movie : movie + 4], "big"), int.from_bytes(
        content[media : media + 4], "big"
    )


def _box(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + kind + body


def _span(content: bytes, path: Sequence[bytes]) -> tuple[int, int]:
    """Where the first box of a path begins and ends."""
    begin = 0
    for kind in path:
        begin = content.index(kind, begin) - 4
    return begin, begin + int.from_bytes(content[begin : begin + 4], "big")


def _with_box(content: bytes, path: Sequence[bytes], body: bytes) -> bytes:
    """The file with another body in one box."""
    assert content.index(b"mdat") < content.index(b"moov")
    begin, end = _span(content, path)
    box = _box(path[-1], body)
    edited = bytearray(content[:begin] + box + content[end:])
    for depth in range(1, len(path)):
        at, stop = _span(content, path[:depth])
        edited[at : at + 4] = (stop - at + len(box) - (end - begin)).to_bytes(4, "big")
    return bytes(edited)


def _samples(content: bytes) -> tuple[int, ...]:
    """Bytes of each sample of the first track."""
    begin, end = _span(content, (*_SAMPLES, b"stsz"))
    return struct.unpack(f">{(end - begin - 20) // 4}I", content[begin + 20 : end])


def _description(content: bytes) -> bytes:
    """The first entry of the first track's table of descriptions."""
    begin, end = _span(content, (*_SAMPLES, b"stsd"))
    return content[begin + 16 : end]
