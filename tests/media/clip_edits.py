"""Changes written clips: packets left out, hidden, joined or appended, and edit lists."""

import struct
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import av
from av.container import InputContainer, OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream
from clip_files import ClipRecipe, write_clip
from mp4_boxes import add_description, set_edits, time_scales


def drop_packets(number: int) -> Callable[[Path], object]:
    """Leave out the first packets of the video, as a recording that starts in the middle."""
    return partial(_keep, first=lambda packets: number)


def keep_from_second_keyframe(path: Path) -> None:
    """Leave out the first group of pictures."""
    _keep(path, first=lambda packets: [at for at, packet in enumerate(packets) if packet.is_keyframe][1])


def _keep(path: Path, *, first: Callable[[Sequence[Packet]], int]) -> None:
    """Copy the video's packets from one on."""
    whole = path.rename(path.with_stem("whole"))
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        packets = _packets(source)
        for packet in packets[first(packets) :]:
            packet.stream = out
            target.mux(packet)
    whole.unlink()


def _remux(path: Path, change: Callable[[Sequence[Packet]], Iterable[tuple[bytes, int, bool]]]) -> None:
    """Write the video's packets anew: (bytes, time stamp, whether it is a keyframe) of each that is kept."""
    whole = path.rename(path.with_stem("whole"))
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        packets = _packets(source)
        for data, stamp, is_keyframe in change(packets):
            _mux(target, out, packets[0], data, stamp, is_keyframe=is_keyframe)
    whole.unlink()


def _packets(source: InputContainer) -> list[Packet]:
    return [packet for packet in source.demux(video=0) if packet.size]


def _pts(packet: Packet) -> int:
    assert packet.pts is not None
    return packet.pts


def _mux(
    target: OutputContainer,
    out: VideoStream,
    like: Packet,
    data: bytes,
    stamp: int,
    *,
    is_keyframe: bool | None = None,
) -> None:
    """Write a packet that is shown in the order in which it is stored."""
    packet = Packet(data)
    packet.pts = packet.dts = stamp
    packet.time_base, packet.stream = like.time_base, out
    packet.is_keyframe = like.is_keyframe if is_keyframe is None else is_keyframe
    target.mux(packet)


def hide_some_vp8(path: Path) -> None:
    """Clear the flag of every seventh picture that says that it is shown."""

    def change(packets: Sequence[Packet]) -> Iterable[tuple[bytes, int, bool]]:
        for at, packet in enumerate(packets):
            data = bytearray(packet)
            data[0] &= 0xFF if at % 7 != 4 else 0xEF
            yield bytes(data), _pts(packet), packet.is_keyframe

    _remux(path, change)


def join_vp9_keyframes(path: Path) -> None:
    """Put each keyframe, not shown, into one packet with the picture after it."""

    def change(packets: Sequence[Packet]) -> Iterable[tuple[bytes, int, bool]]:
        hidden = b""
        for packet in packets:
            data = bytes(packet)
            if packet.is_keyframe:
                hidden = _not_shown(data)
            elif hidden:
                marker = bytes((0b1100_1001,))
                index = marker + struct.pack("<2H", len(hidden), len(data)) + marker
                yield hidden + data + index, _pts(packet), True
                hidden = b""
            else:
                yield data, _pts(packet), False

    _remux(path, change)


def hide_vp9_keyframes(path: Path) -> None:
    """Do not show keyframes; changed in the file, because a muxer would join them with the next picture."""
    with av.open(str(path)) as source:
        keyframes = [bytes(packet) for packet in source.demux(video=0) if packet.is_keyframe]
    content = path.read_bytes()
    for data in keyframes:
        content = content.replace(data, _not_shown(data))
    path.write_bytes(content)


def _not_shown(vp9: bytes) -> bytes:
    """A keyframe of profile 0 without the flag that shows it."""
    return bytes((vp9[0] & 0xFD,)) + vp9[1:]


def show_vp9_again(path: Path) -> None:
    """Between two pictures show one that is kept."""

    def change(packets: Sequence[Packet]) -> Iterable[tuple[bytes, int, bool]]:
        step = _pts(packets[1]) - _pts(packets[0])
        for packet in packets:
            yield bytes(packet), _pts(packet), packet.is_keyframe
            yield b"\x88", _pts(packet) + step // 2, False

    _remux(path, change)


def break_hevc_links(path: Path) -> None:
    """Turn clean random access pictures (21) into broken links (16)."""
    content = path.read_bytes().replace(b"\0\0\1\x2a\1", b"\0\0\1\x20\1")
    path.write_bytes(content)


def append(recipe: ClipRecipe, *, is_described: bool, num_lost: int = 0) -> Callable[[Path], object]:
    """Append the pictures of another recipe to those of an H.264 clip without sound.

    Args:
        recipe: H.264 with other parameters, without sound and without B-frames.
        is_described: the parameters lie in a description of their own, else in the first packet.
        num_lost: packets that are left out at the beginning.
    """

    def edit(path: Path) -> None:
        first, second = path.rename(path.with_stem("first")), path.with_stem("second")
        write_clip(second, recipe)
        with av.open(str(first)) as a, av.open(str(second)) as b, av.open(str(path), "w") as target:
            out = target.add_stream_from_template(a.streams.video[0])
            head = _packets(a)[num_lost:]
            tail = _packets(b)
            units = (
                b"" if is_described else _parameter_units(b.streams.video[0].codec_context.extradata or b"")
            )
            end = max(_pts(packet) + (packet.duration or 0) for packet in head)
            for packet in head:
                _mux(target, out, packet, bytes(packet), _pts(packet))
            for at, packet in enumerate(tail):
                _mux(target, out, packet, bytes(packet) if at else units + bytes(packet), _pts(packet) + end)
        if is_described:
            add_description(path, second, len(head))
        first.unlink()
        second.unlink()

    return edit


def append_packets(path: Path, other: Path) -> None:
    """Append the pictures of another file of the same codec, without B-frames, whatever their size."""
    first = path.rename(path.with_stem("first"))
    with av.open(str(first)) as a, av.open(str(other)) as b, av.open(str(path), "w") as target:
        out = target.add_stream_from_template(a.streams.video[0])
        head, tail = _packets(a), _packets(b)
        end = max(_pts(packet) + (packet.duration or 1) for packet in head)
        for packet in head:
            _mux(target, out, packet, bytes(packet), _pts(packet))
        for packet in tail:
            _mux(target, out, packet, bytes(packet), _pts(packet) + end)
    first.unlink()


def _parameter_units(avcc: bytes) -> bytes:
    """The parameter sets of an avcC record, each behind its length in four bytes."""
    sps_end = 8 + int.from_bytes(avcc[6:8], "big")
    pps_end = sps_end + 3 + int.from_bytes(avcc[sps_end + 1 : sps_end + 3], "big")
    return b"\0\0" + avcc[6:sps_end] + b"\0\0" + avcc[sps_end + 1 : pps_end]


def edits(*parts: tuple[float, float | None]) -> Callable[[Path], object]:
    """An edit list of (seconds, start in seconds; None is a pause)."""

    def edit(path: Path) -> None:
        movie, track = time_scales(path)
        set_edits(path, [(round(s * movie), -1 if at is None else round(at * track)) for s, at in parts])

    return edit
