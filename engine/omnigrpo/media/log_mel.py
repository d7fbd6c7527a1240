"""Waveforms to Whisper's log-mel features.

Shape suffixes: ``M`` mel bins, ``L`` mel frames (100 a second), ``K`` frequency bins of the spectrum.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 400
HOP_SAMPLES = 160
FLOOR = 1e-10
"""Smallest mel power; its log10 is the value of digital silence."""


def whisper_log_mel(waveform: Tensor, *, num_mel_bins: int, chunk_seconds: int) -> Tensor:
    """Compute what ``WhisperFeatureExtractor`` does for 16 kHz audio: zero-padded or cut to one chunk.

    Args:
        waveform: float32 mono samples ``[n]`` or ``[..., n]`` at 16 kHz, on any device.
        num_mel_bins: M, 80 or 128 in Whisper.
        chunk_seconds: length of the result; 30 in Whisper.

    Returns:
        float32 ``[..., M, chunk_seconds * 100]``; each waveform is scaled to its own loudest bin.
    """
    if not waveform.is_floating_point() or waveform.ndim == 0:
        raise ValueError(
            f"waveform must be floating-point samples [..., n], got {waveform.dtype} {list(waveform.shape)}"
        )
    num_frames = chunk_seconds * SAMPLE_RATE_HZ // HOP_SAMPLES
    heard = waveform[..., : chunk_seconds * SAMPLE_RATE_HZ].float()
    log_power_ML = _log_mel_power(_pad_for_frames(heard, num_frames), num_mel_bins)
    log_power_ML = F.pad(log_power_ML, (0, num_frames - log_power_ML.shape[-1]), value=math.log10(FLOOR))
    loudest = log_power_ML.amax(dim=(-2, -1), keepdim=True)
    return torch.maximum(log_power_ML, loudest - 8.0).add_(4.0).div_(4.0)


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


def _pad_for_frames(waveform: Tensor, num_frames: int) -> Tensor:
    """Pad with silence past the last window that hears a sample; frames after it need no computing."""
    hops = math.ceil((waveform.shape[-1] + WINDOW_SAMPLES) / HOP_SAMPLES)
    return F.pad(waveform, (0, min(hops, num_frames) * HOP_SAMPLES - waveform.shape[-1]))


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
