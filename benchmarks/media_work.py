"""The clips that bench_media decodes: a moving texture of natural sharpness, and a chord in noise."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.stream import VideoStream
from torch import Tensor
from torch.nn import functional

H264 = {"preset": "medium", "bf": "3", "maxrate": "4000k", "bufsize": "8000k"}
VP9 = {"deadline": "realtime", "cpu-used": "8", "row-mt": "1"}
AUDIO_RATE_HZ = 44_100
_BLOCK_SAMPLES = 1024
NUM_LEAVES = 6000
GRAIN = 2.0
"""Standard deviation of the camera's noise, in steps of 255."""


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


def write_clips(specs: Mapping[Path, ClipSpec], *, seed: int = 0) -> None:
    """Encode the same pictures and the same sound in several ways; another seed gives others.

    Raises ValueError when the specs differ in size, rate or number of pictures.
    """
    first, *others = specs.values()
    for spec in others:
        if _content(spec) != _content(first):
            raise ValueError(
                f"specs must ask for the same pictures, got {_content(first)} and {_content(spec)}"
            )
    generator = np.random.default_rng(seed)
    with ExitStack() as stack:
        writers = [
            _Writer(stack.enter_context(av.open(str(path), "w")), spec) for path, spec in specs.items()
        ]
        for image_HW3 in moving_texture(first, generator):
            for writer in writers:
                writer.add_picture(image_HW3)
        tone_seed = int(generator.integers(2**32))
        for writer in writers:
            writer.finish(np.random.default_rng(tone_seed))


class _Writer:
    """One file that is being encoded."""

    def __init__(self, container: OutputContainer, spec: ClipSpec) -> None:
        self._container, self._spec = container, spec
        rate_hz = 48_000 if spec.audio_codec == "libopus" else AUDIO_RATE_HZ
        options = spec.options | {"g": str(spec.gop)}
        self._video = cast("VideoStream", container.add_stream(spec.codec, rate=spec.rate, options=options))
        self._video.width, self._video.height = spec.width, spec.height
        self._video.pix_fmt, self._video.bit_rate = spec.pixel_format, spec.bits_per_second
        audio = container.add_stream(spec.audio_codec, rate=rate_hz, layout="stereo")
        self._audio = cast("AudioStream", audio)

    def add_picture(self, image_HW3: np.ndarray) -> None:
        self._container.mux(self._video.encode(av.VideoFrame.from_ndarray(image_HW3, format="rgb24")))

    def finish(self, generator: np.random.Generator) -> None:
        """Flush the pictures and add the sound."""
        self._container.mux(self._video.encode(None))
        samples = sound(self._spec.seconds, self._audio.rate, generator)
        is_planar = self._audio.codec_context.format.name.endswith("p")
        for start in range(0, samples.shape[1], _BLOCK_SAMPLES):
            block = samples[:, start : start + _BLOCK_SAMPLES]
            block = np.ascontiguousarray(block if is_planar else block.T.reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block, format="fltp" if is_planar else "flt", layout="stereo")
            frame.sample_rate = self._audio.rate
            frame.time_base, frame.pts = Fraction(1, self._audio.rate), start
            self._container.mux(self._audio.encode(frame))
        self._container.mux(self._audio.encode(None))


def _content(spec: ClipSpec) -> tuple[int, int, int, int]:
    return spec.width, spec.height, spec.num_frames, spec.rate


def moving_texture(spec: ClipSpec, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """uint8 pictures ``[height, width, 3]``: a scene that sways and zooms, two soft bodies that turn, and grain.

    All motion is by fractions of pixels and differs from place to place: whole-pixel steps would let the encoder make
    B-pictures of almost no bytes, which no camera's do.
    """
    height, width = spec.height, spec.width
    layers = [_layer(natural_texture(height, width, generator)) for _ in range(3)]
    y_HW, x_HW = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    for number in range(spec.num_frames):
        at = number / spec.rate
        zoom = 0.82 + 0.06 * math.sin(0.6 * at)
        wave = 0.008 * torch.sin(3 * y_HW + 2.1 * at), 0.012 * torch.sin(2 * x_HW - 1.7 * at)
        shift = 0.09 * math.sin(0.7 * at), 0.09 * math.cos(0.5 * at)
        image_3HW = _sampled(layers[0], zoom * x_HW + wave[0] + shift[0], zoom * y_HW + wave[1] + shift[1])
        for body, layer in enumerate(layers[1:]):
            centre = (
                0.5 * math.cos((0.9 - 0.4 * body) * at + 2 * body),
                0.4 * math.sin((1.3 + body) * at + body),
            )
            x, y = (x_HW - centre[0]) * width / height, y_HW - centre[1]
            turn = 0.3 * math.sin((1.1 + 0.5 * body) * at)
            u, v = math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y
            texture_3HW = _sampled(layer, 0.6 * u + wave[1], 0.6 * v + wave[0])
            opacity_HW = ((0.45 - torch.hypot(x, y * (1 + 0.1 * math.sin(2 * at)))) * 40).clamp(0, 1)
            image_3HW = torch.lerp(image_3HW, texture_3HW, opacity_HW)
        light = 1 + 0.05 * math.sin(1.9 * at)
        grain_HW1 = torch.from_numpy(generator.normal(0, GRAIN, (height, width, 1)).astype(np.float32))
        image_HW3 = image_3HW.permute(1, 2, 0) * light + grain_HW1
        yield image_HW3.clamp(0, 255).to(torch.uint8).numpy()


def natural_texture(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """uint8 colours of opaque discs that cover each other, radii by a power law, each faintly textured.

    "Dead leaves" (Lee, Mumford and Huang, 2001): edges, smooth areas and a spectrum as photographs have them.
    """
    image_HW3 = np.full((height, width, 3), 128.0)
    smallest, largest = height / 90, height / 3
    for _ in range(NUM_LEAVES):
        share = generator.uniform()
        radius = (smallest**-2 * (1 - share) + largest**-2 * share) ** -0.5
        y, x = generator.uniform(0, height), generator.uniform(0, width)
        top, left = max(int(y - radius), 0), max(int(x - radius), 0)
        view_HW3 = image_HW3[top : int(y + radius) + 1, left : int(x + radius) + 1]
        rows, columns = np.ogrid[top : top + view_HW3.shape[0], left : left + view_HW3.shape[1]]
        inside_HW = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
        colour = generator.uniform(30, 225) + generator.normal(0, 20, 3)
        view_HW3[inside_HW] = colour
    image_HW3 += 8 * _pink_noise(height, width, generator)[:, :, None]
    return np.clip(image_HW3, 0, 255).astype(np.uint8)


def _pink_noise(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """Noise of unit deviation whose amplitude falls as one over frequency."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    phases = generator.uniform(0, 2 * np.pi, frequency.shape)
    noise = np.fft.irfft2(np.exp(1j * phases) / frequency, s=(height, width))
    return noise / noise.std()


def sound(seconds: float, rate_hz: int, generator: np.random.Generator) -> np.ndarray:
    """float32 ``[2, samples]``: a chord that swells, and noise, differing between the ears."""
    time = np.arange(round(seconds * rate_hz)) / rate_hz
    chord = sum(np.sin(2 * np.pi * hertz * time) for hertz in generator.uniform(150, 1500, 4))
    swell = 0.1 * (1 + np.sin(2 * np.pi * 0.5 * time))
    noise = 0.03 * generator.normal(size=(2, len(time)))
    return (swell * chord + noise).astype(np.float32)


def _layer(texture_HW3: np.ndarray) -> Tensor:
    return torch.from_numpy(texture_HW3).permute(2, 0, 1)[None].float()


def _sampled(layer_13HW: Tensor, x_HW: Tensor, y_HW: Tensor) -> Tensor:
    """The layer at fractional places, mirrored beyond its edges."""
    grid_1HW2 = torch.stack([x_HW, y_HW], dim=-1)[None]
    return functional.grid_sample(layer_13HW, grid_1HW2, padding_mode="reflection", align_corners=False)[0]
