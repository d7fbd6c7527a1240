"""Writes frames and samples as an .mp4 file: H.264 and AAC."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_VIDEO_OPTIONS = {"preset": "superfast", "crf": "24", "threads": "1"}
_AUDIO_OPTIONS = {"aac_coder": "fast"}
_AUDIO_BIT_RATE = 48_000


def write_mp4(
    path: Path,
    frames_FHWC: np.ndarray,
    waveform: np.ndarray,
    *,
    frames_per_second: int,
    sample_rate_hz: int,
) -> None:
    """Encode uint8 RGB frames (even sides) as H.264 yuv420p and float32 mono samples as AAC."""
    height, width = frames_FHWC.shape[1:3]
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=frames_per_second, options=_VIDEO_OPTIONS)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = container.add_stream("aac", rate=sample_rate_hz, options=_AUDIO_OPTIONS)
        audio.layout, audio.bit_rate = "mono", _AUDIO_BIT_RATE
        for frame_HWC in frames_FHWC:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(video.encode(None))
        samples = av.AudioFrame.from_ndarray(waveform[None, :], format="fltp", layout="mono")
        samples.sample_rate, samples.time_base, samples.pts = sample_rate_hz, Fraction(1, sample_rate_hz), 0
        container.mux(audio.encode(samples))
        container.mux(audio.encode(None))
