"""What a damaged or incomplete file can be told by its bytes alone, and the hash that identifies a clip."""

import hashlib
import os
import struct
from io import BufferedReader

from omnigrpo.media.clip_error import Deadline
from omnigrpo.media.matroska_elements import EBML, find_misfit, find_segment
from omnigrpo.schema import Clip

_HASHED_BYTES = 1 << 18
"""What is hashed between two looks at the clock."""
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


def hash_open_clip(file: BufferedReader, clip: Clip, deadline: Deadline | None = None) -> str:
    """Hex digest of the open file's bytes and the clip's window; rewinds it. ClipError when it takes too long."""
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
    return magic[:4] == EBML or magic[4:8] in _MP4_BOXES


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
        if magic[:4] == EBML:
            segment = find_segment(file)
            return None if segment is None else _missing_end("segment", segment.stop, num_bytes)
        return _mp4_shortfall(file, num_bytes)
    finally:
        file.seek(0)


def hole(file: BufferedReader) -> str | None:
    """Say where the elements of a Matroska or WebM file do not follow each other; None if nowhere or unknown.

    FFmpeg goes on behind such a hole without a word, and not every codec can tell that pictures are missing. The
    file is rewound.
    """
    file.seek(0)
    try:
        segment = find_segment(file) if file.read(len(EBML)) == EBML else None
        at = None if segment is None else find_misfit(file, segment)
        return None if at is None else f"byte {at} lies in no element of its Matroska segment"
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
