"""DALI's log-mel features against transformers' WhisperFeatureExtractor."""

import math
import subprocess
import sys

import pytest
import torch
import transformers
from dali_at_hand import require_dali

from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.log_mel_dali import dali_log_mel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _voice(num_samples: int, seed: int = 0) -> torch.Tensor:
    """A gliding tone with noise."""
    time = torch.arange(num_samples) / 16_000
    tone = 0.5 * torch.sin(2 * math.pi * (200 + 300 * time) * time)
    noise = torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))
    return tone * (0.5 + 0.5 * torch.sin(7 * time)) + 0.01 * noise


def _noise(num_samples: int, loudness: float) -> torch.Tensor:
    return loudness * torch.randn(num_samples, generator=torch.Generator().manual_seed(num_samples))


def _expected(waveforms: list[torch.Tensor], num_mel_bins: int, chunk_seconds: int) -> torch.Tensor:
    extractor = transformers.WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=chunk_seconds)
    numpy = [waveform.numpy() for waveform in waveforms]
    return extractor(numpy, sampling_rate=16_000, return_tensors="pt")["input_features"]


WAVEFORMS = {
    "10 s": _voice(160_000),
    "0.5 s": _voice(8_000, seed=1),
    "35 s": _voice(560_000, seed=2),
    "30 s": _voice(480_000, seed=3),
    "just short of 30 s": _voice(479_700, seed=4),
    "whisper": 1e-3 * _voice(48_000, seed=5),
    "noise": _noise(100_000, 0.3),
    "faint noise": _noise(30_001, 1e-4),
    "silence": torch.zeros(32_000),
    "half silence": torch.cat([torch.zeros(16_000), _noise(16_000, 0.1)]),
    "click": torch.zeros(20_000).index_fill(0, torch.tensor([9_000]), 1.0),
    "one sample": torch.tensor([0.5]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("name", WAVEFORMS)
def test_equals_the_whisper_feature_extractor(name: str, num_mel_bins: int, device: str):
    require_dali()
    waveform = WAVEFORMS[name]
    ours = dali_log_mel([waveform.to(device)], num_mel_bins=num_mel_bins, chunk_seconds=30)
    assert ours.shape == (1, num_mel_bins, 3000)
    assert ours.dtype == torch.float32
    assert ours.device.type == device
    assert (ours.cpu() - _expected([waveform], num_mel_bins, 30)).abs().max() <= 1e-4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_seconds", [1, 3, 30])
@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_a_ragged_batch_equals_the_whisper_feature_extractor(
    num_mel_bins: int, chunk_seconds: int, device: str
):
    require_dali()
    waveforms = list(WAVEFORMS.values())
    ours = dali_log_mel(
        [w.to(device) for w in waveforms], num_mel_bins=num_mel_bins, chunk_seconds=chunk_seconds
    )
    expected = _expected(waveforms, num_mel_bins, chunk_seconds)
    assert ours.shape == expected.shape
    assert (ours.cpu() - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_silence_and_no_samples_are_exact(device: str):
    require_dali()
    waveforms = [torch.zeros(0, device=device), torch.zeros(16_000, device=device)]
    ours = dali_log_mel(waveforms, num_mel_bins=80, chunk_seconds=3)
    assert torch.equal(ours.cpu(), torch.full((2, 80, 300), -1.5))
    ours = dali_log_mel([torch.zeros(0, device=device)], num_mel_bins=80, chunk_seconds=3)
    assert torch.equal(ours.cpu(), torch.full((1, 80, 300), -1.5))


@pytest.mark.parametrize("num_mel_bins", [80, 128])
@pytest.mark.parametrize("hertz", [50, 1000, 7900])
def test_a_pure_tone_is_no_further_off_than_float32_transforms_are(hertz: int, num_mel_bins: int):
    """A tone leaves most bins to rounding: the extractor's own two variants are up to 5e-4 apart there."""
    require_dali()
    tone = torch.sin(2 * math.pi * hertz * torch.arange(48_000) / 16_000)
    ours = dali_log_mel([tone], num_mel_bins=num_mel_bins, chunk_seconds=3)
    assert (ours - _expected([tone], num_mel_bins, 3)).abs().max() <= 5e-4


@pytest.mark.parametrize("device", DEVICES)
def test_results_outlive_later_calls_and_the_input_is_left_alone(device: str):
    require_dali()
    waveforms = [_voice(40_000).to(device), _voice(9_000, seed=1).to(device)]
    copies = [waveform.clone() for waveform in waveforms]
    first = dali_log_mel(waveforms, num_mel_bins=80, chunk_seconds=3)
    kept = first.clone()
    for seed in range(5):
        dali_log_mel([_noise(48_000 + seed, 1.0).to(device)] * 2, num_mel_bins=80, chunk_seconds=3)
    assert torch.equal(first, kept)
    assert all(torch.equal(w, copy) for w, copy in zip(waveforms, copies, strict=True))


def test_other_floats_and_views_are_taken():
    require_dali()
    sound = _voice(20_000)
    expected = dali_log_mel([sound, sound[::2].clone()], num_mel_bins=80, chunk_seconds=2)
    trained = sound.double().requires_grad_()
    assert torch.equal(dali_log_mel([trained, sound[::2]], num_mel_bins=80, chunk_seconds=2), expected)


def test_threads_of_a_pool_each_use_dali():
    """The context of operators is a thread's own."""
    require_dali()
    from concurrent.futures import ThreadPoolExecutor

    sounds = [_voice(16_000 + 97 * seed, seed=seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(lambda w: dali_log_mel([w], num_mel_bins=80, chunk_seconds=2), sounds))
    expected = whisper_log_mel(sounds, num_mel_bins=80, chunk_seconds=2)
    assert (torch.cat(ours) - expected).abs().max() <= 1e-4


@pytest.mark.gpu
def test_it_works_on_torchs_current_stream():
    """Samples written on a side stream are read there, and what follows on it sees the result."""
    require_dali()
    expected = dali_log_mel([_voice(480_000)], num_mel_bins=128, chunk_seconds=30)
    stream = torch.cuda.Stream()
    host = _voice(480_000).pin_memory()
    for _ in range(10):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            waveform = host.to("cuda", non_blocking=True)
            ours = dali_log_mel([waveform], num_mel_bins=128, chunk_seconds=30) + 0
            del waveform
        stream.synchronize()
        assert (ours.cpu() - expected).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        ([], "there are no waveforms"),
        ([torch.zeros(5), torch.zeros(2, 5)], r"samples \[n\], got torch.float32 \[2, 5\] for waveform 1"),
        ([torch.zeros(5, dtype=torch.int16)], "got torch.int16"),
    ],
    ids=["none", "stereo", "integers"],
)
def test_other_waveforms_are_refused(waveforms: list[torch.Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        dali_log_mel(waveforms, num_mel_bins=80, chunk_seconds=1)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_mel_bins must be at least 1, got 0"):
        dali_log_mel([torch.zeros(5)], num_mel_bins=0, chunk_seconds=1)
    with pytest.raises(ValueError, match="chunk_seconds must be at least 1, got -1"):
        dali_log_mel([torch.zeros(5)], num_mel_bins=80, chunk_seconds=-1)


HIDE_DALI = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import torch
from omnigrpo.media.log_mel_dali import dali_log_mel
assert not any(module.startswith("nvidia.dali") for module in sys.modules), "importing the recipe imports DALI"
try:
    dali_log_mel([torch.zeros(5)], num_mel_bins=80, chunk_seconds=1)
except ImportError as error:
    print(type(error).__name__, error)
"""


def _without(name: str) -> str:
    """What a process prints that cannot import one module."""
    script = HIDE_DALI.format(name=name)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["nvidia", "nvidia.dali"])
def test_a_machine_without_dali_is_told_what_to_install(name: str):
    said = _without(name)
    assert said.startswith("ImportError DALI is not installed; run pip install 'omnigrpo[gpu]'")
    assert "'omnigrpo[dali]'" in said


def test_a_damaged_dali_is_not_taken_for_a_missing_one():
    require_dali()
    assert _without("nvidia.dali.backend_impl").startswith(
        "ModuleNotFoundError No module named 'nvidia.dali."
    )
