"""The clips on which sparse decoding must equal sequential decoding, and the sequential decoder that judges."""

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from clip_files import ClipRecipe, write_clip
from mp4_boxes import add_description, set_edits, set_rotation, time_scales
from torch import Tensor

FLAGS = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

_OPUS = {"audio_codec": "libopus", "audio_rate": 48_000}
_VARIABLE = [20 * i + 3 * i * i for i in range(60)]


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixClip:
    """One clip of the matrix."""

    name: str
    """File name; its extension is the container's."""
    recipe: ClipRecipe
    edit: Callable[[Path], object] | None = None
    """What is changed in the written file."""
    is_sparse: bool
    """Whether pictures may be left out."""
    numbers: range | None = field(default=range(60))
    """What the judge must read in the pictures; None where they are turned or cut at a group."""


def write(clip: MatrixClip, directory: Path) -> Path:
    """Write the clip's file."""
    path = write_clip(directory / clip.name, clip.recipe)
    if clip.edit is not None:
        clip.edit(path)
    return path


def _x264(parameters: str = "", **changes: object) -> ClipRecipe:
    options = {"preset": "veryfast", "crf": "12", "x264-params": f"bframes=3:scenecut=0:{parameters}"}
    return ClipRecipe(num_frames=60, options=options, **changes)  # type: ignore[arg-type]


def _x265(parameters: str = "", **changes: object) -> ClipRecipe:
    options = {"preset": "superfast", "crf": "12", "x265-params": f"log-level=none:scenecut=0:{parameters}"}
    return ClipRecipe(num_frames=60, codec="libx265", options=options, **changes)  # type: ignore[arg-type]


def _other(codec: str, options: dict[str, str] | None = None, **changes: object) -> ClipRecipe:
    return ClipRecipe(num_frames=60, codec=codec, options=options or {}, **changes)  # type: ignore[arg-type]


def _vpx(codec: str, options: dict[str, str], **changes: object) -> ClipRecipe:
    options = {"crf": "6", "b:v": "2M", "cpu-used": "8", "deadline": "realtime", "g": "20"} | options
    return _other(codec, options, **(_OPUS | changes))


def _av1(parameters: str = "", **changes: object) -> ClipRecipe:
    options = {"preset": "10", "crf": "12", "g": "20", "svtav1-params": parameters}
    return _other("libsvtav1", options, **(_OPUS | changes))


def _mpeg(codec: str, options: dict[str, str] | None = None, **changes: object) -> ClipRecipe:
    options = {"qscale": "2", "b": "4M", "g": "15"} | (options or {})
    return _other(codec, options, **({"audio_codec": "mp2"} | changes))


def _drop_packets(number: int) -> Callable[[Path], object]:
    """Copy a file without the first packets of its video, as a recording that starts in the middle."""

    def edit(path: Path) -> None:
        whole = path.rename(path.with_stem("whole"))
        with av.open(str(whole)) as source, av.open(str(path), "w") as target:
            stream = source.streams.video[0]
            out = target.add_stream_from_template(stream)
            packets = [packet for packet in source.demux(stream) if packet.size]
            for packet in packets[number:]:
                packet.stream = out
                target.mux(packet)
        whole.unlink()

    return edit


def _keep_from_second_keyframe(path: Path) -> None:
    with av.open(str(path)) as source:
        packets = [packet for packet in source.demux(video=0) if packet.size]
    keys = [at for at, packet in enumerate(packets) if packet.is_keyframe]
    _drop_packets(keys[1])(path)


def _remux(path: Path, change: Callable[[Sequence[Packet]], Iterable[tuple[bytes, int, bool]]]) -> None:
    """Write the video's packets anew: (bytes, time stamp, keyframe) for each that is kept."""
    whole = path.rename(path.with_stem("whole"))
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream_from_template(stream)
        for data, stamp, is_keyframe in change([packet for packet in source.demux(stream) if packet.size]):
            packet = Packet(data)
            packet.pts = packet.dts = stamp
            packet.time_base, packet.stream, packet.is_keyframe = stream.time_base, out, is_keyframe
            target.mux(packet)
    whole.unlink()


def _hide_some_vp8(path: Path) -> None:
    """Clear the flag of every seventh picture that says that it is shown."""

    def change(packets: Sequence[Packet]) -> Iterable[tuple[bytes, int, bool]]:
        for at, packet in enumerate(packets):
            data = bytearray(packet)
            data[0] &= 0xFF if at % 7 != 4 else 0xEF
            yield bytes(data), packet.pts, packet.is_keyframe

    _remux(path, change)


def _join_vp9_keyframes(path: Path) -> None:
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
                yield hidden + data + index, packet.pts, True
                hidden = b""
            else:
                yield data, packet.pts, False

    _remux(path, change)


def _hide_vp9_keyframes(path: Path) -> None:
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


def _show_vp9_again(path: Path) -> None:
    """Between two pictures show one that is kept."""

    def change(packets: Sequence[Packet]) -> Iterable[tuple[bytes, int, bool]]:
        step = packets[1].pts - packets[0].pts
        for packet in packets:
            yield bytes(packet), packet.pts, packet.is_keyframe
            yield b"\x88", packet.pts + step // 2, False

    _remux(path, change)


def _break_hevc_links(path: Path) -> None:
    """Turn clean random access pictures (21) into broken links (16)."""
    content = path.read_bytes().replace(b"\0\0\1\x2a\1", b"\0\0\1\x20\1")
    path.write_bytes(content)


def append(parameters: str, *, is_described: bool, num_lost: int = 0) -> Callable[[Path], object]:
    """Append the same pictures, encoded with other H.264 parameters.

    Args:
        parameters: x264's.
        is_described: the parameters lie in a description of their own, else in the first packet.
        num_lost: packets that are left out at the beginning.
    """

    def edit(path: Path) -> None:
        first, second = path.rename(path.with_stem("first")), path.with_stem("second")
        recipe = _x264(parameters, tone_hertz=None)
        write_clip(second, recipe)
        with av.open(str(first)) as a, av.open(str(second)) as b, av.open(str(path), "w") as target:
            out = target.add_stream_from_template(a.streams.video[0])
            extradata = b.streams.video[0].codec_context.extradata
            after = 0
            for source in (a, b):
                packets = [packet for packet in source.demux(video=0) if packet.size]
                packets = packets[num_lost if source is a else 0 :]
                for at, packet in enumerate(packets):
                    data = bytes(packet)
                    if source is b and at == 0 and not is_described:
                        data = _parameter_units(extradata) + data
                    new = Packet(data)
                    new.pts, new.dts, new.time_base = packet.pts + after, packet.dts + after, packet.time_base
                    new.is_keyframe, new.stream = packet.is_keyframe, out
                    target.mux(new)
                after = max(packet.pts + packet.duration for packet in packets)
        if is_described:
            add_description(path, second, 60 - num_lost)
        first.unlink(), second.unlink()

    return edit


def _parameter_units(avcc: bytes) -> bytes:
    """The parameter sets of an avcC record, each behind its length in four bytes."""
    sps_end = 8 + int.from_bytes(avcc[6:8], "big")
    pps_end = sps_end + 3 + int.from_bytes(avcc[sps_end + 1 : sps_end + 3], "big")
    return b"\0\0" + avcc[6:sps_end] + b"\0\0" + avcc[sps_end + 1 : pps_end]


def _edits(*parts: tuple[float, float | None]) -> Callable[[Path], object]:
    """An edit list of (seconds, start in seconds; None is a pause)."""

    def edit(path: Path) -> None:
        movie, track = time_scales(path)
        set_edits(path, [(round(s * movie), -1 if at is None else round(at * track)) for s, at in parts])

    return edit


def _sparse(name: str, recipe: ClipRecipe, **changes: object) -> MatrixClip:
    return MatrixClip(name=name, recipe=recipe, is_sparse=True, **changes)  # type: ignore[arg-type]


def _full(name: str, recipe: ClipRecipe, **changes: object) -> MatrixClip:
    return MatrixClip(name=name, recipe=recipe, is_sparse=False, **changes)  # type: ignore[arg-type]


H264 = (
    _sparse("h264_gop250.mp4", _x264("keyint=250")),
    _sparse("h264_gop30.mp4", _x264("keyint=30")),
    _sparse("h264_slices.mp4", _x264("keyint=30:slices=4:bframes=2")),
    _sparse("h264_without_b.mp4", _x264("keyint=20:bframes=0:ref=3:cabac=0")),
    _sparse("h264_open_gop.mp4", _x264("keyint=15:open-gop=1")),
    _sparse("h264_open_gop.mkv", _x264("keyint=15:open-gop=1:b-pyramid=strict")),
    _sparse("h264_open_gop.ts", _x264("keyint=15:open-gop=1")),
    _sparse("h264_pyramid.mkv", _x264("keyint=60:bframes=8:b-adapt=0:ref=6:b-pyramid=normal")),
    _sparse("h264_flat_b.mov", _x264("keyint=20:b-pyramid=none:b-adapt=0")),
    _sparse("h264_intra_refresh.mp4", _x264("keyint=20:intra-refresh=1")),
    _sparse("h264_intra_refresh.ts", _x264("keyint=20:intra-refresh=1:bframes=2")),
    _full("h264_interlaced.mp4", _x264("keyint=20:tff=1")),
    _full("h264_interlaced.ts", _x264("keyint=20:bff=1")),
    _sparse("h264_vfr.mp4", _x264("keyint=20", stamps=_VARIABLE)),
    _sparse("h264_vfr.mkv", _x264("keyint=20:open-gop=1", stamps=_VARIABLE)),
    _sparse("h264_late_sound.mp4", _x264("keyint=20", audio_delay_seconds=0.7)),
    _sparse("h264_edit_cut.mp4", _x264("keyint=30"), edit=_edits((1.2, 0.88)), numbers=range(20, 50)),
    _sparse("h264_edit_pause.mp4", _x264("keyint=20"), edit=_edits((0.5, None), (2.4, 0.08))),
    _full("h264_edit_twice.mp4", _x264("keyint=20"), edit=_edits((0.8, 0.48), (0.8, 0.28)), numbers=None),
    _sparse("h264_turned.mp4", _x264("keyint=20"), edit=lambda path: set_rotation(path, 90), numbers=None),
    _sparse("h264_turned.mov", _x264("keyint=20"), edit=lambda path: set_rotation(path, 270), numbers=None),
    _sparse("h264_fragments.mp4", _x264("keyint=20", container_options={"movflags": "frag_keyframe+empty_moov"})),
    _sparse("h264_odd_size.mp4", _x264("keyint=20", width=98, height=66)),
    _full("h264.avi", _x264("keyint=20", audio_codec="mp3")),
    _sparse("h264.flv", _x264("keyint=20")),
    _full("h264.h264", _x264("keyint=20", tone_hertz=None)),
    _sparse("h264_10_bit.mkv", _x264("keyint=20", pixel_format="yuv420p10le")),
    _sparse("h264_444.mp4", _x264("keyint=20", pixel_format="yuv444p")),
    _sparse("h264_709.mp4", _x264("keyint=20", colour=(Colorspace.ITU709, ColorRange.MPEG))),
    _sparse("h264_full_range.mp4", _x264("keyint=20", pixel_format="yuvj420p")),
    _sparse("h264_two_descriptions.mp4", _x264("keyint=15:ref=1:bframes=0", tone_hertz=None),
            edit=append("keyint=15:bframes=0:cabac=0:8x8dct=0", is_described=True), numbers=None),
    _sparse("h264_new_parameters.mp4", _x264("keyint=15:ref=1:bframes=0", tone_hertz=None),
            edit=append("keyint=15:bframes=0:cabac=0:8x8dct=0", is_described=False), numbers=None),
    _sparse("h264_all_intra.mp4", _x264("keyint=1")),
    _full("h264_joined_late.ts", _x264("keyint=15:open-gop=1"), edit=_drop_packets(7), numbers=None),
    _full("h264_starts_open.ts", _x264("keyint=15:open-gop=1"), edit=_keep_from_second_keyframe, numbers=None),
)
HEVC = (
    _sparse("hevc.mp4", _x265("keyint=20:open-gop=0")),
    _sparse("hevc_gop250.mkv", _x265("keyint=250:bframes=4")),
    _sparse("hevc_open_gop.mp4", _x265("keyint=15:open-gop=1:b-adapt=0:bframes=3")),
    _sparse("hevc_open_gop.ts", _x265("keyint=15:open-gop=1:b-adapt=0:bframes=3")),
    _sparse("hevc_without_b.mov", _x265("keyint=20:bframes=0")),
    _sparse("hevc_flat_b.mkv", _x265("keyint=20:b-pyramid=0:bframes=3:b-adapt=0")),
    _sparse("hevc_layers.mp4", _x265("keyint=20:temporal-layers=3:bframes=3:b-adapt=0")),
    _sparse("hevc_radl.mp4", _x265("keyint=20:open-gop=0:radl=2:bframes=3:b-adapt=0")),
    _sparse("hevc_10_bit.mp4", _x265("keyint=20", pixel_format="yuv420p10le")),
    _sparse("hevc_10_bit.mkv", _x265("keyint=250", pixel_format="yuv420p10le")),
    _full("hevc_broken_links.ts", _x265("keyint=15:open-gop=1:b-adapt=0:bframes=3"),
          edit=_break_hevc_links, numbers=None),
    _full("hevc_starts_open.ts", _x265("keyint=15:open-gop=1:b-adapt=0:bframes=3"),
          edit=_keep_from_second_keyframe, numbers=None),
)  # fmt: skip
VP_AND_AV1 = (
    _sparse("vp8.webm", _vpx("libvpx", {})),
    _full("vp8_hidden.webm", _vpx("libvpx", {}), edit=_hide_some_vp8, numbers=None),
    _full("vp8.avi", _vpx("libvpx", {}, audio_codec="mp3", audio_rate=44_100)),
    _sparse("vp9.webm", _vpx("libvpx-vp9", {})),
    _sparse("vp9_hidden.webm", _vpx("libvpx-vp9", {}), edit=_join_vp9_keyframes, numbers=None),
    _full("vp9_hidden_apart.webm", _vpx("libvpx-vp9", {}),
          edit=_hide_vp9_keyframes, numbers=None),
    _sparse("vp9_shown_again.webm", _vpx("libvpx-vp9", {}), edit=_show_vp9_again, numbers=None),
    _sparse("vp9.mp4", _vpx("libvpx-vp9", {})),
    _sparse("vp9_444.mkv", _vpx("libvpx-vp9", {"profile": "1"}, pixel_format="yuv444p")),
    _sparse("av1.mp4", _av1()),
    _sparse("av1_open_gop.webm", _av1("irefresh-type=1")),
    _sparse("av1_10_bit.mkv", _av1(pixel_format="yuv420p10le")),
    _sparse("av1_low_delay.mkv", _av1("pred-struct=1")),
)
OLDER = (
    _sparse("mpeg4.mp4", _mpeg("mpeg4")),
    _sparse("mpeg4_b.mp4", _mpeg("mpeg4", {"bf": "2"})),
    _full("mpeg4_b.avi", _mpeg("mpeg4", {"bf": "2"})),
    _sparse("mpeg4_b.mkv", _mpeg("mpeg4", {"bf": "3", "flags": "+qpel+mv4"})),
    _sparse("mpeg2.ts", _mpeg("mpeg2video", {"bf": "2"})),
    _full("mpeg2.mpg", _mpeg("mpeg2video", {"bf": "2"})),
    _sparse("mpeg2.mkv", _mpeg("mpeg2video", {"bf": "2"})),
    _full("mpeg2_interlaced.ts", _mpeg("mpeg2video", {"bf": "2", "flags": "+ildct+ilme"})),
    _full("mpeg2_joined_late.ts", _mpeg("mpeg2video", {"bf": "2"}), edit=_drop_packets(5), numbers=None),
    _full("mpeg1.mpg", _mpeg("mpeg1video", {"bf": "2"})),
    _sparse("mjpeg.mov", _mpeg("mjpeg", pixel_format="yuvj420p")),
    _full("mjpeg.avi", _mpeg("mjpeg", pixel_format="yuvj422p")),
    _full("wmv2.wmv", _mpeg("wmv2", audio_codec="mp3")),
    _full("flv1.flv", _mpeg("flv", audio_codec="mp3")),
    _full("prores.mov", _other("prores_ks", pixel_format="yuv422p10le")),
)  # fmt: skip
MATRIX = H264 + HEVC + VP_AND_AV1 + OLDER


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """All pictures of a file, decoded one after the other."""

    images: tuple[Tensor, ...]
    """uint8 RGB ``[height, width, 3]``, upright."""
    seconds: tuple[Fraction, ...]
    """When each is shown, after the first one."""

    def pick(self, num_frames: int, start: float | None = None, end: float | None = None) -> Tensor:
        """The middles of equal segments of what is shown in a window."""
        inside = [
            image
            for image, at in zip(self.images, self.seconds, strict=True)
            if (start is None or at >= start) and (end is None or at < end)
        ]
        step = (len(inside) - 1) / num_frames
        return torch.stack([inside[round((i + 0.5) * step + 1e-6)] for i in range(num_frames)])


def judge(path: Path, colour: str = "tag") -> Judged:
    """Decode a file from its first packet to its last, in one thread."""
    source = Colorspace.ITU601 if colour == "bt601" else None
    images, stamps = [], []
    reformatter = VideoReformatter()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        starts = []
        for packet in container.demux(stream):
            starts += [packet.pts] if packet.pts is not None and not packet.is_discard else []
            for frame in packet.decode():
              rgb = reformatter.reformat(frame, format="rgb24", src_colorspace=source, interpolation=FLAGS)
              image = np.rot90(rgb.to_ndarray(), k=round(frame.rotation / 90))
              images.append(torch.from_numpy(image.copy()))
              stamps.append(frame.pts)
        rate = stream.average_rate or Fraction(25)
        time_base = stream.time_base or Fraction(1)
    if None not in stamps and all(a < b for a, b in pairwise(stamps)):
        seconds = [(stamp - min(starts)) * time_base for stamp in stamps]
    else:
        seconds = [ordinal / rate for ordinal in range(len(images))]
    return Judged(images=tuple(images), seconds=tuple(seconds))
