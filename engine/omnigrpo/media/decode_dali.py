"""Frames of thinned streams by DALI's dynamic mode: on a GPU's NVDEC engines, or by DALI's operators for the CPU.

DALI turns pictures into RGB by BT.601 whatever a stream says, and with chroma interpolated bilinearly.

What is sent to NVDEC is narrow on purpose. DALI tells its pictures by counting packets: one that yields no picture
would shift all frames behind it without a word. And NVDEC conceals damage, so a damaged picture of a whole file is no
error there, as it is on the CPU.
"""

import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

from omnigrpo.media.clip_error import ClipError, OutOfStepError
from omnigrpo.media.frames_pyav import FrameDecoder
from omnigrpo.media.load_dali import load_dali
from omnigrpo.media.sampling import Colour
from omnigrpo.media.thinned_stream import NotThinnableError, ThinnedStream, thin
from omnigrpo.media.tracks import MAX_PIXELS

_CPU_CODECS = {"vp8": "VP8", "vp9": "VP9", "mjpeg": "MJPEG"}
_GPU_CODECS = {"h264": "H.264", "hevc": "HEVC", "vp8": "VP8", "vp9": "VP9"}
"""Without AV1: Hopper's NVDEC has none, and its pictures may be shown without being decoded. MPEG-4 may leave pictures
out, and JPEG's value range is not in its pictures."""
_CPU_FORMATS = frozenset(("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p"))
_GPU_FORMATS = frozenset(("yuv420p", "yuvj420p"))
"""What NVDEC gives as it is; 10 bits would be cut to 8, and of H.264 it takes neither them nor 4:2:2 and 4:4:4."""
_H264_PROFILES = frozenset(("Constrained Baseline", "Baseline", "Main", "High"))
_BT601_TAGS = frozenset((2, 5, 6))
"""Matrices of ITU-T H.273 that are BT.601's, and none named."""
_PROGRESSIVE = (0, 1)
"""FFmpeg's field orders: unknown, progressive."""


class NotForDaliError(Exception):
    """Why DALI is not asked for a clip's frames, as a half sentence whose subject is the clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliClip:
    """What DALI needs of one clip."""

    stream: ThinnedStream
    quarter_turns: int
    """How often each frame is turned counter-clockwise to be upright."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliFailure:
    """A clip that DALI could not decode."""

    reason: str
    """DALI's own words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DaliSound:
    """The samples of a sound file."""

    samples_TC: np.ndarray
    """float32 ``[samples, channels]``."""
    sample_rate_hz: int
    """The file's own."""


def is_installed() -> bool:
    """Whether ``nvidia.dali`` is there; it is not imported."""
    # The namespace package ``nvidia`` comes with any CUDA wheel, and is missing without one.
    return (
        importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    )


def require_dali() -> None:
    """Raise ImportError when DALI is not installed."""
    if not is_installed():
        raise ImportError(
            "DALI is not installed, but was asked to decode: pip install 'omnigrpo[dali]', or set media.decoder to "
            "'auto' or 'pyav'"
        )


def unsupported_codec(codec: str, device: torch.device) -> str | None:
    """Why DALI takes no clip of this codec (FFmpeg's name) on this device, as a half sentence; None if it does."""
    names = _CPU_CODECS if device.type == "cpu" else _GPU_CODECS
    if codec in names:
        return None
    variant = "CPU variant" if device.type == "cpu" else "GPU variant here"
    *most, last = names.values()
    return f"is coded as {codec}, and DALI's {variant} decodes {', '.join(most)} and {last}"


def prepare(frames: FrameDecoder, device: torch.device, colour: Colour) -> DaliClip:
    """Thin a clip's stream for DALI.

    Raises:
        NotForDaliError: its frames would not be those of the CPU path, or DALI cannot decode them.
    """
    codec = frames.track.stream.codec_context
    unsupported = unsupported_codec(codec.codec.canonical_name, device)
    if unsupported is not None:
        raise NotForDaliError(unsupported)
    try:
        picture = frames.look()
    except OutOfStepError as error:
        raise NotForDaliError("has pictures that must be counted") from error
    except ClipError as error:
        raise NotForDaliError(str(error)) from error
    obstacle = _obstacle(frames, picture, colour)
    if obstacle is None and device.type != "cpu":
        obstacle = _gpu_obstacle(frames, picture)
    if obstacle is not None:
        raise NotForDaliError(obstacle)
    try:
        stream = thin(frames)
    except NotThinnableError as error:
        raise NotForDaliError(str(error)) from error
    return DaliClip(stream=stream, quarter_turns=round(picture.rotation / 90) % 4)


def _obstacle(frames: FrameDecoder, picture: VideoFrame, colour: Colour) -> str | None:
    """Why pictures like this one are not for DALI on any device."""
    size, header_size = (picture.width, picture.height), frames.header_size
    if size != header_size:
        return f"has pictures of {size[0]}x{size[1]}, and its header says {header_size[0]}x{header_size[1]}"
    if size[0] * size[1] > MAX_PIXELS:
        return f"has pictures of more than {MAX_PIXELS} pixels"
    field_order = frames.track.stream.codec_context.field_order
    if picture.interlaced_frame or field_order not in _PROGRESSIVE:
        return "is interlaced"
    if picture.format.name not in _CPU_FORMATS:
        return f"has pictures of format {picture.format.name}"
    matrix = int(picture.colorspace)
    if colour == "tag" and matrix not in _BT601_TAGS:
        # Clipped to 0 .. 255, RGB by one matrix cannot be turned into RGB by another exactly.
        return f"names the colour matrix {matrix} (ITU-T H.273), and DALI converts by BT.601 only"
    return None


def _gpu_obstacle(frames: FrameDecoder, picture: VideoFrame) -> str | None:
    """Why pictures like this one are not for NVDEC."""
    codec = frames.track.stream.codec_context
    if picture.format.name not in _GPU_FORMATS:
        return f"has pictures of format {picture.format.name}, and NVDEC gives 8-bit 4:2:0"
    if picture.width % 2 or picture.height % 2:
        return f"has pictures of {picture.width}x{picture.height}, and NVDEC gives even sizes"
    if codec.codec.canonical_name == "h264" and codec.profile not in _H264_PROFILES:
        return f"is coded in H.264's profile {codec.profile}"
    if any(map(frames.references.shows_again, frames.track.packets)):
        return "shows pictures again without decoding them"
    return None


class DaliDecoder:
    """Decodes batches of clips; used by one thread at a time."""

    def __init__(self, device: torch.device, num_threads: int) -> None:
        self._ndd, self._device = load_dali(), device
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)
        """Not torch's current one, on which the trainer's work is queued."""
        self._context = self._ndd.EvalContext(
            num_threads=num_threads, device_id=device.index, cuda_stream=self._stream
        )

    def decode(self, clips: Sequence[DaliClip]) -> list[Tensor | DaliFailure]:
        """uint8 RGB ``[F, height, width, 3]`` of each clip on the device, upright and ready for any CUDA stream.

        When DALI refuses the batch, its clips are tried one by one: only the damaged ones fail.
        """
        try:
            return [*self._decode(clips)]
        except (RuntimeError, MemoryError) as error:
            if len(clips) == 1:
                return [DaliFailure(reason=str(error))]
        return [self.decode([clip])[0] for clip in clips]

    def decode_sound(self, content: bytes) -> DaliSound | DaliFailure:
        """All samples of a file in WAV, FLAC or Ogg, at its own rate."""
        try:
            with self._context:
                file = self._ndd.as_batch([np.frombuffer(content, np.uint8)])
                samples, rates = self._ndd.decoders.audio(file, dtype=self._ndd.float32)
                samples_TC = samples.evaluate().tensors[0].torch(copy=True).numpy()
                rate = rates.evaluate().tensors[0].torch(copy=True).item()
        except (RuntimeError, MemoryError) as error:
            return DaliFailure(reason=str(error))
        if samples_TC.size == 0:
            return DaliFailure(reason="it reads no samples")
        return DaliSound(samples_TC=samples_TC.reshape(len(samples_TC), -1), sample_rate_hz=round(rate))

    def _decode(self, clips: Sequence[DaliClip]) -> list[Tensor]:
        ndd = self._ndd
        with self._context, nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            files = ndd.as_batch([np.frombuffer(clip.stream.content, np.uint8) for clip in clips])
            frames = ndd.as_batch([np.array(clip.stream.frames, np.int32) for clip in clips])
            # "none" must be a literal: DALI looks for constants in the source. Any other mode gives black or repeated
            # frames, without an error, for frames that are not there.
            if self._device.type == "cpu":
                decoded = ndd.decoders.video(files, frames=frames, pad_mode="none", device="cpu")
            else:
                decoded = ndd.decoders.video(
                    files, frames=frames, pad_mode="none", device="gpu", affine=False
                )
            tensors = [sample.torch(copy=True) for sample in decoded.evaluate().tensors]
            upright = [_turned(t, clip.quarter_turns) for t, clip in zip(tensors, clips, strict=True)]
        if self._stream is not None:
            self._stream.synchronize()
        return upright


def _turned(frames_FHWC: Tensor, quarter_turns: int) -> Tensor:
    return (
        torch.rot90(frames_FHWC, k=quarter_turns, dims=(1, 2)).contiguous() if quarter_turns else frames_FHWC
    )


_idle: dict[tuple[torch.device, int], list[DaliDecoder]] = {}
"""Decoders that nobody uses; one that hangs never comes back, and a fresh one takes its place."""
_idle_lock = threading.Lock()


@contextmanager
def dali_decoder(device: torch.device, num_threads: int) -> Iterator[DaliDecoder]:
    """A decoder for this thread alone, kept for the next one that asks: its first batch takes twice as long.

    Raises ImportError when DALI is not installed.
    """
    key = (device, num_threads)
    with _idle_lock:
        decoder = _idle[key].pop() if _idle.get(key) else None
    decoder = decoder or DaliDecoder(device, num_threads)
    yield decoder
    with _idle_lock:
        _idle.setdefault(key, []).append(decoder)
