"""The clips on which sparse decoding must equal sequential decoding."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from av.video.reformatter import ColorRange, Colorspace
from clip_edits import (
    append,
    break_hevc_links,
    drop_packets,
    edits,
    hide_some_vp8,
    hide_vp9_keyframes,
    join_vp9_keyframes,
    keep_from_second_keyframe,
    show_vp9_again,
)
from clip_files import ClipRecipe, write_clip
from mp4_boxes import set_rotation

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
    """Whether one frame costs fewer pictures than the file has; else all of them are decoded."""
    numbers: range | None = range(60)
    """What the judge must read in the pictures; None where they are turned, cut or repeated."""


def write(clip: MatrixClip, directory: Path) -> Path:
    """Write the clip's file."""
    path = write_clip(directory / clip.name, clip.recipe)
    if clip.edit is not None:
        clip.edit(path)
    return path


def x264(parameters: str = "", **changes: object) -> ClipRecipe:
    """H.264 with B-frames."""
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


def _sparse(name: str, recipe: ClipRecipe, **changes: object) -> MatrixClip:
    return MatrixClip(name=name, recipe=recipe, is_sparse=True, **changes)  # type: ignore[arg-type]


def _full(name: str, recipe: ClipRecipe, **changes: object) -> MatrixClip:
    return MatrixClip(name=name, recipe=recipe, is_sparse=False, **changes)  # type: ignore[arg-type]


_CABAC = x264("keyint=15:ref=1:bframes=0", tone_hertz=None)
_CAVLC = x264("keyint=15:cabac=0:8x8dct=0:bframes=0", tone_hertz=None)
H264 = (
    _sparse("h264_gop250.mp4", x264("keyint=250")),
    _sparse("h264_gop30.mp4", x264("keyint=30")),
    _sparse("h264_slices.mp4", x264("keyint=30:slices=4:bframes=2")),
    _sparse("h264_without_b.mp4", x264("keyint=20:bframes=0:ref=3:cabac=0")),
    _sparse("h264_open_gop.mp4", x264("keyint=15:open-gop=1")),
    _sparse("h264_open_gop.mkv", x264("keyint=15:open-gop=1:b-pyramid=strict")),
    _sparse("h264_open_gop.ts", x264("keyint=15:open-gop=1")),
    _sparse("h264_pyramid.mkv", x264("keyint=60:bframes=8:b-adapt=0:ref=6:b-pyramid=normal")),
    _sparse("h264_flat_b.mov", x264("keyint=20:b-pyramid=none:b-adapt=0")),
    _sparse("h264_intra_refresh.mp4", x264("keyint=20:intra-refresh=1")),
    _sparse("h264_intra_refresh.ts", x264("keyint=20:intra-refresh=1:bframes=2")),
    _full("h264_interlaced.mp4", x264("keyint=20:tff=1")),
    _full("h264_interlaced.ts", x264("keyint=20:bff=1")),
    _sparse("h264_vfr.mp4", x264("keyint=20", stamps=_VARIABLE)),
    _sparse("h264_vfr.mkv", x264("keyint=20:open-gop=1", stamps=_VARIABLE)),
    _sparse("h264_late_sound.mp4", x264("keyint=20", audio_delay_seconds=0.7)),
    _sparse("h264_edit_cut.mp4", x264("keyint=30"), edit=edits((1.2, 0.88)), numbers=range(20, 50)),
    _sparse("h264_edit_pause.mp4", x264("keyint=20"), edit=edits((0.5, None), (2.4, 0.08))),
    _full("h264_edit_twice.mp4", x264("keyint=20"), edit=edits((0.8, 0.48), (0.8, 0.28)), numbers=None),
    _sparse(
        "h264_turned.mp4", x264("keyint=20"), edit=partial(set_rotation, degrees_clockwise=90), numbers=None
    ),
    _sparse(
        "h264_turned.mov", x264("keyint=20"), edit=partial(set_rotation, degrees_clockwise=270), numbers=None
    ),
    _sparse(
        "h264_fragments.mp4", x264("keyint=20", container_options={"movflags": "frag_keyframe+empty_moov"})
    ),
    _sparse("h264_odd_size.mp4", x264("keyint=20", width=98, height=66)),
    _full("h264.avi", x264("keyint=20", audio_codec="mp3")),
    _sparse("h264.flv", x264("keyint=20")),
    _full("h264.h264", x264("keyint=20", tone_hertz=None)),
    _sparse("h264_10_bit.mkv", x264("keyint=20", pixel_format="yuv420p10le")),
    _sparse("h264_444.mp4", x264("keyint=20", pixel_format="yuv444p")),
    _sparse("h264_709.mp4", x264("keyint=20", colour=(Colorspace.ITU709, ColorRange.MPEG))),
    _sparse("h264_full_range.mp4", x264("keyint=20", pixel_format="yuvj420p")),
    _sparse("h264_two_descriptions.mp4", _CABAC, edit=append(_CAVLC, is_described=True), numbers=None),
    _sparse("h264_new_parameters.mp4", _CABAC, edit=append(_CAVLC, is_described=False), numbers=None),
    _sparse("h264_all_intra.mp4", x264("keyint=1")),
    _full("h264_joined_late.ts", x264("keyint=15:open-gop=1"), edit=drop_packets(7), numbers=None),
    _full("h264_starts_open.ts", x264("keyint=15:open-gop=1"), edit=keep_from_second_keyframe, numbers=None),
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
          edit=break_hevc_links, numbers=None),
    _full("hevc_starts_open.ts", _x265("keyint=15:open-gop=1:b-adapt=0:bframes=3"),
          edit=keep_from_second_keyframe, numbers=None),
)  # fmt: skip
VP_AND_AV1 = (
    _sparse("vp8.webm", _vpx("libvpx", {})),
    _full("vp8_hidden.webm", _vpx("libvpx", {}), edit=hide_some_vp8, numbers=None),
    _full("vp8.avi", _vpx("libvpx", {}, audio_codec="mp3", audio_rate=44_100)),
    _sparse("vp9.webm", _vpx("libvpx-vp9", {})),
    _sparse("vp9_hidden.webm", _vpx("libvpx-vp9", {}), edit=join_vp9_keyframes, numbers=None),
    _full("vp9_hidden_apart.webm", _vpx("libvpx-vp9", {}), edit=hide_vp9_keyframes, numbers=None),
    _sparse("vp9_shown_again.webm", _vpx("libvpx-vp9", {}), edit=show_vp9_again, numbers=None),
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
    _sparse("mpeg2.mpg", _mpeg("mpeg2video", {"bf": "2"})),
    _sparse("mpeg2.mkv", _mpeg("mpeg2video", {"bf": "2"})),
    _full("mpeg2_interlaced.ts", _mpeg("mpeg2video", {"bf": "2", "flags": "+ildct+ilme"})),
    _full("mpeg2_joined_late.ts", _mpeg("mpeg2video", {"bf": "2"}), edit=drop_packets(5), numbers=None),
    _sparse("mpeg1.mpg", _mpeg("mpeg1video", {"bf": "2"})),
    _sparse("mjpeg.mov", _mpeg("mjpeg", pixel_format="yuvj420p")),
    _full("mjpeg.avi", _mpeg("mjpeg", pixel_format="yuvj422p")),
    _sparse("wmv2.wmv", _mpeg("wmv2", audio_codec="mp3")),
    _sparse("flv1.flv", _mpeg("flv", audio_codec="mp3")),
    _sparse("prores.mov", _other("prores_ks", pixel_format="yuv422p10le")),
)  # fmt: skip
MATRIX = H264 + HEVC + VP_AND_AV1 + OLDER
