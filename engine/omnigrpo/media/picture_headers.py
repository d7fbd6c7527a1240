"""What pictures of VP8, VP9 and JPEG say about their size and sample format, read from their headers.

A decoder that takes the size from the file, as DALI's, writes beyond its buffers when a picture is larger.

Syntax: VP8 (RFC 6386, 9.1), VP9 (bitstream specification 0.7, 6.2 and annex B), JPEG (ITU-T T.81, B.2.2).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from av.packet import Packet

_VP8_START, _VP9_SYNC = b"\x9d\x01\x2a", 0x498342
_VP9_RGB = 7
_JPEG_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7](?=(.{8,24}))", re.DOTALL)
"""Starts of frames; wherever they lie, a picture within a picture included, for a decoder may find them all."""

CODECS = frozenset(("vp8", "vp9", "mjpeg"))
"""Codecs that are read, by FFmpeg's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureHeader:
    """What one picture says about itself."""

    width: int
    height: int
    sample_format: tuple[int, ...]
    """Profile, bit depth, colours, chroma subsampling: equal for pictures of one format."""


def read_headers(codec: str, packet: Packet) -> list[PictureHeader]:
    """Headers of the pictures in a packet that bring their own size; the others have that of one before.

    Raises ValueError when a header ends early or is none.
    """
    data = bytes(packet)
    match codec:
        case "vp8":
            return _vp8(data)
        case "vp9":
            return [header for start in vp9_starts(data) if (header := _vp9(data[start : start + 32]))]
        case "mjpeg":
            return [_jpeg(match[1]) for match in _JPEG_FRAME.finditer(data)]
        case _:
            raise ValueError(f"codec must be one of {sorted(CODECS)}, got {codec!r}")


def differing(codec: str, packets: Iterable[Packet], width: int, height: int) -> bool:
    """Whether a picture is of another size than the one given, or two are of different formats.

    Raises ValueError as ``read_headers``.
    """
    formats: set[tuple[int, ...]] = set()
    for packet in packets:
        for header in read_headers(codec, packet):
            if (header.width, header.height) != (width, height):
                return True
            formats.add(header.sample_format)
    return len(formats) > 1


def vp9_starts(data: bytes) -> list[int]:
    """Where each frame of a VP9 packet begins; a superframe ends in an index of its frames' sizes (annex B)."""
    marker, starts = data[-1], [0]
    if marker & 0xE0 == 0xC0:
        width, number = (marker >> 3 & 3) + 1, (marker & 7) + 1
        index = data[-(1 + width * number) : -1]
        sizes = [int.from_bytes(index[at : at + width], "little") for at in range(0, len(index), width)]
        starts = [sum(sizes[:at]) for at in range(number)]
    return [start for start in starts if start < len(data)]


def _vp8(data: bytes) -> list[PictureHeader]:
    if data[0] & 1:
        return []
    if data[3:6] != _VP8_START or len(data) < 10:
        raise ValueError("a keyframe has no start code")
    width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (6, 8))
    return [PictureHeader(width=width, height=height, sample_format=())]


def _jpeg(frame: bytes) -> PictureHeader:
    height, width = (int.from_bytes(frame[at : at + 2], "big") for at in (3, 5))
    components = frame[8 : 8 + 3 * frame[7]]
    sampling = (components[at] for at in range(1, len(components), 3))
    return PictureHeader(width=width, height=height, sample_format=(frame[2], frame[7], *sampling))


class _Bits:
    """Reads bits, the highest first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def __call__(self, count: int = 1) -> int:
        self._left -= count
        if self._left < 0:
            raise ValueError("a header ends early")
        return self._value >> self._left & (1 << count) - 1


def _vp9(data: bytes) -> PictureHeader | None:
    """None for a frame whose size is that of a frame before."""
    bits = _Bits(data)
    if bits(2) != 2:
        raise ValueError("a frame has no marker")
    profile = bits() + 2 * bits()
    if profile == 3:
        bits()
    if bits():  # show_existing_frame
        return None
    is_inter, is_shown, is_resilient = bits(), bits(), bits()
    if not is_inter:
        return _vp9_intra(bits, profile, is_keyframe=True)
    is_intra_only = 0 if is_shown else bits()
    if not is_resilient:
        bits(2)
    if is_intra_only:
        return _vp9_intra(bits, profile, is_keyframe=False)
    bits(8 + 3 * 4)
    if any(bits() for _ in range(3)):  # found_ref
        return None
    width, height = bits(16) + 1, bits(16) + 1
    return PictureHeader(width=width, height=height, sample_format=(profile,))


def _vp9_intra(bits: _Bits, profile: int, *, is_keyframe: bool) -> PictureHeader:
    if bits(24) != _VP9_SYNC:
        raise ValueError("a frame has no sync code")
    sample_format = _vp9_colours(bits, profile) if is_keyframe or profile > 0 else (profile,)
    if not is_keyframe:
        bits(8)
    width, height = bits(16) + 1, bits(16) + 1
    return PictureHeader(width=width, height=height, sample_format=sample_format)


def _vp9_colours(bits: _Bits, profile: int) -> tuple[int, ...]:
    """Profile, and what it leaves open: bit depth, matrix, range and chroma subsampling."""
    depth = bits() if profile >= 2 else 0
    matrix = bits(3)
    is_rgb = matrix == _VP9_RGB
    value_range = 1 if is_rgb else bits()
    subsampling = 0
    if profile in (1, 3):
        subsampling = bits() if is_rgb else bits(3)
    return (profile, depth, matrix, value_range, subsampling)
