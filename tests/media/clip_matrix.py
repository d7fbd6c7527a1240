"""The clips on which sparse decoding must equal sequential decoding, and the sequential decoder that judges."""

from collections.abc import Callable
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
from mp4_boxes import set_edits, set_rotation, time_scales
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
    _full("hevc_starts_open.ts", _x265("keyint=15:open-gop=1:b-adapt=0:bframes=3"),
          edit=_keep_from_second_keyframe, numbers=None),
)  # fmt: skip
VP_AND_AV1 = (
    _sparse("vp8.webm", _vpx("libvpx", {})),
    _full("vp8_hidden.webm", _vpx("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good"})),
    _full("vp8.avi", _vpx("libvpx", {}, audio_codec="mp3", audio_rate=44_100)),
    _sparse("vp9.webm", _vpx("libvpx-vp9", {})),
    _sparse("vp9_hidden.webm", _vpx("libvpx-vp9", {"lag-in-frames": "20", "auto-alt-ref": "1", "deadline": "good"})),
    _sparse("vp9.mp4", _vpx("libvpx-vp9", {})),
    _sparse("vp9_10_bit.mkv", _vpx("libvpx-vp9", {}, pixel_format="yuv420p10le")),
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
        for frame in container.decode(stream):
            rgb = reformatter.reformat(frame, format="rgb24", src_colorspace=source, interpolation=FLAGS)
            image = np.rot90(rgb.to_ndarray(), k=round(frame.rotation / 90))
            images.append(torch.from_numpy(image.copy()))
            stamps.append(frame.pts)
        rate = stream.average_rate or Fraction(25)
        time_base = stream.time_base or Fraction(1)
    if None not in stamps and all(a < b for a, b in pairwise(stamps)):
        seconds = [(stamp - stamps[0]) * time_base for stamp in stamps]
    else:
        seconds = [ordinal / rate for ordinal in range(len(images))]
    return Judged(images=tuple(images), seconds=tuple(seconds))
