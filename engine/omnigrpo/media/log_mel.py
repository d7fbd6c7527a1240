"""Waveforms to Whisper's log-mel features.

Shape suffixes: ``M`` mel bins, ``L`` mel frames (100 a second), ``B`` waveforms, ``K`` frequency bins of the spectrum.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
FLOOR = 1e-10
"""Smallest mel power; its log10 is the value of digital silence."""


def whisper_log_mel(waveform: Tensor | Sequence[Tensor], *, num_mel_bins: int, chunk_seconds: int) -> Tensor:
    """Compute what ``WhisperFeatureExtractor`` does for 16 kHz audio: zero-padded or cut to one chunk.

    Args:
        waveform: float mono samples ``[n]`` or ``[..., n]`` at 16 kHz, on any device; or B of them ``[n]``, each of
            its own length.
        num_mel_bins: M, 80 or 128 in Whisper.
        chunk_seconds: length of the result; 30 in Whisper.

    Returns:
        float32 ``[..., M, chunk_seconds * 100]``, or ``[B, M, chunk_seconds * 100]``; each waveform is scaled to its
        own loudest bin.

    Raises:
        ValueError: There is no waveform, one is no float samples, or they lie on several devices.
    """
    check_log_mel_sizes(num_mel_bins, chunk_seconds)
    num_frames = chunk_seconds * SAMPLE_RATE_HZ // HOP_SAMPLES
    if not isinstance(waveform, Tensor):
        device = check_waveforms(waveform)
        heard = [samples[: chunk_seconds * SAMPLE_RATE_HZ].float() for samples in waveform]
        if (
            device.type == "cpu"
        ):  # One by one, a core's cache holds the spectrum and no time goes into silence.
            return torch.stack([_padded_log_mel(samples, num_mel_bins, num_frames) for samples in heard])
        return _padded_log_mel(pad_sequence(heard, batch_first=True), num_mel_bins, num_frames)
    if not waveform.is_floating_point() or waveform.ndim == 0:
        raise ValueError(
            f"waveform must be floating-point samples [..., n], got {waveform.dtype} {list(waveform.shape)}"
        )
    return _padded_log_mel(waveform[..., : chunk_seconds * SAMPLE_RATE_HZ].float(), num_mel_bins, num_frames)


def check_log_mel_sizes(num_mel_bins: int, chunk_seconds: int) -> None:
    """Raise ValueError unless both are at least 1."""
    for name, value in (("num_mel_bins", num_mel_bins), ("chunk_seconds", chunk_seconds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_waveforms(waveforms: Sequence[Tensor]) -> torch.device:
    """Return the device of waveforms ``[n]``; ValueError when they are no float samples or lie on several devices."""
    if not waveforms:
        raise ValueError("there are no waveforms; leave the call out")
    for index, waveform in enumerate(waveforms):
        if not waveform.is_floating_point() or waveform.ndim != 1:
            raise ValueError(
                f"each waveform must be floating-point samples [n], got {waveform.dtype} {list(waveform.shape)} "
                f"for waveform {index}; mix it down to one channel first"
            )
    devices = {waveform.device for waveform in waveforms}
    if len(devices) > 1:
        names = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(f"the waveforms must lie on one device, got {names}; move them first")
    return waveforms[0].device


def num_hops_heard(num_samples: int, num_frames: int) -> int:
    """Mel frames up to the last one whose window may hear a sample; those after it are silence."""
    return min(math.ceil((num_samples + WINDOW_SAMPLES) / HOP_SAMPLES), num_frames)


@lru_cache(maxsize=16)
def slaney_mel_filters(num_mel_bins: int, device: torch.device) -> Tensor:
    """Return area-normalised triangular filters on Slaney's mel scale over 0-8000 Hz, float32 ``[M, K]``."""
    top_mel = _hertz_to_mel(SAMPLE_RATE_HZ / 2)
    corners = _mel_to_hertz(torch.linspace(0.0, top_mel, num_mel_bins + 2, dtype=torch.float64))
    bins_K = torch.linspace(0.0, SAMPLE_RATE_HZ / 2, WINDOW_SAMPLES // 2 + 1, dtype=torch.float64)
    low, centre, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangles_MK = torch.minimum((bins_K - low) / (centre - low), (high - bins_K) / (high - centre)).clamp_(
        min=0
    )
    return (triangles_MK * (2.0 / (high - low))).to(device=device, dtype=torch.float32)


def _padded_log_mel(heard: Tensor, num_mel_bins: int, num_frames: int) -> Tensor:
    """Log-mel features of at most one chunk of samples, silence after them."""
    num_samples = heard.shape[-1]
    hops = num_hops_heard(num_samples, num_frames)
    log_power_ML = _log_mel_power(F.pad(heard, (0, hops * HOP_SAMPLES - num_samples)), num_mel_bins)
    log_power_ML = F.pad(log_power_ML, (0, num_frames - hops), value=math.log10(FLOOR))
    loudest = log_power_ML.amax(dim=(-2, -1), keepdim=True)
    return torch.maximum(log_power_ML, loudest - 8.0).add_(4.0).div_(4.0)


def _log_mel_power(waveform: Tensor, num_mel_bins: int) -> Tensor:
    """Log10 of the mel power of every hop, ``[..., M, samples / 160]``."""
    spectrum = torch.stft(
        waveform.reshape(-1, waveform.shape[-1]),
        WINDOW_SAMPLES,
        HOP_SAMPLES,
        window=torch.hann_window(WINDOW_SAMPLES, device=waveform.device),
        return_complex=True,
    )
    power_KL = spectrum[..., :-1].abs().square().contiguous()
    mel_ML = slaney_mel_filters(num_mel_bins, waveform.device) @ power_KL
    return mel_ML.clamp_(min=FLOOR).log10_().reshape(*waveform.shape[:-1], num_mel_bins, -1)


def _hertz_to_mel(hertz: float) -> float:
    """Slaney's scale: linear up to 1 kHz, logarithmic above, 27 steps per factor 6.4."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _mel_to_hertz(mel: Tensor) -> Tensor:
    """Inverse of Slaney's scale."""
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * (math.log(6.4) / 27)))
