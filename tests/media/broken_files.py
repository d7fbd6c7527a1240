"""A corpus of damaged files, and what may become of each."""

import struct
import tempfile
import wave
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
from clip_files import ClipRecipe, write_clip

from omnigrpo.schema import ClipStatus, Modality

TRUNCATED = frozenset((ClipStatus.TRUNCATED,))
UNREADABLE = frozenset((ClipStatus.UNREADABLE,))
CUT = TRUNCATED | UNREADABLE
ANY = frozenset(ClipStatus) - {ClipStatus.MISSING, ClipStatus.TIMEOUT}
"""What a changed file may be: usable, too, if what was changed does not matter."""
BAD = ANY - {ClipStatus.OK}
DAMAGED = frozenset((ClipStatus.CORRUPT,))

_VPX = {"crf": "10", "b:v": "1M", "cpu-used": "8", "deadline": "realtime", "g": "10"}
_OPUS = {"audio_codec": "libopus", "audio_rate": 48_000}
_OLD = {"options": {"qscale": "3", "g": "10", "bf": "2"}, "audio_codec": "mp3"}
GOOD: dict[str, dict] = {
    "behind.mp4": {},
    "front.mp4": {"container_options": {"movflags": "faststart"}},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none:keyint=10"}},
    "h264.mkv": {},
    "av1.mkv": {"codec": "libsvtav1", "options": {"preset": "12", "g": "10"}, **_OPUS},
    "vp9.webm": {"codec": "libvpx-vp9", "options": _VPX, **_OPUS},
    "vp8.webm": {"codec": "libvpx", "options": _VPX, **_OPUS},
    "h264.ts": {},
    "mpeg2.ts": {"codec": "mpeg2video", **_OLD, "audio_codec": "mp2"},
    "h264.avi": {"audio_codec": "mp3"},
    "mpeg4.avi": {"codec": "mpeg4", **_OLD},
    "h264.flv": {},
    "mpeg1.mpg": {"codec": "mpeg1video", **_OLD, "audio_codec": "mp2"},
    "mjpeg.mov": {"codec": "mjpeg", "options": {"qscale": "3"}, "pixel_format": "yuvj420p"},
}  # fmt: skip
"""Recipes of whole files of 25 frames and one second of sound."""
LENGTH_IS_DECLARED = ("behind.mp4", "front.mp4", "fragments.mp4", "h264.mkv", "vp9.webm", "h264.avi")


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenFile:
    """One file of the corpus."""

    name: str
    content: Callable[[], bytes]
    statuses: frozenset[ClipStatus]
    """What may become of it."""
    wanted: tuple[Modality, ...] = ("video", "audio")


@cache
def good_file(name: str) -> bytes:
    """The bytes of one of ``GOOD``."""
    with tempfile.TemporaryDirectory() as directory:
        changes = {"num_frames": 25, "tone_seconds": 1.0} | GOOD[name]
        return write_clip(Path(directory) / name, ClipRecipe(**changes)).read_bytes()


def broken_files() -> Iterator[BrokenFile]:
    """The whole corpus."""
    yield from _cut_files()
    yield from _noisy_files()
    yield from _foreign_files()
    for kind, at, value in _MP4_HEADERS:
        yield _patched("behind.mp4", kind, at, value)
    for kind, at, value in _AVI_HEADERS:
        yield _patched("mpeg4.avi", kind, at, value)
    for kind, at, value in _MATROSKA_HEADERS:
        yield _patched("h264.mkv", kind, at, value)
    yield from _sound_headers()


def _cut_files() -> Iterator[BrokenFile]:
    for name in GOOD:
        for share in (0.0005, 0.01, 0.05, 0.2, 0.5, 0.8, 0.97, 0.9999):
            declared = name in LENGTH_IS_DECLARED
            statuses = (TRUNCATED if share >= 0.05 else CUT) if declared else ANY
            yield BrokenFile(
                name=f"cut at {share:g} of {name}",
                content=lambda name=name, share=share: good_file(name)[
                    : max(int(share * len(good_file(name))), 1)
                ],
                statuses=statuses,
            )


def _noisy_files() -> Iterator[BrokenFile]:
    for name in GOOD:
        yield BrokenFile(name=f"bits of {name}", content=lambda name=name: _flipped(name), statuses=ANY)
        yield BrokenFile(
            name=f"headless {name}", content=lambda name=name: b"\0" * 64 + good_file(name)[64:], statuses=ANY
        )
        unnoticed = name.endswith((".avi", ".ts", ".flv", ".mpg"))  # FFmpeg goes on behind the hole.
        for label, fill in (("zeros", bytes), ("noise", np.random.default_rng(0).bytes)):
            yield BrokenFile(
                name=f"{label} in {name}",
                content=lambda name=name, fill=fill: _overwritten(name, fill),
                statuses=ANY if unnoticed else DAMAGED,
            )


def _flipped(name: str) -> bytes:
    content = bytearray(good_file(name))
    for at in np.random.default_rng(0).integers(len(content), size=40):
        content[at] ^= 1 << int(at % 8)
    return bytes(content)


def _overwritten(name: str, fill: Callable[[int], bytes]) -> bytes:
    content, tenth = bytearray(good_file(name)), len(good_file(name)) // 10
    content[4 * tenth : 6 * tenth] = fill(2 * tenth)
    return bytes(content)


def _foreign_files() -> Iterator[BrokenFile]:
    files: dict[str, tuple[bytes, frozenset[ClipStatus]]] = {
        "empty.mp4": (b"", UNREADABLE),
        "one byte.mp4": (b"\0", UNREADABLE),
        "zeros.mp4": (bytes(5000), UNREADABLE),
        "zeros.ts": (bytes(188 * 50), UNREADABLE),
        "text.mp4": (b"this is no video\n" * 100, UNREADABLE),
        "text.txt": (b"this is no video\n" * 100, BAD),
        "text.h264": (b"this is no video\n" * 100, BAD),
        "page.mp4": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNREADABLE),
        "pointer.mp4": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", UNREADABLE),
        "archive.mp4": (b"PK\3\4" + bytes(100), UNREADABLE),
        "random.mkv": (np.random.default_rng(0).bytes(20_000), UNREADABLE),
        "null packets.ts": ((b"\x47\x1f\xff\x10" + b"\xff" * 184) * 200, BAD),
        "picture.mp4": (_png(96, 64), BAD),
        "huge picture.mp4": (_png(30_000, 30_000), BAD),
        "subtitles.mp4": (b"1\n00:00:00,000 --> 00:00:01,000\nhello\n\n" * 20, BAD),
        "other clips.mp4": (b"ffconcat version 1.0\nfile 'good.mp4'\n", UNREADABLE),
        "a pipe.mp4": (b"ffconcat version 1.0\nfile 'fifo'\n", UNREADABLE),
        "playlist.m3u8": (
            b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\ngood.mp4\n#EXT-X-ENDLIST\n", UNREADABLE),
        "live.mp4": (
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n", UNREADABLE),
    }  # fmt: skip
    for name, (content, statuses) in files.items():
        yield BrokenFile(name=name, content=lambda content=content: content, statuses=statuses)
    for name in ("behind.mp4", "h264.mkv", "h264.ts"):
        other = frozenset((ClipStatus.OK,))
        yield BrokenFile(
            name=f"{name}.avi", content=lambda name=name: good_file(name), statuses=other
        )  # The extension says nothing.
    yield BrokenFile(
        name="unknown codec.avi",
        content=lambda: good_file("mpeg4.avi").replace(b"FMP4", b"xxxx"),
        statuses=frozenset((ClipStatus.UNSUPPORTED_CODEC,)),
    )
    yield BrokenFile(
        name="huge pictures.mov", content=_huge_pictures, statuses=frozenset((ClipStatus.UNSUPPORTED_CODEC,))
    )
    yield BrokenFile(
        name="twice.mp4", content=lambda: good_file("behind.mp4") + good_file("behind.mp4"), statuses=ANY
    )


def _huge_pictures() -> bytes:
    """JPEG pictures that claim 16,000 x 16,000, in their own headers and in the file's."""
    content, size = bytearray(good_file("mjpeg.mov")), struct.pack(">2H", 16_000, 16_000)
    at = content.find(b"\xff\xc0\0\x11\x08")
    while at >= 0:
        content[at + 5 : at + 9] = size
        at = content.find(b"\xff\xc0\0\x11\x08", at + 9)
    entry = content.index(b"jpeg", content.index(b"stsd"))
    content[entry + 28 : entry + 32] = size
    return bytes(content)


def _png(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes((width * 3 + 1) * min(height, 64)))
    chunks = (
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND")
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


_HUGE, _MOST, _NEGATIVE = b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0"
_MP4_HEADERS = (
    *((kind, -4, size) for kind in (b"moov", b"trak", b"stbl", b"stsd", b"mdat", b"avcC", b"stsz")
      for size in (_HUGE, _MOST, b"\0\0\0\0", b"\0\0\0\1", b"\0\0\0\7")),
    *((kind, 8, count) for kind in (b"stts", b"ctts", b"stsc", b"stco", b"stss", b"stsd", b"elst")
      for count in (_HUGE, _MOST, b"\0\0\0\0")),
    *((b"stsz", 12, count) for count in (_HUGE, _MOST, b"\0\0\0\0")),
    *((b"stsz", 8, size) for size in (_HUGE, b"\0\0\0\1")),
    *((b"stts", 12, value) for value in (_HUGE, _MOST)),
    *((b"stts", 16, value) for value in (_HUGE, _NEGATIVE, b"\0\0\0\0")),
    *((b"ctts", 16, value) for value in (_HUGE, _NEGATIVE, _MOST)),
    *((b"stco", 12, value) for value in (_HUGE, b"\0\0\0\0")),
    *((b"elst", at, value) for at in (12, 16) for value in (_HUGE, _NEGATIVE, _MOST)),
    *((b"mvhd", 16, value) for value in (_HUGE, b"\0\0\0\0")),
    *((b"mdhd", at, value) for at in (16, 20) for value in (_HUGE, _NEGATIVE, b"\0\0\0\0")),
    *((b"tkhd", at, _HUGE) for at in (24, 80, 84)),
    (b"avc1", 28, _HUGE), (b"avc1", 0, b"xxxx"), (b"avc1", 0, b"av01"), (b"avc1", 0, b"hvc1"),
    (b"avcC", 4, b"\0\0\0\0"), (b"avcC", 9, _HUGE), (b"avcC", 12, b"\x27\xff\xff\xff\xff\xff\xff"),
    (b"ftyp", 0, b"xxxx"), (b"hdlr", 12, b"soun"), (b"mp4a", 0, b"alac"), (b"mp4a", 20, _HUGE), (b"esds", 4, _HUGE),
)  # fmt: skip
"""Box, bytes after its kind's first one, and what is written there."""
_AVI_HEADERS = (
    *((b"avih", at, value) for at in (8, 24, 40) for value in (_HUGE, b"\0\0\0\0", b"\xff\xff\xff\x7f")),
    *((b"strh", at, value) for at in (28, 32, 40) for value in (_HUGE, b"\0\0\0\0", b"\xff\xff\xff\x7f")),
    (b"strh", 36, _HUGE), (b"strh", 36, b"\xff\xff\xff\x7f"), (b"00dc", 4, _HUGE),
    *((b"strf", at, value) for at in (4, 12, 16) for value in (_HUGE, b"\0\0\0\0", b"\xff\xff\xff\x7f")),
    *((kind, 4, value) for kind in (b"LIST", b"movi", b"idx1") for value in (_HUGE, b"\0\0\0\0")),
    (b"strf", 24, b"H264"), (b"strf", 24, b"xxxx"), (b"vids", 0, b"auds"),
)  # fmt: skip
_MATROSKA_HEADERS = (
    (b"\x44\x89\x88", 3, struct.pack(">d", -1e12)),
    (b"\x44\x89\x88", 3, struct.pack(">d", float("nan"))),
    (b"\x2a\xd7\xb1\x83", 4, b"\0\0\0"),
    (b"\x2a\xd7\xb1\x83", 4, b"\xff\xff\xff"),
    (b"\x18\x53\x80\x67", 4, b"\x01\xff\xff\xff\xff\xff\xff\xff"),
    (b"\x18\x53\x80\x67", 4, b"\x01\0\0\0\0\0\0\0"),
    (b"\x1f\x43\xb6\x75", 4, b"\x01\xff\xff\xff\xff\xff\xff\xfe"),
    (b"\x16\x54\xae\x6b", 4, b"\x01\xff\xff\xff\xff\xff\xff\xfe"),
    (b"\x1a\x45\xdf\xa3", 4, b"\0"),
    (b"\xb0\x81", 1, b"\x81\xff"),
    (b"V_MPEG4/ISO/AVC", 0, b"V_MPEGH/ISO/HEVC"),
    (b"V_MPEG4/ISO/AVC", 0, b"V_NOTHING/ISO/AV"),
    (b"A_AAC", 0, b"A_XXX"),
)


def _patched(name: str, kind: bytes, at: int, value: bytes) -> BrokenFile:
    def content() -> bytes:
        changed = bytearray(good_file(name))
        find = changed.rindex if name.endswith(".mkv") else changed.index  # Ids are in the seek table, too.
        start = find(kind) + at
        changed[start : start + len(value)] = value
        return bytes(changed)

    label = kind.decode() if kind.isascii() else kind.hex()
    return BrokenFile(
        name=f"{label.replace('/', ' ')}{at:+d} {value[:8].hex()} {name}", content=content, statuses=ANY
    )


def _sound_headers() -> Iterator[BrokenFile]:
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(bytes(8000))
    whole = file.getvalue()
    for label, at, value in (
        ("no channels", 22, b"\0\0"), ("many channels", 22, b"\xff\xff"), ("no rate", 24, bytes(4)),
        ("a rate of billions", 24, b"\xff\xff\xff\x7f"), ("no bits", 34, b"\0\0"), ("many bits", 34, b"\xff\xff"),
        ("no size", 40, bytes(4)), ("the largest size", 40, _HUGE),
    ):  # fmt: skip
        content = whole[:at] + value + whole[at + len(value) :]
        yield BrokenFile(
            name=f"{label}.wav", content=lambda content=content: content, statuses=ANY, wanted=("audio",)
        )
    yield BrokenFile(
        name="sound.wav",
        content=lambda: whole,
        statuses=frozenset((ClipStatus.NO_VIDEO,)),
        wanted=("video", "audio"),
    )
