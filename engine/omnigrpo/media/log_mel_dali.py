"""Whisper's log-mel features on DALI's operators, on the CPU or a GPU.

The same features as ``omnigrpo.media.log_mel``, for pipelines that decode with DALI.

Shape suffixes: ``B`` waveforms, ``M`` mel bins, ``L`` mel frames (100 a second).
"""

import math
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from omnigrpo.media.load_dali import load_dali
from omnigrpo.media.log_mel import (
    FLOOR,
    HOP_SAMPLES,
    SAMPLE_RATE_HZ,
    WINDOW_SAMPLES,
    check_log_mel_sizes,
    check_waveforms,
    num_hops_heard,
)

_FLOOR_LOG10 = math.log10(FLOOR)


def dali_log_mel(waveforms: Sequence[Tensor], *, num_mel_bins: int, chunk_seconds: int) -> Tensor:
    """Compute what ``WhisperFeatureExtractor`` does for 16 kHz audio, on the device where the waveforms lie.

    On the CPU it runs in DALI's current evaluation context: with a thread a core, unless the caller enters another.
    On a GPU it runs on a stream of the calling thread's own, in order with torch's current one.

    Args:
        waveforms: B waveforms of float samples ``[n]`` at 16 kHz, mono, each of its own length.
        num_mel_bins: M, 80 or 128 in Whisper.
        chunk_seconds: length of the result; 30 in Whisper.

    Returns:
        float32 ``[B, M, chunk_seconds * 100]``; each waveform is scaled to its own loudest bin. Within 1e-4 of the
        extractor's features of speech and noise; of pure tones, which leave most bins to rounding, 5e-4, as far apart
        as the extractor's own variants for numpy and torch.

    Raises:
        ImportError: DALI is not installed.
        ValueError: There are no waveforms, they are no float samples, or they lie on several devices.
    """
    check_log_mel_sizes(num_mel_bins, chunk_seconds)
    device = check_waveforms(waveforms)
    ndd = load_dali()
    heard = [w.detach()[: chunk_seconds * SAMPLE_RATE_HZ].float().contiguous() for w in waveforms]
    num_frames = chunk_seconds * SAMPLE_RATE_HZ // HOP_SAMPLES
    if device.type == "cpu":
        return _log_mel(ndd, heard, num_mel_bins, num_frames)
    return _log_mel_on_gpu(ndd, heard, num_mel_bins, num_frames)


def _log_mel(ndd: ModuleType, heard: list[Tensor], num_mel_bins: int, num_frames: int) -> Tensor:
    """DALI's operators in order; strings must be literals, or DALI cannot tell their type."""
    hops = [num_hops_heard(len(waveform), num_frames) for waveform in heard]
    lengths = ndd.as_batch([torch.tensor([n * HOP_SAMPLES], dtype=torch.int32) for n in hops])
    padded = ndd.pad(ndd.as_batch(heard), axes=[0], shape=lengths)
    power = ndd.spectrogram(
        padded,
        nfft=WINDOW_SAMPLES,
        window_length=WINDOW_SAMPLES,
        window_step=HOP_SAMPLES,
        window_fn=torch.hann_window(WINDOW_SAMPLES).tolist(),  # DALI's own is half a sample off.
        power=2,
        center_windows=True,
        reflect_padding=True,
        layout="ft",
    )
    mel = ndd.mel_filter_bank(
        power.slice[:, :-1],  # Whisper drops the last frame.
        sample_rate=SAMPLE_RATE_HZ,
        nfilter=num_mel_bins,
        freq_low=0,
        freq_high=SAMPLE_RATE_HZ / 2,
        mel_formula="slaney",
        normalize=True,
    )
    # A multiplier of 1 makes decibels a plain log10; the reference would else be the loudest bin.
    log_power = ndd.to_decibels(mel, multiplier=1.0, reference=1.0, cutoff_db=_FLOOR_LOG10)
    log_power = ndd.pad(log_power, axes=[1], shape=[num_frames], fill_value=_FLOOR_LOG10)
    loudest = ndd.reductions.max(log_power, axes=[0, 1])
    return ((ndd.math.max(log_power, loudest - 8.0) + 4.0) / 4.0).torch()


class _GpuLanes(threading.local):
    """For each GPU, the stream on which the calling thread runs DALI, and the context that keeps its operators."""

    def __init__(self) -> None:
        self.lanes: dict[torch.device, tuple[torch.cuda.Stream, Any]] = {}

    def lane(self, ndd: ModuleType, device: torch.device) -> tuple[torch.cuda.Stream, Any]:
        if device not in self.lanes:
            stream = torch.cuda.Stream(device)
            self.lanes[device] = (stream, ndd.EvalContext(device_id=device.index, cuda_stream=stream))
        return self.lanes[device]


_gpu_lanes = _GpuLanes()


def _log_mel_on_gpu(ndd: ModuleType, heard: list[Tensor], num_mel_bins: int, num_frames: int) -> Tensor:
    """Run DALI in order with torch's current stream, and return memory of torch's own.

    Not on that stream itself: torch hands no tensors to others on the default one. DALI takes its memory back in the
    order of the stream that it ran on, so the copy is made there.
    """
    device = heard[0].device
    stream, context = _gpu_lanes.lane(ndd, device)
    callers = torch.cuda.current_stream(device)
    stream.wait_stream(callers)
    with torch.cuda.stream(stream), context:
        features = _log_mel(ndd, heard, num_mel_bins, num_frames).clone()
    callers.wait_stream(stream)
    for waveform in heard:
        waveform.record_stream(stream)
    features.record_stream(callers)
    return features
