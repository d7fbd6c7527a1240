"""Decodes the wanted frames of a video track with PyAV, and as little else as it can."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from omnigrpo.media.clip_error import ClipError, Deadline, OutOfStepError
from omnigrpo.media.frame_plan import FrameChoice, FramePlan, choose_frames, plan_frames, shown_stamps
from omnigrpo.media.picture_rgb import RgbFrames
from omnigrpo.media.reference_pictures import ReferenceReader
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.tracks import MAX_PIXELS, Track, Window
from omnigrpo.schema import ClipStatus, DecoderName


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictures:
    """The frames of one clip."""

    frames_FHWC: Tensor
    """uint8 RGB ``[F, height, width, 3]``, upright."""
    num_decoded: int
    """Pictures that the decoder gave for them."""
    decoder: DecoderName


class FrameDecoder:
    """Chooses the frames of one track and decodes them; bound to the track's open file.

    Raises ClipError when it is made: NO_VIDEO without a frame in the window, TOO_SHORT with fewer than
    ``sampling.min_frames``.
    """

    def __init__(
        self, track: Track[VideoStream], window: Window, sampling: SamplingConfig, deadline: Deadline
    ) -> None:
        stream = track.stream
        self.track, self._window, self._sampling, self._deadline = track, window, sampling, deadline
        self.references = ReferenceReader(
            stream.codec_context.codec.canonical_name, stream.codec_context.extradata, track.packets
        )
        self.header_size = stream.codec_context.width, stream.codec_context.height
        """Width and height that the file says; its pictures may say others."""
        self._num_decoded = 0
        self._counted: Sequence[int | None] | None = None
        """Time stamps of all pictures in order, where they had to be counted."""
        self._rotation_degrees = 0
        self._is_described_anew = False
        """Whether the decoder has met a second description; flushing does not bring the first one back."""
        self.plan = self._make_plan()
        """None when the packets do not tell which pictures there are: then they must be counted."""

    def _make_plan(self) -> FramePlan | None:
        try:
            return plan_frames(self.track, self.references, self._window, self._sampling)
        except OutOfStepError:
            return None

    @property
    def rotation_degrees(self) -> int:
        """Clockwise quarter turns that set decoded pictures upright: 0, 90, 180 or 270."""
        return self._rotation_degrees

    @property
    def is_sparse(self) -> bool:
        """Whether pictures that no frame needs are left out; else all are decoded, to be counted."""
        return self.plan is not None and self._counted is None

    def choice(self) -> FrameChoice | None:
        """Which frames are taken; None when the pictures must be counted and ``decode`` has not done so."""
        if self._counted is not None:
            seconds = self._frame_seconds(self._counted)
            wanted = self._choose(self._counted)
        elif self.plan is not None:
            stamps = shown_stamps(self.track, self.references)
            seconds = [stamp * self.track.time_base for stamp in stamps]
            wanted = [stamps.index(pts) for pts in self.plan.wanted]
        else:
            return None
        origin = self._window.origin_seconds
        return FrameChoice(
            indices=tuple(wanted),
            seconds=tuple(round(float(seconds[index]) - origin, 6) for index in wanted),
            last_seconds=round(float(max(at for at in seconds if at in self._window)) - origin, 6),
            num_pictures=len(seconds),
        )

    def look(self) -> VideoFrame:
        """Decode the first picture of the plan: it tells what headers leave out, its format and rotation for example.

        Raises ClipError as ``decode``, OutOfStepError without a plan or when there is no such picture.
        """
        if self.plan is None:
            raise OutOfStepError
        self._set_up_codec()
        first = self.track.packets[self.plan.runs[0].first]
        try:
            for frame in self._decode([first], None):
                return frame
        except FFmpegError as error:
            raise self._undecodable(error) from error
        raise OutOfStepError

    def decode(self) -> Pictures:
        """Return ``sampling.num_frames`` frames, turned upright as the file's rotation says.

        Raises:
            ClipError: CORRUPT when a picture that was needed is damaged, UNSUPPORTED_CODEC when it is too large,
                RESOLUTION_CHANGE, TIMEOUT; and what making it raises, where only decoding shows the frames.
        """
        self._set_up_codec()
        self._num_decoded = 0
        try:
            try:
                frames_FHWC = self._by_counting() if self.plan is None else self._by_plan(self.plan)
            except OutOfStepError:
                frames_FHWC = self._by_counting()
        except FFmpegError as error:
            raise self._undecodable(error) from error
        return Pictures(frames_FHWC=frames_FHWC, num_decoded=self._num_decoded, decoder="pyav")

    def _set_up_codec(self) -> None:
        codec = self.track.stream.codec_context
        if codec.is_open:
            return
        codec.thread_type, codec.thread_count = "NONE", 1
        codec.options = {"max_pixels": str(MAX_PIXELS)}
        if codec.name == "h264":  # Reorder as far as the level allows, where the stream says nothing.
            codec.options |= {"strict": "strict"}

    def _by_plan(self, plan: FramePlan) -> Tensor:
        """Decode run after run, without the pictures that neither are wanted nor serve others."""
        stamps = {packet.pts for packet in self.track.packets if not packet.is_discard}
        frames = RgbFrames(plan.wanted, self._sampling.colour)
        for run in plan.runs:
            before = None
            for frame in self._decode(self.track.packets[run.first : run.stop], frames):
                pts = frame.pts
                if pts is None or pts not in stamps or frame.interlaced_frame or not _ascends(before, pts):
                    raise OutOfStepError
                before = pts
                if pts in frames:
                    frames.add(pts, frame)
        if not frames.is_complete:
            raise OutOfStepError
        return frames.tensor()

    def _by_counting(self) -> Tensor:
        """Decode every picture in order; again when there are not as many as packets.

        For AVI, raw streams, interlaced ones, and others whose packets lack time stamps, repeat them, or are not
        one picture each.
        """
        guess = self._guess()
        frames, stamps = self._numbered(guess)
        self._counted = stamps
        wanted = self._choose(stamps)
        if wanted != guess:
            frames, _ = self._numbered(wanted)
        return frames.tensor()

    def _guess(self) -> list[int]:
        """What would be wanted if every packet were one picture."""
        stamps = [packet.pts for packet in self.track.packets if not packet.is_discard]
        present = sorted(stamp for stamp in stamps if stamp is not None)
        try:
            return self._choose(present if len(present) == len(stamps) else [None] * len(stamps))
        except ClipError:
            return []

    def _choose(self, stamps: Sequence[int | None]) -> list[int]:
        """Ordinals of the wanted pictures; raises as ``choose_frames``."""
        seconds = self._frame_seconds(stamps)
        candidates = [ordinal for ordinal, at in enumerate(seconds) if at in self._window]
        return choose_frames(candidates, self._window, self._sampling)

    def _numbered(self, wanted: Sequence[int]) -> tuple[RgbFrames, list[int | None]]:
        """Decode everything; returns the wanted frames by ordinal, and the time stamps of all pictures."""
        frames = RgbFrames(wanted, self._sampling.colour)
        stamps: list[int | None] = []
        for ordinal, frame in enumerate(self._decode(self.track.packets, None)):
            if ordinal in frames:
                frames.add(ordinal, frame)
            stamps.append(frame.pts)
        return frames, stamps

    def _frame_seconds(self, stamps: Sequence[int | None]) -> Sequence[float | Fraction]:
        """Container time of each picture: its stamp when all ascend, else its place at a constant rate."""
        stream = self.track.stream
        present = [stamp for stamp in stamps if stamp is not None]
        if len(present) == len(stamps) and all(a < b for a, b in pairwise(present)):
            return [stamp * self.track.time_base for stamp in present]
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        return [self._window.origin_seconds + float(ordinal / rate) for ordinal in range(len(stamps))]

    def _decode(self, packets: Sequence[Packet], wanted: RgbFrames | None) -> Iterator[VideoFrame]:
        """Decode from a clean decoder and check each picture; with ``wanted``, skip what no picture needs."""
        stream, size = self.track.stream, None
        codec = stream.codec_context
        codec.flush_buffers()
        if self._is_described_anew and not self.references.carries_parameters(packets[0]):
            raise ClipError(
                ClipStatus.UNSUPPORTED_CODEC,
                "cannot be used: its packets are not one picture each, and its codec's description changes on the "
                "way; re-encode it",
            )
        for packet in (*packets, None):
            self._deadline.check()
            if packet is not None and packet.has_sidedata("new_extradata"):
                self._is_described_anew = True
            if packet is not None and wanted is not None and packet.pts not in wanted:
                if self.references.is_disposable(packet):
                    continue
                codec.skip_frame = self.references.skip
            else:
                codec.skip_frame = "DEFAULT"
            for frame in stream.decode(packet):
                if size is None:
                    self._rotation_degrees = round(-frame.rotation / 90) % 4 * 90
                self._num_decoded += 1
                size = _checked_size(frame, size)
                yield frame

    def _undecodable(self, error: FFmpegError) -> ClipError:
        """Why pictures of the size that the file's header gives are not there."""
        width, height = self.header_size
        if width * height > MAX_PIXELS:
            return ClipError(
                ClipStatus.UNSUPPORTED_CODEC,
                f"has pictures of {width}x{height}, at most {MAX_PIXELS} pixels can be used; scale it down",
            )
        return ClipError(ClipStatus.CORRUPT, f"is corrupt: {error.strerror} while decoding video")


def _ascends(before: int | None, pts: int) -> bool:
    return before is None or before < pts


def _checked_size(frame: VideoFrame, before: tuple[int, int] | None) -> tuple[int, int]:
    """Raise ClipError for a damaged picture, or one of another size than the one before."""
    if frame.is_corrupt:
        raise ClipError(ClipStatus.CORRUPT, f"is corrupt: the picture at {frame.time} s is damaged")
    size = (frame.width, frame.height)
    if before is not None and size != before:
        raise ClipError(
            ClipStatus.RESOLUTION_CHANGE,
            f"is unusable: its resolution changes from {before[0]}x{before[1]} to {size[0]}x{size[1]} at "
            f"{frame.time} s; re-encode it at one size",
        )
    return size
