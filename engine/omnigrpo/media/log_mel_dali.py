"""Whisper's log-mel features on DALI's operators, on the CPU or a GPU.

The same features as ``omnigrpo.media.log_mel``, for pipelines that decode with DALI.

Shape suffixes: ``B`` waveforms, ``M`` mel bins, ``L`` mel frames (100 a second).
"""

import contextlib
import math
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

    On a GPU it works on torch's current stream. Operators are kept between calls by DALI's evaluation context: on the
    CPU the calling thread's, on a GPU the current one where that has torch's stream, else one of this call.

    Args:
        waveforms: B waveforms of float samples ``[n]`` at 16 kHz, mono, each of its own length.
        num_mel_bins: M, 80 or 128 in Whisper.
        chunk_seconds: length of the result; 30 in Whisper.

    Returns:
        float32 ``[B, M, chunk_seconds * 100]``, within 1e-4 of the extractor's; each waveform is scaled to its own
        loudest bin.

    Raises:
        ImportError: DALI is not installed.
        ValueError: There are no waveforms, they are no float samples, or they lie on several devices.
    """
    check_log_mel_sizes(num_mel_bins, chunk_seconds)
    device = check_waveforms(waveforms)
    ndd = load_dali()
    heard = [w.detach()[: chunk_seconds * SAMPLE_RATE_HZ].float().contiguous() for w in waveforms]
    with _on_torch_stream(ndd, device):
        return _log_mel(ndd, heard, num_mel_bins, chunk_seconds * SAMPLE_RATE_HZ // HOP_SAMPLES)


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


def _on_torch_stream(ndd: ModuleType, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """An evaluation context whose memory is handed out and taken back in the order of torch's current stream."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    stream = torch.cuda.current_stream(device)
    current = ndd.EvalContext.current()
    if current.device_id == device.index and current.cuda_stream.handle == stream.cuda_stream:
        return contextlib.nullcontext()
    return ndd.EvalContext(device_id=device.index, cuda_stream=stream)
