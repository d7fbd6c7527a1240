"""The sequence parameter sets that a stream's description holds; one of them means pictures of one size and format.

Layouts: avcC (ISO/IEC 14496-15, 5.3.3.1), hvcC (8.3.3.1), start codes (Annex B of ITU-T H.264 and H.265).
"""

from collections.abc import Iterator

_SPS_H264, _SPS_HEVC = 7, 33


def sequence_sets(codec: str, extradata: bytes) -> set[bytes]:
    """Distinct sequence parameter sets of an H.264 or HEVC stream."""
    if extradata[:1] != b"\1":
        return {unit.rstrip(b"\0") for unit in _start_code_units(extradata) if _is_sequence(codec, unit)}
    units = _avcc_sequences(extradata) if codec == "h264" else _hvcc_units(extradata)
    return {unit for unit in units if _is_sequence(codec, unit)}


def _is_sequence(codec: str, unit: bytes) -> bool:
    if not unit:
        return False
    return unit[0] & 31 == _SPS_H264 if codec == "h264" else unit[0] >> 1 & 63 == _SPS_HEVC


def _start_code_units(data: bytes) -> list[bytes]:
    return data.split(b"\0\0\1")[1:]


def _avcc_sequences(data: bytes) -> Iterator[bytes]:
    at = 6
    for _ in range(data[5] & 31 if len(data) > 5 else 0):
        size = int.from_bytes(data[at : at + 2], "big")
        yield data[at + 2 : at + 2 + size]
        at += 2 + size


def _hvcc_units(data: bytes) -> Iterator[bytes]:
    at = 23
    for _ in range(data[22] if len(data) > 22 else 0):
        number = int.from_bytes(data[at + 1 : at + 3], "big")
        at += 3
        for _ in range(number):
            size = int.from_bytes(data[at : at + 2], "big")
            yield data[at + 2 : at + 2 + size]
            at += 2 + size
