"""Sizes and formats that pictures and descriptions claim, of real streams and of damaged ones."""

from pathlib import Path

import av
import pytest
from av.packet import Packet
from clip_files import ClipRecipe, write_clip
from clip_matrix import MATRIX, write

from omnigrpo.media.codec_description import sequence_sets
from omnigrpo.media.picture_headers import differing, read_headers


def _packets(path: Path) -> tuple[str, bytes, list[Packet]]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        return stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b"", packets


@pytest.mark.parametrize(
    "clip",
    [clip for clip in MATRIX if clip.name.startswith(("vp", "mjpeg"))],
    ids=lambda clip: clip.name,
)
def test_all_pictures_of_a_clip_agree_with_its_header(tmp_path: Path, clip):
    codec, _, packets = _packets(write(clip, tmp_path))
    headers = [header for packet in packets for header in read_headers(codec, packet)]
    assert len(headers) >= 1
    assert {(header.width, header.height) for header in headers} == {(96, 64)}
    assert not differing(codec, packets, 96, 64)
    assert differing(codec, packets, 96, 66)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9", "mjpeg"])
def test_a_picture_of_another_size_is_seen(tmp_path: Path, codec: str):
    small, large = (
        _packets(write_clip(tmp_path / f"{width}.mkv", ClipRecipe(
            width=width, codec=codec, num_frames=5, options={}, tone_hertz=None,
            pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p")))
        for width in (96, 352)
    )  # fmt: skip
    assert not differing(small[0], small[2], 96, 64)
    assert differing(small[0], [*small[2], *large[2]], 96, 64)


def test_jpeg_pictures_of_another_format_are_seen(tmp_path: Path):
    first, second = (
        _packets(write_clip(tmp_path / f"{name}.mov", ClipRecipe(
            codec="mjpeg", num_frames=3, options={}, tone_hertz=None, pixel_format=name)))[2]
        for name in ("yuvj420p", "yuvj422p")
    )  # fmt: skip
    assert not differing("mjpeg", first, 96, 64)
    assert differing("mjpeg", [*first, *second], 96, 64)


@pytest.mark.parametrize(
    ("codec", "data"),
    [("vp8", bytes(20)), ("vp8", b"\0\0\0\x9d\1\x2a"), ("vp9", bytes(20)), ("vp9", b"\x82\x49"), ("vp9", b"\x80" * 9)],
)  # fmt: skip
def test_what_is_no_header_is_refused(codec: str, data: bytes):
    with pytest.raises(ValueError, match=r"code|early|marker"):
        read_headers(codec, Packet(data))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h264_gop30.mp4", 1),
        ("h264_open_gop.ts", 1),
        ("h264.avi", 1),
        ("hevc.mp4", 1),
        ("hevc_open_gop.ts", 1),
    ],
)
def test_sequence_sets_of_a_description(tmp_path: Path, name: str, expected: int):
    codec, extradata, _ = _packets(write(next(clip for clip in MATRIX if clip.name == name), tmp_path))
    sets = sequence_sets(codec, extradata)
    assert len(sets) == expected
    other = next(iter(sets))[:-1] + b"\x55"
    if extradata[:1] != b"\1":
        assert len(sequence_sets(codec, extradata + b"\0\0\1" + other)) == expected + 1
    elif codec == "h264":
        size = len(other).to_bytes(2, "big")
        two = extradata[:5] + bytes((0xE2,)) + size + other + extradata[6:]
        assert sequence_sets(codec, two) == {*sets, other}
    assert sequence_sets(codec, b"") == set()
