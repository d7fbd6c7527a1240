"""What bench_media compares with: other readers of the same frames and the same 16 kHz mono sound, one thread each."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation
from torch import Tensor

from omnigrpo.media.sampling import uniform_frame_indices

SAMPLE_RATE_HZ = 16_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """What a reader gives for one file."""

    frames_FHWC: Tensor
    """uint8 RGB."""
    waveform: Tensor
    """float32 mono at 16 kHz, on the CPU."""


Reader = Callable[[Path, int], Media]
"""From a path and a number of uniform frames."""


def torchcodec() -> Reader:
    """torchcodec in exact mode; ImportError where it is not installed or finds no FFmpeg libraries."""
    require_ffmpeg_libraries()
    decoders = import_module("torchcodec.decoders")

    def read(path: Path, num_frames: int) -> Media:
        video = decoders.VideoDecoder(
            str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact"
        )
        indices = uniform_frame_indices(video.metadata.num_frames, num_frames)
        frames_FHWC = video.get_frames_at(list(indices)).data
        audio = decoders.AudioDecoder(str(path), sample_rate=SAMPLE_RATE_HZ, num_channels=1)
        return Media(frames_FHWC=frames_FHWC, waveform=audio.get_all_samples().data[0])

    return read


def torchcodec_cuda_frames() -> Callable[[Path, int], Tensor]:
    """torchcodec's frames from NVDEC, on the GPU; ImportError where its build has no CUDA."""
    require_ffmpeg_libraries()
    decoders = import_module("torchcodec.decoders")

    def read(path: Path, num_frames: int) -> Tensor:
        video = decoders.VideoDecoder(str(path), dimension_order="NHWC", device="cuda", seek_mode="exact")
        indices = uniform_frame_indices(video.metadata.num_frames, num_frames)
        return video.get_frames_at(list(indices)).data

    return read


def decord() -> Reader:
    """decord; ImportError where it is not installed."""
    module = import_module("decord")

    def read(path: Path, num_frames: int) -> Media:
        video = module.VideoReader(str(path), num_threads=1)
        indices = uniform_frame_indices(len(video), num_frames)
        frames_FHWC = torch.from_numpy(video.get_batch(list(indices)).asnumpy())
        audio = module.AudioReader(str(path), sample_rate=SAMPLE_RATE_HZ, mono=True)
        return Media(frames_FHWC=frames_FHWC, waveform=torch.from_numpy(audio[:].asnumpy()[0]))

    return read


def sequential_pyav() -> Reader:
    """PyAV as it is commonly written: all pictures in order, the wanted ones converted, then all sound."""

    def read(path: Path, num_frames: int) -> Media:
        frames_FHWC = sequential_frames(path, num_frames, _plain_rgb)
        return Media(frames_FHWC=frames_FHWC, waveform=_sequential_sound(path))

    return read


def sequential_frames(path: Path, num_frames: int, to_rgb: Callable[[VideoFrame], Tensor]) -> Tensor:
    """Uniform frames of a file whose container counts them, by decoding every picture."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        wanted = uniform_frame_indices(stream.frames, num_frames)
        pictures = enumerate(container.decode(stream))
        images = {number: to_rgb(picture) for number, picture in pictures if number in set(wanted)}
    return torch.stack([images[number] for number in wanted])


def exact_rgb(picture: VideoFrame) -> Tensor:
    """As the engine defines it, with bilinear chroma from the middle of four luma samples, but by swscale.

    A copy of the planes does not say that H.264 has its chroma elsewhere.
    """
    flags = Interpolation.BILINEAR | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
    bare = VideoFrame.from_ndarray(picture.to_ndarray(), format=picture.format.name)
    return torch.from_numpy(bare.reformat(format="rgb24", interpolation=flags).to_ndarray())


def require_ffmpeg_libraries() -> None:
    """Raise ImportError that says what torchcodec lacks: it brings no FFmpeg of its own, PyAV and decord do."""
    try:
        import_module("torchcodec")
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise ImportError(
            f"torchcodec is installed, but cannot load its core ({first}): install FFmpeg's shared libraries, "
            "4 to 9 (Debian: apt-get install ffmpeg), and the build of torchcodec that matches torch"
        ) from error


READERS: dict[str, Callable[[], Reader]] = {
    "torchcodec": torchcodec,
    "decord": decord,
    "sequential PyAV": sequential_pyav,
}
"""By name; a peer raises ImportError where it is not installed."""


def _plain_rgb(picture: VideoFrame) -> Tensor:
    return torch.from_numpy(picture.to_ndarray(format="rgb24"))


def _sequential_sound(path: Path) -> Tensor:
    resampler = AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    with av.open(str(path)) as container:
        frames = (*container.decode(container.streams.audio[0]), None)
        blocks = [block.to_ndarray()[0] for frame in frames for block in resampler.resample(frame)]
    return torch.from_numpy(np.concatenate(blocks))
