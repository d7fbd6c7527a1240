"""Which frames of a video track are wanted, and which of its packets must be decoded for them."""

from collections.abc import Sequence
from dataclasses import dataclass

from av.packet import Packet
from av.video.stream import VideoStream

from omnigrpo.media.clip_error import ClipError, OutOfStepError
from omnigrpo.media.reference_pictures import ReferenceReader
from omnigrpo.media.sampling import SamplingConfig, uniform_frame_indices
from omnigrpo.media.tracks import Track, Window
from omnigrpo.schema import ClipStatus


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Packets ``first .. stop - 1`` in decoding order: from an entry point to the last wanted picture."""

    first: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class FramePlan:
    """What is decoded of a track."""

    wanted: tuple[int, ...]
    """Time stamp of every frame that is wanted, in order; short clips repeat frames."""
    runs: tuple[Run, ...]
    """Disjoint and ascending; between two of them the decoder starts anew."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameChoice:
    """Which pictures of a file become frames."""

    indices: tuple[int, ...]
    """Ordinal of each frame's picture among all pictures of the file, in the order in which they are shown."""
    seconds: tuple[float, ...]
    """When each is shown, after the file's first picture."""
    last_seconds: float
    """When the last picture of the window is shown."""
    num_pictures: int
    """Pictures of the file, as far as it was read: a little beyond the window's end."""


def plan_frames(
    track: Track[VideoStream], references: ReferenceReader, window: Window, sampling: SamplingConfig
) -> FramePlan:
    """Choose frames by the packets' time stamps.

    Raises:
        ClipError: NO_VIDEO or TOO_SHORT, as ``choose_frames``.
        OutOfStepError: packets and pictures do not correspond one to one.
    """
    stamps = shown_stamps(track, references)
    wanted = choose_frames([pts for pts in stamps if pts * track.time_base in window], window, sampling)
    return FramePlan(wanted=tuple(wanted), runs=_runs(track.packets, references, set(wanted)))


def shown_stamps(track: Track[VideoStream], references: ReferenceReader) -> list[int]:
    """Time stamps of all pictures that are shown, ascending; OutOfStepError when packets do not tell.

    They do not where the stream begins between two entry points, or with pictures that refer to what was cut off:
    the decoder drops those.
    """
    shown = [packet for packet in track.packets if not packet.is_discard]
    stamps = sorted(packet.pts for packet in shown if packet.pts is not None)
    is_told = track.has_display_times and len(set(stamps)) == len(shown)
    if not is_told or any(references.is_hidden(packet) for packet in shown):
        raise OutOfStepError
    first = track.packets[0]
    if not references.can_begin(first) or any(_is_shown_before(packet, first) for packet in shown):
        raise OutOfStepError
    return stamps


def choose_frames(candidates: Sequence[int], window: Window, sampling: SamplingConfig) -> list[int]:
    """Return ``sampling.num_frames`` of the candidates, uniformly.

    Raises:
        ClipError: NO_VIDEO without a candidate, TOO_SHORT with fewer than ``sampling.min_frames``.
    """
    count = len(candidates)
    if not candidates:
        raise ClipError(ClipStatus.NO_VIDEO, f"has no video frame in {window}")
    if count < sampling.min_frames:
        frames, repeated = ("frame", "the frame") if count == 1 else ("frames", "frames")
        whole = window.start_seconds is None and window.end_seconds is None
        raise ClipError(
            ClipStatus.TOO_SHORT,
            f"has {count} video {frames}{'' if whole else f' in {window}'}, media.min_frames asks for at least "
            f"{sampling.min_frames}: set it to {count} to repeat {repeated}, as the reference does",
        )
    return [candidates[index] for index in uniform_frame_indices(count, sampling.num_frames)]


def _runs(packets: Sequence[Packet], references: ReferenceReader, wanted: set[int]) -> tuple[Run, ...]:
    """For every wanted picture the packets from its entry point on; what overlaps is one run."""
    entries = _entries(packets, references)
    spans = sorted(
        (_entry(packets, entries, at), at + 1) for at, packet in enumerate(packets) if packet.pts in wanted
    )
    runs: list[Run] = []
    for first, stop in spans:
        if runs and first < runs[-1].stop:
            runs[-1] = Run(first=runs[-1].first, stop=max(stop, runs[-1].stop))
        else:
            runs.append(Run(first=first, stop=stop))
    return tuple(runs)


def _entries(packets: Sequence[Packet], references: ReferenceReader) -> list[int]:
    """Where decoding may begin: once parameters have changed, only at packets that carry theirs."""
    entries, is_changed = [], False
    for at, packet in enumerate(packets):
        if references.is_entry_point(packet) and (not is_changed or references.carries_parameters(packet)):
            entries.append(at)
        is_changed = is_changed or references.changes_parameters(packet)
    return entries


def _entry(packets: Sequence[Packet], entries: Sequence[int], at: int) -> int:
    """Where decoding must begin to get the picture of packet ``at``.

    A picture that is stored after an entry point but shown before it may refer to the group before.
    """
    before = [entry for entry in entries if entry <= at]
    if before and _is_shown_before(packets[at], packets[before[-1]]):
        before.pop()
    return before[-1] if before else 0


def _is_shown_before(packet: Packet, entry: Packet) -> bool:
    return packet.pts is not None and entry.pts is not None and packet.pts < entry.pts
