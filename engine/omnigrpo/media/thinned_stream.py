"""A video track reduced to the packets that a decoder needs for the wanted frames, as a file in memory.

For a decoder that takes whole files, as DALI does: it then reads and decodes a fraction of the clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO

import av
from av.container import OutputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from omnigrpo.media import picture_headers
from omnigrpo.media.codec_description import sequence_sets
from omnigrpo.media.frame_plan import Run
from omnigrpo.media.frames_pyav import FrameDecoder
from omnigrpo.media.picture_headers import differing
from omnigrpo.media.reference_pictures import ReferenceReader

_FORMATS = {
    "h264": "mp4",
    "hevc": "mp4",
    "vp8": "webm",
    "vp9": "webm",
    "mjpeg": "mov",
}
"""The container that each codec is stored in, by FFmpeg's names."""
_OPTIONS = {"mp4": {"use_editlist": "0"}, "mov": {"use_editlist": "0"}, "webm": {}}
"""Without an edit list time stamps are read as they were written."""
_FRAME_TIME = Fraction(1, 25)
"""Pictures are stored at a constant rate, whatever the clip's: only their order counts."""


class NotThinnableError(Exception):
    """Why no part of a track may be left out, as a half sentence whose subject is the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ThinnedStream:
    """The needed packets of one track."""

    content: bytes
    """A file of one video stream at a constant rate, without a gap in its time stamps."""
    frames: tuple[int, ...]
    """Place of every wanted frame among the pictures of the file, in the order in which they are shown."""
    num_packets: int
    """Packets, each of which is one picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kept:
    """One packet of the thinned stream."""

    packet: Packet
    is_start: bool
    """Whether it is the first one of a run. Only these are marked as keyframes, so that no reader begins at another."""


def thin(frames: FrameDecoder) -> ThinnedStream:
    """Keep the runs of a clip's plan, of progressive pictures, without the disposable ones that are not wanted.

    Where a run begins, the decoder goes on from the run before without being told. So each begins with a picture
    that makes it forget the ones before: runs of H.264 that begin in an open group are prolonged to the last IDR
    picture, and clean random access pictures of HEVC become broken links, which is what they become when a stream
    is spliced (ITU-T H.265, 7.4.2.2). What is stored after such a picture and shown before it is left out.

    Raises:
        NotThinnableError: pictures must be counted, the codec is not known, pictures are or may be of several sizes or
            formats, or time stamps repeat.
    """
    track, plan, references = frames.track, frames.plan, frames.references
    if plan is None:
        raise NotThinnableError("has pictures that must be counted")
    codec = track.stream.codec_context.codec.canonical_name
    if codec not in _FORMATS:
        raise NotThinnableError(f"is coded as {codec}")
    kept = [
        item
        for run in _clean_runs(plan.runs, track.packets, references)
        for item in _needed(track.packets[run.first : run.stop], set(plan.wanted), references)
    ]
    _check_uniform(frames, [item.packet for item in kept])
    stamps = [item.packet.pts for item in kept if item.packet.pts is not None]
    ranks = {pts: rank for rank, pts in enumerate(sorted(stamps))}
    if len(ranks) < len(kept):
        raise NotThinnableError("repeats time stamps")
    order = [ranks[pts] for pts in stamps]
    return ThinnedStream(
        content=_file(track.stream, _FORMATS[codec], kept, order, references),
        frames=tuple(ranks[pts] for pts in plan.wanted),
        num_packets=len(kept),
    )


def _check_uniform(frames: FrameDecoder, packets: Sequence[Packet]) -> None:
    """Raise NotThinnableError unless all pictures are of one format, and of the size that the file says."""
    codec = frames.track.stream.codec_context
    name = codec.codec.canonical_name
    if any(frames.references.changes_parameters(packet) for packet in packets):
        raise NotThinnableError("describes its codec anew on the way")
    if name in picture_headers.CODECS:
        try:
            is_uniform = not differing(name, packets, *frames.header_size)
        except ValueError as error:
            raise NotThinnableError(f"has a damaged picture: {error}") from error
    else:
        is_uniform = len(sequence_sets(name, codec.extradata or b"")) == 1
    if not is_uniform:
        raise NotThinnableError("has or may have pictures of several sizes or formats")


def _clean_runs(
    runs: Sequence[Run], packets: Sequence[Packet], references: ReferenceReader
) -> tuple[Run, ...]:
    """Runs that begin where the decoder forgets what came before; those that then overlap are one."""
    clean: list[Run] = []
    for run in runs:
        first = run.first
        while first > 0 and not references.forgets(packets[first]):
            first -= 1
        if clean and first < clean[-1].stop:
            clean[-1] = Run(first=clean[-1].first, stop=run.stop)
        else:
            clean.append(Run(first=first, stop=run.stop))
    return tuple(clean)


def _needed(packets: Sequence[Packet], wanted: set[int], references: ReferenceReader) -> list[_Kept]:
    """The packets of one run that are wanted or serve others."""
    start, *others = packets
    kept = [_Kept(packet=start, is_start=True)]
    for packet in others:
        is_leading = packet.pts is not None and start.pts is not None and packet.pts < start.pts
        if packet.pts in wanted or not (is_leading or references.is_disposable(packet)):
            kept.append(_Kept(packet=packet, is_start=False))
    return kept


def _file(
    stream: VideoStream,
    stream_format: str,
    kept: Sequence[_Kept],
    order: Sequence[int],
    references: ReferenceReader,
) -> bytes:
    """Mux copies of the packets; ``order`` is each one's place among the pictures shown."""
    delay = max(at - rank for at, rank in enumerate(order))
    file = BytesIO()
    with av.open(file, "w", format=stream_format, container_options=_OPTIONS[stream_format]) as target:
        assert isinstance(target, OutputContainer)
        out = target.add_stream_from_template(stream)
        out.time_base = _FRAME_TIME
        for at, (item, rank) in enumerate(zip(kept, order, strict=True)):
            packet = Packet(
                references.as_broken_link(item.packet) if item.is_start else item.packet  # type: ignore[arg-type]
            )
            packet.stream, packet.time_base = out, _FRAME_TIME
            packet.pts, packet.dts, packet.duration = rank + delay, at, 1
            packet.is_keyframe = item.is_start
            target.mux_one(packet)
    return file.getvalue()
