"""Decoding a batch of clips: one interface for whichever decoder does the work."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from omnigrpo.media.clip_error import Deadline, timeout_error
from omnigrpo.media.decode_pyav import decode_clip, failed_clip
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.media.watched_threads import run_watched
from omnigrpo.schema import Clip, DecodedBatch, DecodedClip, Modality

__all__ = ["DEFAULT_TIMEOUT_SECONDS", "SamplingConfig", "decode", "decode_each"]

DEFAULT_TIMEOUT_SECONDS = 60.0

R = TypeVar("R")


def decode(
    clips: Sequence[Clip],
    wanted: Sequence[Sequence[Modality]],
    sampling: SamplingConfig,
    *,
    num_workers: int = 1,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> DecodedBatch:
    """Decode clips in threads (the decoder releases the GIL), one result per clip in the same order.

    Args:
        clips: what to decode.
        wanted: the modalities asked of each clip; the others are not decoded and may be missing.
        sampling: which frames and which sample rate.
        num_workers: threads.
        timeout_seconds: per clip.

    A clip that cannot be used has another status than ``ok`` and a sentence with the file and the reason;
    it does not disturb the others.
    """
    results = decode_each(
        clips, wanted, sampling, _itself, num_workers=num_workers, timeout_seconds=timeout_seconds
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
) -> list[R]:
    """As ``decode``, but return ``then(clip)`` of each clip, computed in the thread that decoded it.

    So the next steps run in parallel too, and full-size frames need not wait for the whole batch.
    """
    if len(clips) != len(wanted):
        raise ValueError(f"got {len(clips)} clips but modalities for {len(wanted)}; pass one tuple per clip")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    if timeout_seconds <= 0:
        raise ValueError(f"timeout_seconds must be positive, got {timeout_seconds}")

    def one(clip: Clip, modalities: Sequence[Modality]) -> R:
        return then(decode_clip(clip, modalities, sampling, Deadline.after(timeout_seconds)))

    return run_watched(
        [partial(one, clip, modalities) for clip, modalities in zip(clips, wanted, strict=True)],
        num_threads=num_workers,
        timeout_seconds=timeout_seconds,
        on_timeout=lambda at: then(failed_clip(clips[at], timeout_error(timeout_seconds), sampling)),
    )


def _itself(clip: DecodedClip) -> DecodedClip:
    return clip
