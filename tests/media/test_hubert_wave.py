"""HuBERT's input against transformers' Wav2Vec2FeatureExtractor."""

import numpy as np
import pytest
import torch
import transformers

from omnigrpo.media.hubert_wave import hubert_waves

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def _sound(num_samples: int, *, loudness: float = 0.1, offset: float = 0.0, seed: int = 0) -> torch.Tensor:
    noise = torch.randn(num_samples, generator=torch.Generator().manual_seed(seed))
    return loudness * noise + offset


def _expected(waveforms: list[torch.Tensor], num_samples: int | None = None, *, normalise: bool = True):
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True)
    features = extractor(
        [waveform.numpy() for waveform in waveforms],
        sampling_rate=16_000,
        padding="longest" if num_samples is None else "max_length",
        max_length=num_samples,
        truncation=num_samples is not None,
        return_tensors="pt",
    )
    return features["input_values"], features["attention_mask"]


RAGGED = [
    _sound(16_000),
    _sound(32_000, loudness=0.9, seed=1),
    _sound(401, loudness=1e-4, offset=0.05, seed=2),
    torch.zeros(20_000),
    torch.tensor([0.25]),
    torch.zeros(1),
    _sound(2, seed=3),
    1e-5 * torch.sin(torch.arange(30_000) / 7),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("num_samples", [None, 1, 20_000, 32_000, 50_000])
def test_ragged_waveforms_equal_the_feature_extractor(num_samples: int | None, normalise: bool, device: str):
    expected, mask = _expected(RAGGED, num_samples, normalise=normalise)
    ours = hubert_waves([w.to(device) for w in RAGGED], num_samples=num_samples, normalise=normalise)
    assert ours.waveforms_BN.device.type == device
    assert ours.waveforms_BN.dtype == torch.float32
    assert ours.waveforms_BN.shape == expected.shape
    assert (ours.waveforms_BN.cpu() - expected).abs().max() <= 1e-5
    assert ours.mask_BN.dtype == mask.dtype
    assert torch.equal(ours.mask_BN.cpu(), mask)


@pytest.mark.parametrize("waveform", RAGGED, ids=lambda waveform: f"{len(waveform)} samples")
def test_a_waveform_alone_equals_the_feature_extractor(waveform: torch.Tensor):
    expected, mask = _expected([waveform])
    ours = hubert_waves([waveform])
    assert (ours.waveforms_BN - expected).abs().max() <= 1e-5
    assert torch.equal(ours.mask_BN, mask)


@pytest.mark.parametrize("device", DEVICES)
def test_each_waveform_has_zero_mean_and_unit_variance_and_ends_in_zeros(device: str):
    loud, short = _sound(40_000, offset=0.7).to(device), _sound(500, loudness=3.0).to(device)
    ours = hubert_waves([loud, short]).waveforms_BN.cpu().double()
    for row, length in ((ours[0], 40_000), (ours[1], 500)):
        assert abs(row[:length].mean()) <= 1e-6
        assert abs(row[:length].var(correction=0) - 1) <= 1e-4
        assert not row[length:].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("level", [0.0, 0.3, -1.0])
def test_a_constant_is_silence(level: float, device: str):
    assert not hubert_waves([torch.full((30_001,), level, device=device)]).waveforms_BN.any()


def test_the_batch_does_not_matter_and_the_input_is_left_alone():
    copies = [waveform.clone() for waveform in RAGGED]
    together = hubert_waves(RAGGED)
    for row, (waveform, copy) in enumerate(zip(RAGGED, copies, strict=True)):
        alone = hubert_waves([waveform]).waveforms_BN[0]
        assert (together.waveforms_BN[row, : len(waveform)] - alone).abs().max() <= 1e-6
        assert torch.equal(waveform, copy)


def test_float64_and_float16_samples_are_taken():
    waveform = _sound(1000)
    assert torch.equal(hubert_waves([waveform.double()]).waveforms_BN, hubert_waves([waveform]).waveforms_BN)
    half = waveform.half()
    assert torch.equal(hubert_waves([half]).waveforms_BN, hubert_waves([half.float()]).waveforms_BN)


def test_a_hubert_model_takes_the_batch():
    """The mask is one that transformers' HuBERT reads: what it hears of a short waveform is not its padding."""
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        feat_extract_norm="layer", do_stable_layer_norm=True, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    model = transformers.HubertModel(config).eval()
    waves = hubert_waves([_sound(16_000), _sound(9_000, seed=1)])
    with torch.no_grad():
        together = model(waves.waveforms_BN, attention_mask=waves.mask_BN).last_hidden_state
        alone = model(waves.waveforms_BN[1:, :9_000]).last_hidden_state
    assert together.shape == (2, 49, 32)
    assert np.allclose(together[1, : alone.shape[1]], alone[0], atol=1e-4)


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        ([], "there are no waveforms"),
        ([torch.zeros(5), torch.zeros(0)], "waveform 1 has no samples"),
        ([torch.zeros(2, 5)], r"floating-point samples \[n\], got torch.float32 \[2, 5\] for waveform 0"),
        ([torch.zeros(5), torch.zeros(5, dtype=torch.int16)], "got torch.int16 .* for waveform 1"),
        ([torch.zeros(())], r"got torch.float32 \[\]"),
    ],
    ids=["none", "empty", "stereo", "integers", "scalar"],
)
def test_other_waveforms_are_refused(waveforms: list[torch.Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        hubert_waves(waveforms)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_a_length_below_one_sample_is_refused(num_samples: int):
    with pytest.raises(ValueError, match=f"num_samples must be at least 1, got {num_samples}"):
        hubert_waves([torch.zeros(5)], num_samples=num_samples)


@pytest.mark.gpu
def test_waveforms_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="the waveforms must lie on one device, got cpu, cuda:0"):
        hubert_waves([torch.zeros(5), torch.zeros(5, device="cuda")])
