"""Real clips whose frames can be told apart by their grey level and whose sound is a sine."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.stream import VideoStream
from torch import Tensor

LEVELS = 16
"""Grey levels per digit: a frame's left half holds its number modulo 16, the right half the quotient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRecipe:
    """What to write; the defaults are H.264 with B-frames in closed groups, and AAC."""

    num_frames: int = 50
    rate: int = 25
    width: int = 96
    height: int = 64
    codec: str = "libx264"
    options: dict[str, str] = field(
        default_factory=lambda: {"preset": "veryfast", "crf": "10", "bf": "3", "g": "20"}
    )
    stamps: Sequence[int] | None = None
    """Time stamps in milliseconds, one per frame; None writes a constant rate."""
    audio_codec: str = "aac"
    audio_rate: int = 44_100
    tone_hertz: float | None = 440.0
    """None writes no sound."""
    tone_seconds: float = 2.0
    audio_delay_seconds: float = 0.0
    container_options: dict[str, str] = field(default_factory=dict)


def _picture(number: int, width: int, height: int) -> np.ndarray:
    """A frame that carries its own number."""
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:, : width // 2] = 20 + 14 * (number % LEVELS)
    image[:, width // 2 :] = 20 + 14 * (number // LEVELS)
    return image


def read_numbers(frames_FHWC: Tensor) -> list[int]:
    """Read the frames' numbers back."""
    middle = frames_FHWC.shape[1] // 2
    quarter = frames_FHWC.shape[2] // 4
    digits = frames_FHWC[:, middle, [quarter, 3 * quarter], 0].float().sub(20).div(14).round().int().tolist()
    return [low + LEVELS * high for low, high in digits]


def write_clip(path: Path, recipe: ClipRecipe) -> Path:
    """Encode and mux a clip."""
    with av.open(str(path), "w", container_options=recipe.container_options) as container:
        video, audio = None, None
        if recipe.num_frames:
            video = container.add_stream(recipe.codec, rate=recipe.rate, options=recipe.options)
            assert isinstance(video, VideoStream)
            video.width, video.height, video.pix_fmt = recipe.width, recipe.height, "yuv420p"
            if recipe.stamps is not None:
                video.codec_context.time_base = Fraction(1, 1000)
        if recipe.tone_hertz is not None:
            audio = container.add_stream(recipe.audio_codec, rate=recipe.audio_rate, layout="stereo")
            assert isinstance(audio, AudioStream)
        if video is not None:
            for number in range(recipe.num_frames):
                frame = av.VideoFrame.from_ndarray(
                    _picture(number, recipe.width, recipe.height), format="rgb24"
                )
                if recipe.stamps is not None:
                    frame.pts, frame.time_base = recipe.stamps[number], Fraction(1, 1000)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None:
            _write_tone(container, audio, recipe, recipe.tone_hertz or 0.0)
    return path


def _write_tone(container: OutputContainer, audio: AudioStream, recipe: ClipRecipe, hertz: float) -> None:
    num_samples = round(recipe.tone_seconds * recipe.audio_rate)
    time = np.arange(num_samples) / recipe.audio_rate
    tone = (0.5 * np.sin(2 * math.pi * hertz * time)).astype(np.float32)
    for start in range(0, num_samples, 1024):
        block = np.ascontiguousarray(np.stack([tone[start : start + 1024]] * 2))
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo")
        frame.sample_rate = recipe.audio_rate
        frame.time_base = Fraction(1, recipe.audio_rate)
        frame.pts = start + round(recipe.audio_delay_seconds * recipe.audio_rate)
        container.mux(audio.encode(frame))
    container.mux(audio.encode(None))


@pytest.fixture
def clip_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a clip in this test's directory: ``clip_file("name.mp4", num_frames=3)``."""

    def write(name: str = "clip.mp4", **changes: object) -> Path:
        return write_clip(tmp_path / name, ClipRecipe(**changes))  # type: ignore[arg-type]

    return write


@pytest.fixture
def frame_numbers() -> Callable[[Tensor], list[int]]:
    """The function that reads the numbers of decoded frames."""
    return read_numbers
