"""The clips that bench_media decodes: a moving texture of natural sharpness, and a chord in noise."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.stream import VideoStream

H264 = {"preset": "medium", "bf": "3", "maxrate": "4000k", "bufsize": "8000k"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"}
AUDIO_RATE_HZ = 44_100
_BLOCK_SAMPLES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """What to write."""

    codec: str = "libx264"
    """FFmpeg's name of the encoder."""
    gop: int = 250
    """Pictures from one keyframe to the next."""
    width: int = 1280
    height: int = 720
    num_frames: int = 300
    rate: int = 30
    bits_per_second: int = 2_600_000
    options: dict[str, str] = field(default_factory=lambda: dict(H264))
    pixel_format: str = "yuv420p"
    audio_codec: str = "aac"
    """At 44.1 kHz, stereo; libopus takes 48 kHz only."""

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.num_frames / self.rate


def write_clip(path: Path, spec: ClipSpec, *, seed: int = 0) -> Path:
    """Encode one clip; another seed gives another texture and another sound."""
    generator = np.random.default_rng(seed)
    audio_rate = 48_000 if spec.audio_codec == "libopus" else AUDIO_RATE_HZ
    with av.open(str(path), "w") as container:
        options = spec.options | {"g": str(spec.gop)}
        video = cast("VideoStream", container.add_stream(spec.codec, rate=spec.rate, options=options))
        video.width, video.height, video.pix_fmt = spec.width, spec.height, spec.pixel_format
        video.bit_rate = spec.bits_per_second
        audio = cast("AudioStream", container.add_stream(spec.audio_codec, rate=audio_rate, layout="stereo"))
        for image_HW3 in moving_texture(spec, generator):
            container.mux(video.encode(av.VideoFrame.from_ndarray(image_HW3, format="rgb24")))
        container.mux(video.encode(None))
        _write_sound(container, audio, sound(spec.seconds, audio_rate, generator))
    return path


def moving_texture(spec: ClipSpec, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """uint8 pictures ``[height, width, 3]``: a camera that pans over a scene, two objects in it, and grain."""
    height, width = spec.height, spec.width
    margin = min(height, width) // 6
    scene = natural_texture(height + 2 * margin, width + 2 * margin, generator)
    side = height // 3
    objects = [natural_texture(side, side, generator) for _ in range(2)]
    rows, columns = np.mgrid[0:side, 0:side]
    disc = (rows - side / 2) ** 2 + (columns - side / 2) ** 2 < (side / 2) ** 2
    grain = [generator.normal(0, 2, (height, width, 1)).astype(np.int16) for _ in range(8)]
    for number in range(spec.num_frames):
        seconds = number / spec.rate
        top = round(margin * (1 + 0.9 * np.sin(0.7 * seconds)))
        left = round(margin * (1 + 0.9 * np.cos(0.5 * seconds)))
        image = scene[top : top + height, left : left + width].astype(np.int16)
        for at, texture in enumerate(objects):
            y = round((height - side) / 2 * (1 + 0.8 * np.sin((1.3 + at) * seconds + at)))
            x = round((width - side) / 2 * (1 + 0.8 * np.cos((0.9 - 0.4 * at) * seconds + 2 * at)))
            image[y : y + side, x : x + side][disc] = texture[disc]
        yield np.clip(image + grain[number % len(grain)], 0, 255).astype(np.uint8)


def natural_texture(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 colour noise whose spectrum falls as one over frequency, as that of photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    planes = []
    for _ in range(3):
        phases = generator.uniform(0, 2 * np.pi, frequency.shape)
        plane = np.fft.irfft2(np.exp(1j * phases) / frequency, s=(height, width))
        planes.append(plane / plane.std())
    luma, *chroma = planes
    colours = [luma + 0.4 * (chroma[0] if at == 0 else chroma[1] if at == 2 else 0) for at in range(3)]
    return np.clip(128 + 48 * np.stack(colours, axis=-1), 0, 255).astype(np.uint8)


def sound(seconds: float, rate_hz: int, generator: np.random.Generator) -> np.ndarray:
    """float32 ``[2, samples]``: a chord that swells, and noise, differing between the ears."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    chord = sum(np.sin(2 * np.pi * hertz * time) for hertz in generator.uniform(150, 1500, 4))
    swell = 0.1 * (1 + np.sin(2 * np.pi * 0.5 * time))
    noise = 0.03 * generator.normal(size=(2, len(time)))
    return (swell * chord + noise).astype(np.float32)


def _write_sound(container: OutputContainer, audio: AudioStream, samples: np.ndarray) -> None:
    kind = audio.codec_context.format.name
    for start in range(0, samples.shape[1], _BLOCK_SAMPLES):
        block = samples[:, start : start + _BLOCK_SAMPLES]
        planar = kind.endswith("p")
        block = np.ascontiguousarray(block if planar else block.T.reshape(1, -1))
        frame = av.AudioFrame.from_ndarray(block, format="fltp" if planar else "flt", layout="stereo")
        frame.sample_rate = audio.rate
        frame.time_base, frame.pts = Fraction(1, audio.rate), start
        container.mux(audio.encode(frame))
    container.mux(audio.encode(None))
