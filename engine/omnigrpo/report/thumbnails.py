"""Frames of clips, as small JPEG pictures inside the page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from omnigrpo.media.decode import decode
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip, ClipStatus, Modality

_HEIGHT_PIXELS = 96
_JPEG_QUALITY = 78


@dataclass(frozen=True, kw_only=True, slots=True)
class Frames:
    """Frames of one clip, or why there are none."""

    images: tuple[Image.Image, ...]
    error: str | None


def clip_of(record: dict, run_directory: Path) -> Clip:
    """The clip of a line of rollouts.jsonl; a relative path is looked for here, then beside the run."""
    path = Path(record["clip"])
    if not path.is_absolute() and not path.exists():
        path = run_directory / path
    return Clip(path=path, start_seconds=record["start_seconds"], end_seconds=record["end_seconds"])


def clip_frames(clips: Sequence[Clip], *, num_frames: int) -> tuple[Frames, ...]:
    """Decode a few uniform frames of each clip."""
    if not clips:
        return ()
    video: tuple[Modality, ...] = ("video",)
    sampling = SamplingConfig(num_frames=num_frames, min_frames=1)
    decoded = decode(clips, [video] * len(clips), sampling).clips
    return tuple(
        Frames(images=_images(clip.frames_FHWC.numpy()), error=None)
        if clip.status is ClipStatus.OK and clip.frames_FHWC is not None
        else Frames(images=(), error=clip.error or f"{clip.clip.path}: {clip.status}")
        for clip in decoded
    )


def data_uri(image: Image.Image) -> str:
    """The picture as a ``data:`` address."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _images(frames_FHWC: np.ndarray) -> tuple[Image.Image, ...]:
    height, width = frames_FHWC.shape[1:3]
    size = (max(1, round(width * _HEIGHT_PIXELS / height)), _HEIGHT_PIXELS)
    return tuple(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames_FHWC)
