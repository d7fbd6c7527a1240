"""What a video packet says about references: where decoding may begin, and which pictures no other one needs.

Bitstream syntax: H.264 (ITU-T H.264, 7.3.1 and D.1.8), HEVC (ITU-T H.265, 7.3.1.2 and D.2.8), VP8 (RFC 6386, 9.1),
VP9 (bitstream specification 0.7, 6.2 and annex B), AV1 (bitstream specification 1.0, 5.3 and 5.9.2).
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

from av.packet import Packet

from omnigrpo.media.picture_headers import vp9_starts

_H264_IDR, _H264_SEI, _H264_SLICES = 5, 6, range(1, 6)
_HEVC_RANDOM_ACCESS, _HEVC_SLICES, _HEVC_SUB_LAYER_NON_REFERENCE = range(16, 24), range(32), range(0, 15, 2)
_H264_PARAMETERS, _HEVC_PARAMETERS = (7, 8), (32, 33, 34)
_HEVC_BREAKS = (16, 17, 18, 36, 37)
"""Broken links and ends of sequences: pictures stored after them may never be shown."""
_HEVC_CLEAN_RANDOM_ACCESS, _HEVC_BROKEN_LINK = 21, 18
"""The second is the first one after a splice, without pictures that are shown before it."""
_AV1_FRAMES, _AV1_SHOWN_KEYFRAME = (3, 6), 0x10
_RECOVERY_POINT = 6

KEYFRAMES_ARE_ENTRY_POINTS = frozenset(("vp8", "vp9", "av1", "mpeg4", "mpeg2video", "mpeg1video", "mjpeg"))
"""Codecs whose keyframes need no earlier picture, by FFmpeg's names."""


_DISPOSABLE_BY_DECODER = frozenset(("mpeg1video", "mpeg2video", "mpeg4"))
"""Codecs whose decoders know disposable pictures (B) by themselves, and keep no state of them that others need."""


class NalReader:
    """Splits packets of one H.264 or HEVC stream into NAL units."""

    def __init__(self, extradata: bytes | None, *, is_hevc: bool) -> None:
        length_byte = 21 if is_hevc else 4
        is_prefixed = extradata is not None and len(extradata) > length_byte and extradata[0] == 1
        self.length_size = (extradata[length_byte] & 3) + 1 if extradata and is_prefixed else None
        """Bytes of the length in front of each unit; None for start codes (Annex B)."""
        self._units: dict[int, list[memoryview]] = {}

    def units(self, packet: Packet) -> list[memoryview]:
        """The units' bytes, header included and none empty; a damaged packet ends them early.

        Kept, so that each packet is split once: packets must outlive the reader.
        """
        known = self._units.get(id(packet))
        if known is None:
            data = memoryview(packet)  # type: ignore[arg-type] (a packet has a buffer)
            split = (
                _annex_b_units(data) if self.length_size is None else _prefixed_units(data, self.length_size)
            )
            known = self._units[id(packet)] = [unit for unit in split if len(unit)]
        return known


class ReferenceReader:
    """Reads the packets of one stream.

    Args:
        codec: FFmpeg's name.
        extradata: the stream's, which tells how H.264 and HEVC packets are split.
        packets: all of the stream; HEVC's highest temporal layer is found in them.
    """

    def __init__(self, codec: str, extradata: bytes | None, packets: Sequence[Packet]) -> None:
        self._nals = NalReader(extradata, is_hevc=codec == "hevc")
        self._extradata = extradata or b""
        self._packets = packets
        self._codec = (
            codec  # And no bound methods: in a circle with them, the packets would outlive their clip.
        )
        self.skip: Literal["NONREF", "DEFAULT"] = "NONREF" if codec in _DISPOSABLE_BY_DECODER else "DEFAULT"
        """What the decoder may leave out of packets that are not wanted."""

    def is_entry_point(self, packet: Packet) -> bool:
        """Whether all pictures shown after this one can be decoded from here on."""
        if not packet.is_keyframe:
            return False
        match self._codec:
            case "h264":
                return self._is_h264_entry_point(packet)
            case "hevc":
                return self._is_hevc_entry_point(packet)
            case "av1":
                return _is_av1_entry_point(packet)
            case codec:
                return codec in KEYFRAMES_ARE_ENTRY_POINTS

    def can_begin(self, packet: Packet) -> bool:
        """Whether a stream that begins with this packet is whole; of codecs that are not read, its flag tells."""
        is_read = self._codec in KEYFRAMES_ARE_ENTRY_POINTS or self._codec in ("h264", "hevc")
        return self.is_entry_point(packet) if is_read else packet.is_keyframe

    def forgets(self, packet: Packet) -> bool:
        """Whether no picture from this one on, shown after it, depends on what the decoder keeps of those before.

        HEVC's clean random access pictures do once they are broken links.
        """
        if self._codec != "h264":
            return self.is_entry_point(packet)
        return any(unit[0] & 31 == _H264_IDR for unit in self._nals.units(packet))

    def as_broken_link(self, packet: Packet) -> bytes:
        """The packet's bytes; of a clean random access picture of HEVC, those of the same picture after a splice."""
        data = bytearray(packet)
        if self._codec == "hevc":
            at = 0
            for unit in self._nals.units(packet):
                at = data.index(unit, at)
                if unit[0] >> 1 & 63 == _HEVC_CLEAN_RANDOM_ACCESS:
                    data[at] = unit[0] & 0x81 | _HEVC_BROKEN_LINK << 1
                at += len(unit)
        return bytes(data)

    def shows_again(self, packet: Packet) -> bool:
        """Whether the packet holds no picture but shows an older one again, as VP9 can."""
        return self._codec == "vp9" and _shows_vp9_again(packet)

    def is_disposable(self, packet: Packet) -> bool:
        """Whether no other picture refers to this one; False where the codec is not read."""
        match self._codec:
            case "h264":
                return self._is_h264_disposable(packet)
            case "hevc":
                return self._is_hevc_disposable(packet)
            case _:
                return False

    def is_hidden(self, packet: Packet) -> bool:
        """Whether the packet's picture is never shown (VP8's, VP9's alternate references), or keeps others from it."""
        match self._codec:
            case "hevc":
                return self._may_hide_hevc(packet)
            case "vp8":
                return _is_vp8_hidden(packet)
            case "vp9":
                return _is_vp9_hidden(packet)
            case _:
                return False

    def carries_parameters(self, packet: Packet) -> bool:
        """Whether the packet brings the parameters of its pictures with it."""
        return packet.has_sidedata("new_extradata") or bool(self._parameter_sets(packet))

    def changes_parameters(self, packet: Packet) -> bool:
        """Whether parameters other than the stream's own are in force from this packet on."""
        return packet.has_sidedata("new_extradata") or any(
            unit not in self._extradata for unit in self._parameter_sets(packet)
        )

    def _is_h264_entry_point(self, packet: Packet) -> bool:
        """An IDR picture, or one whose recovery point is itself (an open group, not a gradual refresh)."""
        for unit in self._nals.units(packet):
            kind = unit[0] & 31
            if kind == _H264_SEI and _recovery_frames(bytes(unit[1:])) == 0:
                return True
            if kind in _H264_SLICES:
                return kind == _H264_IDR
        return False

    def _is_hevc_entry_point(self, packet: Packet) -> bool:
        slices = self._hevc_slices(packet)
        return bool(slices) and slices[0][0] in _HEVC_RANDOM_ACCESS

    def _is_h264_disposable(self, packet: Packet) -> bool:
        slices = [unit[0] for unit in self._nals.units(packet) if unit[0] & 31 in _H264_SLICES]
        return bool(slices) and not any(header & 0x60 for header in slices)

    def _is_hevc_disposable(self, packet: Packet) -> bool:
        """A non-reference picture of its temporal layer may still serve the layers above it."""
        slices = self._hevc_slices(packet)
        return bool(slices) and all(
            kind in _HEVC_SUB_LAYER_NON_REFERENCE and layer == self._highest_hevc_layer
            for kind, layer in slices
        )

    def _parameter_sets(self, packet: Packet) -> list[bytes]:
        match self._codec:
            case "h264":
                return self._h264_parameter_sets(packet)
            case "hevc":
                return self._hevc_parameter_sets(packet)
            case _:
                return []

    def _h264_parameter_sets(self, packet: Packet) -> list[bytes]:
        sets = []
        for unit in self._nals.units(packet):
            kind = unit[0] & 31
            if kind in _H264_SLICES:
                break
            if kind in _H264_PARAMETERS:
                sets.append(bytes(unit).rstrip(b"\0"))
        return sets

    def _hevc_parameter_sets(self, packet: Packet) -> list[bytes]:
        sets = []
        for unit in self._nals.units(packet):
            kind = unit[0] >> 1 & 63
            if kind in _HEVC_SLICES:
                break
            if kind in _HEVC_PARAMETERS:
                sets.append(bytes(unit).rstrip(b"\0"))
        return sets

    def _may_hide_hevc(self, packet: Packet) -> bool:
        """A break is harmless in the last packet, and before the first one."""
        kinds = {unit[0] >> 1 & 63 for unit in self._nals.units(packet)}
        return not kinds.isdisjoint(_HEVC_BREAKS) and packet not in (self._packets[0], self._packets[-1])

    @cached_property
    def _highest_hevc_layer(self) -> int:
        return max((layer for packet in self._packets for _, layer in self._hevc_slices(packet)), default=0)

    def _hevc_slices(self, packet: Packet) -> list[tuple[int, int]]:
        """(unit type, temporal id plus one) of each slice."""
        headers = [unit[:2] for unit in self._nals.units(packet) if len(unit) >= 2]
        kinds = [(header[0] >> 1 & 63, header[1] & 7) for header in headers]
        return [(kind, layer) for kind, layer in kinds if kind in _HEVC_SLICES]


def _prefixed_units(data: memoryview, length_size: int) -> Iterator[memoryview]:
    at = 0
    while at + length_size < len(data):
        size = int.from_bytes(data[at : at + length_size], "big")
        at += length_size
        yield data[at : at + size]
        at += size


def _annex_b_units(data: memoryview) -> Iterator[memoryview]:
    whole = bytes(data)
    start = whole.find(b"\0\0\1")
    while start >= 0:
        following = whole.find(b"\0\0\1", start + 3)
        yield data[start + 3 : following if following >= 0 else len(data)]
        start = following


def _recovery_frames(sei: bytes) -> int | None:
    """``recovery_frame_cnt`` of an H.264 SEI unit's payloads; None when it holds no recovery point."""
    data = sei.replace(b"\0\0\3", b"\0\0")
    at = 0
    while at + 2 <= len(data):
        kind, at = _ff_coded(data, at)
        size, at = _ff_coded(data, at)
        if kind == _RECOVERY_POINT:
            return _exp_golomb(data[at : at + size])
        at += size
    return None


def _ff_coded(data: bytes, at: int) -> tuple[int, int]:
    """A number in SEI's coding (255 per byte 0xFF, then the rest), and where it ends."""
    value = 0
    while at < len(data) and data[at] == 255:
        value, at = value + 255, at + 1
    return value + (data[at] if at < len(data) else 0), at + 1


def _exp_golomb(data: bytes) -> int | None:
    bits = "".join(f"{byte:08b}" for byte in data[:8])
    zeros = len(bits) - len(bits.lstrip("0"))
    code = bits[zeros : 2 * zeros + 1]
    return int(code, 2) - 1 if len(code) == zeros + 1 else None


def _is_av1_entry_point(packet: Packet) -> bool:
    """A keyframe that is shown at once; one that is shown later does not end what pictures before it may refer to."""
    data, at = bytes(packet), 0
    while at < len(data):
        header = data[at]
        at += 2 if header & 4 else 1
        size, at = _leb128(data, at) if header & 2 else (len(data) - at, at)
        if header >> 3 & 15 in _AV1_FRAMES and at < len(data):
            return data[at] & 0xF0 == _AV1_SHOWN_KEYFRAME
        at += size
    return False


def _leb128(data: bytes, at: int) -> tuple[int, int]:
    """A number in AV1's coding (seven bits per byte, the lowest first), and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : at + 8]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    return value, len(data)


def _is_vp9_hidden(packet: Packet) -> bool:
    """Whether no frame of the packet is shown."""
    return not any(map(_shows_vp9, _vp9_headers(packet)))


def _shows_vp9_again(packet: Packet) -> bool:
    return any(_shows_existing_vp9(header) for header in _vp9_headers(packet))


def _vp9_headers(packet: Packet) -> list[int]:
    """First byte of each frame."""
    data = bytes(packet)
    return [data[start] for start in vp9_starts(data)]


def _shows_vp9(header: int) -> bool:
    """``show_existing_frame`` or ``show_frame``; profile 3 has one more bit before them."""
    shift = 0 if header & 0x30 == 0x30 else 1
    return bool(header >> shift & 0b101)


def _shows_existing_vp9(header: int) -> bool:
    return bool(header & (0x04 if header & 0x30 == 0x30 else 0x08))


def _is_vp8_hidden(packet: Packet) -> bool:
    return packet.size > 0 and not bytes(packet)[0] & 0x10
