"""Writes real clips whose frames carry their number and moving texture, and whose sound is a sine."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from torch import Tensor

LEVELS = 16
"""Grey levels per digit: a frame's left half holds its number modulo 16, the right half the quotient modulo 16."""


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
    pixel_format: str = "yuv420p"
    colour: tuple[Colorspace, ColorRange] | None = None
    """What the stream's tag says; None writes no tag."""
    speed: int = 3
    """How far the texture moves per frame, in pixels; 0 for the calm that makes VP8 and VP9 store hidden pictures."""
    stamps: Sequence[int] | None = None
    """Time stamps in milliseconds, one per frame; None writes a constant rate."""
    audio_codec: str = "aac"
    audio_rate: int = 44_100
    tone_hertz: float | None = 440.0
    """None writes no sound."""
    tone_seconds: float = 2.0
    audio_delay_seconds: float = 0.0
    container_options: dict[str, str] = field(default_factory=dict)


def write_clip(path: Path, recipe: ClipRecipe) -> Path:
    """Encode and mux a clip.

    In a thread of its own: as root, SVT-AV1 makes the thread that opens it a real-time one, and so all threads that it
    starts from then on; two that wait for each other then starve everything else on the machine.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_write_clip, path, recipe).result()


def _write_clip(path: Path, recipe: ClipRecipe) -> Path:
    with av.open(str(path), "w", container_options=recipe.container_options) as container:
        video = _add_video(container, recipe) if recipe.num_frames else None
        audio = None
        if recipe.tone_hertz is not None:
            audio = container.add_stream(recipe.audio_codec, rate=recipe.audio_rate, layout="stereo")
            assert isinstance(audio, AudioStream)
        if video is not None:
            for number in range(recipe.num_frames):
                frame = av.VideoFrame.from_ndarray(_picture(number, recipe), format="rgb24")
                if recipe.stamps is not None:
                    frame.pts, frame.time_base = recipe.stamps[number], Fraction(1, 1000)
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
        if audio is not None:
            _write_tone(container, audio, recipe, recipe.tone_hertz or 0.0)
    return path


def read_numbers(frames_FHWC: Tensor) -> list[int]:
    """Read the frames' numbers back."""
    middle = frames_FHWC.shape[1] // 2
    quarter = frames_FHWC.shape[2] // 4
    plates = frames_FHWC[:, middle - 4 : middle + 4][:, :, [quarter, 3 * quarter]].float().mean(dim=(1, 3))
    return [low + LEVELS * high for low, high in plates.sub(20).div(14).round().int().tolist()]


def _add_video(container: OutputContainer, recipe: ClipRecipe) -> VideoStream:
    video = container.add_stream(recipe.codec, rate=recipe.rate, options=recipe.options)
    assert isinstance(video, VideoStream)
    video.width, video.height, video.pix_fmt = recipe.width, recipe.height, recipe.pixel_format
    if recipe.colour is not None:
        space, value_range = recipe.colour
        video.codec_context.colorspace, video.codec_context.color_range = space, value_range
    if recipe.stamps is not None:
        video.codec_context.time_base = Fraction(1, 1000)
    return video


def _picture(number: int, recipe: ClipRecipe) -> np.ndarray:
    """A frame that carries its own number in its middle; texture runs above and below."""
    width, height, way = recipe.width, recipe.height, recipe.speed * number
    image = np.roll(_texture(width, height), (way, way), axis=(0, 1))
    image[: height // 4, ::2] = np.roll(image[: height // 4, ::2], way * number, axis=1)
    plates = slice(height // 4, height - height // 4)
    image[plates, : width // 2] = 20 + 14 * (number % LEVELS)
    image[plates, width // 2 :] = 20 + 14 * (number // LEVELS % LEVELS)
    return image


@cache
def _texture(width: int, height: int) -> np.ndarray:
    """Random blobs of random colours, a few pixels wide."""
    coarse = np.random.default_rng(0).integers(16, 236, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(4, axis=0).repeat(4, axis=1)[:height, :width])


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
