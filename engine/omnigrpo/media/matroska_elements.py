"""The outer elements of a Matroska or WebM file: each has an id, a size, and its content (RFC 8794, 4 to 6)."""

import os
from io import BufferedReader

EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT, _CLUSTER = b"\x18\x53\x80\x67", b"\x1f\x43\xb6\x75"


def find_segment(file: BufferedReader) -> range | None:
    """Bytes of the segment's content; None when it is not there, or declares no size as in a live recording."""
    file.seek(len(EBML))
    header_size = _read_size(file)
    if header_size is None:
        return None
    file.seek(header_size, os.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return None
    size = _read_size(file)
    return None if size is None else range(file.tell(), file.tell() + size)


def find_misfit(file: BufferedReader, segment: range) -> int | None:
    """First byte of a segment or its clusters where no element fits into its parent; None when sizes are unknown."""
    at = segment.start
    while at < segment.stop:
        file.seek(at)
        kind, size = _read_id(file), _read_size(file)
        if kind == _CLUSTER and size is None:
            return None
        if kind is None or size is None or file.tell() + size > segment.stop:
            return at
        begin, at = file.tell(), file.tell() + size
        misfit = _misfit_in_cluster(file.read(size)) if kind == _CLUSTER else None
        if misfit is not None:
            return begin + misfit
    return None


def _misfit_in_cluster(content: bytes) -> int | None:
    """As ``find_misfit`` of a cluster in memory: it has one element per packet."""
    at, stop = 0, len(content)
    while at < stop:
        id_length = 9 - content[at].bit_length()
        size_at = at + id_length
        if id_length > 4 or size_at >= stop or content[size_at] == 0:
            return at
        size_length = 9 - content[size_at].bit_length()
        mask = (1 << 7 * size_length) - 1
        size = int.from_bytes(content[size_at : size_at + size_length], "big") & mask
        following = size_at + size_length + size
        if following > stop or size == mask:
            return at
        at = following
    return None


def _read_id(file: BufferedReader) -> bytes | None:
    """Read an id: leading zero bits tell its length, at most four bytes; None if it is none."""
    first = file.read(1)
    if not first or first[0] < 0x10:
        return None
    return first + file.read(8 - first[0].bit_length())


def _read_size(file: BufferedReader) -> int | None:
    """Read a variable-length integer: leading zero bits tell its length; None if cut or all ones."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    num_more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] ^ (0x80 >> num_more)]) + file.read(num_more), "big")
    return None if value == (1 << 7 * (num_more + 1)) - 1 else value
