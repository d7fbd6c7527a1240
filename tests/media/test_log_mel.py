"""Log-mel features against transformers' WhisperFeatureExtractor."""

import math
from importlib import import_module

import numpy as np
import pytest
import torch
import transformers

from omnigrpo.media.log_mel import slaney_mel_filters, whisper_log_mel


def _voice(num_samples: int, seed: int = 0) -> torch.Tensor:
    """A gliding tone with noise, loud enough to span the whole dynamic range."""
    time = torch.arange(num_samples) / 16_000
    tone = 0.5 * torch.sin(2 * math.pi * (200 + 300 * time) * time)
    noise = torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))
    return tone * (0.5 + 0.5 * torch.sin(7 * time)) + 0.01 * noise


def _expected(waveform: torch.Tensor, num_mel_bins: int, chunk_seconds: int) -> torch.Tensor:
    extractor = transformers.WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=chunk_seconds)
    features = extractor(waveform.numpy(), sampling_rate=16_000, return_tensors="np")["input_features"]
    return torch.from_numpy(features[0])


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize(
    ("num_samples", "chunk_seconds"),
    [
        (160_000, 30), (1, 30), (159, 30), (16_001, 30), (479_600, 30), (479_999, 30), (480_000, 30),
        (560_000, 30), (48_000, 3), (47_700, 3), (20_000, 3), (50_000, 1),
    ],
)  # fmt: skip
def test_equals_the_whisper_feature_extractor(
    num_mel_bins: int, num_samples: int, chunk_seconds: int, device: str
):
    waveform = _voice(num_samples)
    ours = whisper_log_mel(waveform.to(device), num_mel_bins=num_mel_bins, chunk_seconds=chunk_seconds)
    expected = _expected(waveform, num_mel_bins, chunk_seconds)
    assert ours.shape == (num_mel_bins, chunk_seconds * 100)
    assert ours.dtype == torch.float32
    assert ours.device.type == device
    assert (ours.cpu() - expected).abs().max() <= (1e-5 if device == "cpu" else 1e-4)


@pytest.mark.parametrize("num_samples", [16_000, 480_000])
def test_silence_equals_the_whisper_feature_extractor(num_samples: int):
    silence = torch.zeros(num_samples)
    ours = whisper_log_mel(silence, num_mel_bins=128, chunk_seconds=30)
    assert torch.equal(ours, _expected(silence, 128, 30))
    assert torch.equal(ours, torch.full_like(ours, -1.5))


def test_no_samples_are_silence():
    assert torch.equal(
        whisper_log_mel(torch.zeros(0), num_mel_bins=80, chunk_seconds=3), torch.full((80, 300), -1.5)
    )


def test_a_batch_is_its_waveforms_each_scaled_alone():
    waveforms = torch.stack([_voice(30_000), 1e-3 * _voice(30_000, seed=1), torch.zeros(30_000)])
    batch = whisper_log_mel(waveforms, num_mel_bins=80, chunk_seconds=3)
    alone = torch.stack([whisper_log_mel(w, num_mel_bins=80, chunk_seconds=3) for w in waveforms])
    assert (batch - alone).abs().max() <= 1e-5
    nested = whisper_log_mel(waveforms[:2].reshape(2, 1, -1), num_mel_bins=80, chunk_seconds=3)
    assert nested.shape == (2, 1, 80, 300)


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_filters_equal_transformers(num_mel_bins: int):
    audio_utils = import_module("transformers.audio_utils")
    expected = audio_utils.mel_filter_bank(
        201, num_mel_bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney"
    ).T
    ours = slaney_mel_filters(num_mel_bins, torch.device("cpu")).numpy()
    assert np.abs(ours - expected).max() <= 1e-8


RAGGED_SECONDS = (0.5, 3.0, 10.0, 29.99, 30.0, 35.0)


def _ragged() -> list[torch.Tensor]:
    """Waveforms of many lengths, among them silence, one sample and none, each of its own loudness."""
    sounds = [10**-n * _voice(int(s * 16_000), seed=n) for n, s in enumerate(RAGGED_SECONDS)]
    return [*sounds, torch.zeros(16_000), torch.tensor([0.5]), torch.zeros(0)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_ragged_waveforms_equal_the_whisper_feature_extractor(num_mel_bins: int, device: str):
    waveforms = _ragged()
    ours = whisper_log_mel([w.to(device) for w in waveforms], num_mel_bins=num_mel_bins, chunk_seconds=30)
    assert ours.shape == (len(waveforms), num_mel_bins, 3000)
    assert ours.dtype == torch.float32
    assert ours.device.type == device
    expected = torch.stack([_expected(w, num_mel_bins, 30) for w in waveforms[:-1]])
    assert (ours[:-1].cpu() - expected).abs().max() <= 1e-4
    assert torch.equal(ours[-1].cpu(), torch.full((num_mel_bins, 3000), -1.5))


def test_ragged_float64_samples_are_taken():
    sound = [_voice(5000), _voice(700, seed=1)]
    expected = whisper_log_mel(sound, num_mel_bins=80, chunk_seconds=1)
    ours = whisper_log_mel([w.double() for w in sound], num_mel_bins=80, chunk_seconds=1)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        ([], "there are no waveforms"),
        ([torch.zeros(5), torch.zeros(2, 5)], r"samples \[n\], got torch.float32 \[2, 5\] for waveform 1"),
        ([torch.zeros(5, dtype=torch.int16)], "got torch.int16"),
        (torch.zeros(()), r"floating-point samples \[..., n\], got torch.float32 \[\]"),
    ],
    ids=["none", "stereo", "integers", "scalar"],
)
def test_other_waveforms_are_refused(waveforms: list[torch.Tensor] | torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        whisper_log_mel(waveforms, num_mel_bins=80, chunk_seconds=1)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_mel_bins must be at least 1, got 0"):
        whisper_log_mel(torch.zeros(5), num_mel_bins=0, chunk_seconds=1)
    with pytest.raises(ValueError, match="chunk_seconds must be at least 1, got 0"):
        whisper_log_mel(torch.zeros(5), num_mel_bins=80, chunk_seconds=0)


@pytest.mark.gpu
def test_waveforms_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="the waveforms must lie on one device, got cpu, cuda:0"):
        whisper_log_mel([torch.zeros(5), torch.zeros(5, device="cuda")], num_mel_bins=80, chunk_seconds=1)


def test_integer_samples_are_refused():
    with pytest.raises(ValueError, match="floating-point samples"):
        whisper_log_mel(torch.zeros(100, dtype=torch.int16), num_mel_bins=80, chunk_seconds=1)
