"""Decoding a batch of clips: one interface for whichever decoder does the work."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from typing import Literal, TypeVar, get_args

import torch
from av.audio.stream import AudioStream
from torch import Tensor

from omnigrpo.media.clip_error import ClipError, Deadline, timeout_error
from omnigrpo.media.decode_dali import (
    DaliFailure,
    NotForDaliError,
    is_installed,
    prepare,
    require_dali,
    unsupported_codec,
)
from omnigrpo.media.decode_pyav import decode_sound as sound_by_pyav
from omnigrpo.media.decode_pyav import decoded_clip, failed_clip, open_clip
from omnigrpo.media.decode_queue import DaliWork, DecodeQueue
from omnigrpo.media.frames_pyav import FrameDecoder, Pictures
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.sound_dali import decode_waveform_by_dali, is_for_dali
from omnigrpo.media.tracks import Track, Window
from omnigrpo.media.watched_threads import run_watched
from omnigrpo.schema import Clip, ClipStatus, DecodedBatch, DecodedClip, Modality

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "Decoder", "SamplingConfig", "decode", "decode_each"]

Decoder = Literal["auto", "pyav", "dali", "both"]
"""pyav: all on the CPU. dali: DALI, and PyAV what DALI does not take or fails at. both: DALI, and PyAV besides whatever
waits for DALI. auto: dali on a CUDA device where DALI is installed, else pyav."""

DEFAULT_TIMEOUT_SECONDS = 60.0
NVDEC_THREADS = 14
"""Two for each of the seven NVDEC engines of an H100 or H200: while one copies, the other decodes."""

R = TypeVar("R")
_log = logging.getLogger(__name__)


def decode(
    clips: Sequence[Clip],
    wanted: Sequence[Sequence[Modality]],
    sampling: SamplingConfig,
    *,
    num_workers: int = 1,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    decoder: Decoder = "auto",
    device: torch.device | str = "cpu",
    dali_threads: int | None = None,
) -> DecodedBatch:
    """Decode clips in threads (the decoders release the GIL), one result per clip in the same order.

    Args:
        clips: what to decode.
        wanted: the modalities asked of each clip; the others are not decoded and may be missing.
        sampling: which frames and which sample rate.
        num_workers: threads that work on the CPU at once.
        timeout_seconds: per clip.
        decoder: see ``Decoder``. Frames of both decoders are equal on the CPU, and within 2/255 on a GPU.
        device: where DALI decodes; frames of PyAV are on the CPU.
        dali_threads: clips that DALI decodes at once; by default ``num_workers`` on the CPU, NVDEC_THREADS on a GPU.

    A clip that cannot be used has another status than ``ok`` and a sentence with the file and the reason;
    it does not disturb the others. UNSUPPORTED_CODEC is also what ``dali`` gives on the CPU for a codec that only
    DALI's GPU variant decodes, H.264 for example.

    Raises:
        ValueError: arguments that do not fit.
        ImportError: ``dali`` or ``both`` where DALI is not installed.
    """
    results = decode_each(
        clips,
        wanted,
        sampling,
        _itself,
        num_workers=num_workers,
        timeout_seconds=timeout_seconds,
        decoder=decoder,
        device=device,
        dali_threads=dali_threads,
    )
    return DecodedBatch(clips=tuple(results))


def decode_each(
    clips: Sequence[Clip],
    wanted: Sequence[Sequence[Modality]],
    sampling: SamplingConfig,
    then: Callable[[DecodedClip], R],
    *,
    num_workers: int = 1,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    decoder: Decoder = "auto",
    device: torch.device | str = "cpu",
    dali_threads: int | None = None,
) -> list[R]:
    """As ``decode``, but return ``then(clip)`` of each clip, computed in the thread that opened it.

    So the next steps run in parallel too, and full-size frames need not wait for the whole batch.
    """
    if len(clips) != len(wanted):
        raise ValueError(f"got {len(clips)} clips but modalities for {len(wanted)}; pass one tuple per clip")
    for name, value in (("num_workers", num_workers), ("dali_threads", dali_threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if timeout_seconds <= 0:
        raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")
    dali = _dali_work(decoder, device, num_workers, dali_threads)
    queue = DecodeQueue(num_clips=len(clips), num_workers=num_workers, dali=dali)
    work = _Work(sampling=sampling, queue=queue, dali=dali, is_dali_alone=decoder == "dali")

    given_up: set[int] = set()

    def one(index: int, clip: Clip, modalities: Sequence[Modality]) -> R:
        try:
            decoded = work.decode(index, clip, modalities, Deadline.after(timeout_seconds))
            if index in given_up:
                raise timeout_error(timeout_seconds)  # Its result is there already, and ``then`` was called.
            return then(decoded)
        finally:
            queue.release(index)

    def give_up(index: int) -> R:
        given_up.add(index)
        queue.release(index)
        return then(failed_clip(clips[index], timeout_error(timeout_seconds), sampling))

    try:
        return run_watched(
            [partial(one, *task) for task in zip(range(len(clips)), clips, wanted, strict=True)],
            num_threads=queue.num_threads,
            timeout_seconds=timeout_seconds,
            on_timeout=give_up,
            admit=queue.admit,
        )
    finally:
        queue.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """How the clips of one call are decoded."""

    sampling: SamplingConfig
    queue: DecodeQueue
    dali: DaliWork | None
    is_dali_alone: bool
    """Whether a clip whose codec DALI never takes on the CPU is refused, rather than left to PyAV."""

    def decode(
        self, index: int, clip: Clip, modalities: Sequence[Modality], deadline: Deadline
    ) -> DecodedClip:
        """Decode one clip that has a slot; bad input becomes a status and a sentence, never an exception."""
        try:
            decode_sound = sound_by_pyav if self.dali is None else partial(_sound_by_dali, clip)
            with open_clip(clip, modalities, self.sampling, deadline, decode_sound) as opened:
                pictures = None
                if opened.frames is not None:
                    pictures = self._by_dali(index, clip, opened.frames, deadline) or opened.frames.decode()
                return decoded_clip(clip, opened, pictures, self.sampling)
        except ClipError as error:
            return failed_clip(clip, error, self.sampling)

    def _by_dali(self, index: int, clip: Clip, frames: FrameDecoder, deadline: Deadline) -> Pictures | None:
        """None when PyAV is to decode the clip."""
        if self.dali is None:
            return None
        self._check_codec(frames, self.dali.device)
        try:
            prepared = prepare(frames, self.dali.device, self.sampling.colour)
        except NotForDaliError as error:
            _log.debug("PyAV decodes %s, which %s", clip.path, error)
            return None
        outcome = self.queue.decode_by_dali(index, prepared, deadline)
        if isinstance(outcome, DaliFailure):
            _log.warning("DALI could not decode %s, PyAV decodes it instead: %s", clip.path, outcome.reason)
            return None
        if outcome is None:
            return None
        return Pictures(frames_FHWC=outcome, num_decoded=prepared.stream.num_packets, decoder="dali")

    def _check_codec(self, frames: FrameDecoder, device: torch.device) -> None:
        if not self.is_dali_alone or device.type != "cpu":
            return
        codec = frames.track.stream.codec_context.codec.canonical_name
        reason = unsupported_codec(codec, device)
        if reason is not None:
            raise ClipError(
                ClipStatus.UNSUPPORTED_CODEC,
                f"{reason}: set media.decoder to 'auto' or 'pyav', or decode on a GPU",
            )


def _sound_by_dali(
    clip: Clip,
    file: BufferedReader,
    track: Track[AudioStream],
    window: Window,
    sample_rate_hz: int,
    deadline: Deadline,
) -> Tensor:
    """By DALI what it gives as FFmpeg does, the rest by FFmpeg."""
    if is_for_dali(track, window):
        waveform = decode_waveform_by_dali(file, track, window, sample_rate_hz, deadline)
        if isinstance(waveform, Tensor):
            return waveform
        _log.warning(
            "DALI could not decode the sound of %s, PyAV decodes it instead: %s", clip.path, waveform.reason
        )
    return sound_by_pyav(file, track, window, sample_rate_hz, deadline)


def _dali_work(
    decoder: Decoder, device: torch.device | str, num_workers: int, dali_threads: int | None
) -> DaliWork | None:
    """What DALI does; None for nothing."""
    if decoder not in get_args(Decoder):
        raise ValueError(f"decoder must be one of {', '.join(get_args(Decoder))}, got {decoder!r}")
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or a CUDA device, got {device!r}")
    if decoder == "auto":
        decoder = "dali" if where.type == "cuda" and is_installed() else "pyav"
    if decoder == "pyav":
        return None
    require_dali()
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    default = num_workers if where.type == "cpu" else NVDEC_THREADS
    return DaliWork(device=where, num_threads=dali_threads or default, is_shared=decoder == "both")


def _itself(clip: DecodedClip) -> DecodedClip:
    return clip
