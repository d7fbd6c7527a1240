"""What a damaged or incomplete file can be told by its bytes alone, and the hash that identifies a clip."""

import hashlib
import os
import struct
from io import BufferedReader

from omnigrpo.media.clip_error import Deadline
from omnigrpo.schema import Clip

_HASHED_BYTES = 1 << 18
"""What is hashed between two looks at the clock."""
_EBML = b"\x1a\x45\xdf\xa3"
_SEGMENT = b"\x18\x53\x80\x67"
_MP4_BOXES = frozenset(
    (
        b"ftyp",
        b"styp",
        b"moov",
        b"moof",
        b"mdat",
        b"free",
        b"skip",
        b"wide",
        b"sidx",
        b"mfra",
        b"udta",
        b"uuid",
    )
)


def content_hash(clip: Clip) -> str:
    """Return the hex digest of the file's bytes and the clip's window; OSError when it cannot be read."""
    with clip.path.open("rb") as file:
        return hash_open_clip(file, clip)


def hash_open_clip(file: BufferedReader, clip: Clip, deadline: Deadline | None = None) -> str:
    """Return ``content_hash`` of a clip whose file is already open, and rewind it; ClipError when it takes too long."""
    file.seek(0)
    digest, buffer = hashlib.blake2b(digest_size=20), memoryview(bytearray(_HASHED_BYTES))
    while size := file.readinto(buffer):
        digest.update(buffer[:size])
        if deadline is not None:
            deadline.check()
    digest.update(f"|{clip.start_seconds!r}|{clip.end_seconds!r}".encode())
    file.seek(0)
    return digest.hexdigest()


def has_stream_table(file: BufferedReader) -> bool:
    """Whether the file looks like mp4, mov, Matroska or WebM, whose headers describe the streams; rewinds it."""
    file.seek(0)
    magic = file.read(12)
    file.seek(0)
    return magic[:4] == _EBML or magic[4:8] in _MP4_BOXES


def shortfall(file: BufferedReader) -> str | None:
    """Say what is missing at the end of an mp4, mov, Matroska, WebM or AVI file; None if nothing or unknown.

    These formats declare their length, and FFmpeg decodes what is left of some cut files without a word. The
    file is rewound.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        magic = file.read(12)
        if magic[:4] == b"RIFF":
            size = int.from_bytes(magic[4:8], "little")
            return None if size in (0, 0xFFFFFFFF) else _missing_end("RIFF chunk", 8 + size, num_bytes)
        if magic[:4] == _EBML:
            return _matroska_shortfall(file, num_bytes)
        return _mp4_shortfall(file, num_bytes)
    finally:
        file.seek(0)


def _missing_end(part: str, declared_end: int, num_bytes: int) -> str | None:
    if declared_end <= num_bytes:
        return None
    return f"its {part} ends at byte {declared_end}, the file at byte {num_bytes}"


def _mp4_shortfall(file: BufferedReader, num_bytes: int) -> str | None:
    """Walk the top-level boxes: an interrupted copy cuts one, a killed writer leaves no index."""
    position, kind, kinds = 0, b"", set[bytes]()
    while position + 8 <= num_bytes:
        file.seek(position)
        size, kind = struct.unpack(">I4s", file.read(8))
        if kind not in _MP4_BOXES:
            return None
        kinds.add(kind)
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        position = num_bytes if size == 0 else position + max(size, 8)
    if kinds and position <= num_bytes and kinds.isdisjoint((b"moov", b"moof")):
        return "it has no moov box, the index of an mp4"
    return _missing_end(f"{kind.decode()} box", position, num_bytes)


def _matroska_shortfall(file: BufferedReader, num_bytes: int) -> str | None:
    """Compare the segment's size with the file's; a live recording declares none."""
    file.seek(len(_EBML))
    header_size = _read_ebml_size(file)
    if header_size is None:
        return None
    file.seek(header_size, os.SEEK_CUR)
    if file.read(len(_SEGMENT)) != _SEGMENT:
        return None
    segment_size = _read_ebml_size(file)
    return None if segment_size is None else _missing_end("segment", file.tell() + segment_size, num_bytes)


def _read_ebml_size(file: BufferedReader) -> int | None:
    """Read a variable-length integer: leading zero bits tell its length; None if cut or all ones."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    num_more = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] ^ (0x80 >> num_more)]) + file.read(num_more), "big")
    return None if value == (1 << 7 * (num_more + 1)) - 1 else value
