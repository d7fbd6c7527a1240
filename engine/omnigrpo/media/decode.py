"""Decoding a batch of clips: one interface for whichever decoder does the work."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

from omnigrpo.media.decode_pyav import decode_clip
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, DecodedClip, Modality

__all__ = ["SamplingConfig", "decode"]


def decode(
    clips: Sequence[Clip],
    wanted: Sequence[Sequence[Modality]],
    sampling: SamplingConfig,
    *,
    num_workers: int = 1,
) -> list[DecodedClip]:
    """Decode clips in threads (the decoder releases the GIL), one result per clip in the same order.

    Args:
        clips: what to decode.
        wanted: the modalities asked of each clip; the others are not decoded and may be missing.
        sampling: which frames and which sample rate.
        num_workers: threads; 1 decodes in the calling thread.

    A clip that cannot be used has another status than ``ok`` and a sentence with the file and the reason;
    it does not disturb the others.
    """
    if len(clips) != len(wanted):
        raise ValueError(f"got {len(clips)} clips but modalities for {len(wanted)}; pass one tuple per clip")
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    if num_workers == 1:
        return [
            decode_clip(clip, modalities, sampling) for clip, modalities in zip(clips, wanted, strict=True)
        ]
    with ThreadPoolExecutor(max_workers=num_workers, thread_name_prefix="decode") as pool:
        return list(pool.map(decode_clip, clips, wanted, repeat(sampling)))
