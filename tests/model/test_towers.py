"""The towers against transformers' own forward passes: with gradients the same layers, without them the fused ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel, WhisperConfig, WhisperForAudioClassification

from omnigrpo.model.audio_tower import AudioTower
from omnigrpo.model.config import AudioConfig, HumanOmniConfig, VisionConfig
from omnigrpo.model.vision_tower import VisionTower


def _transformers_siglip(tower: VisionTower) -> SiglipVisionModel:
    """transformers' own model with the tower's weights."""
    config = tower.config
    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=config.width,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
        )
    ).eval()
    theirs.load_state_dict(tower.vision_tower.vision_model.state_dict())
    return theirs


def _transformers_whisper(tower: AudioTower) -> WhisperForAudioClassification:
    """transformers' own model with the tower's weights."""
    config = tower.config
    theirs = WhisperForAudioClassification(
        WhisperConfig(
            d_model=config.width,
            encoder_layers=config.num_layers,
            encoder_attention_heads=config.num_heads,
            encoder_ffn_dim=config.ffn_width,
            num_mel_bins=config.num_mel_bins,
            max_source_positions=config.num_positions,
            classifier_proj_size=config.classifier_width,
            num_labels=2,  # pyright: ignore[reportCallIssue]
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=8,
        )
    ).eval()
    theirs.load_state_dict(tower.audio_tower.state_dict())
    return theirs


def _pooled(positions_BPD: Tensor, config: AudioConfig) -> Tensor:
    pool = config.pool
    rows = [positions_BPD[:, i * pool : (i + 1) * pool].mean(1) for i in range(config.num_tokens)]
    return torch.stack(rows, 1)


def _stir(module: nn.Module) -> None:
    """Move biases and norms off their neutral values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "fused"])
@pytest.mark.parametrize("select_layer", [-1, -2, -3, 1])
def test_vision_tower_is_the_selected_hidden_state(
    small_config: HumanOmniConfig, select_layer: int, gradients: bool
) -> None:
    config = replace(small_config.vision, select_layer=select_layer)
    torch.manual_seed(0)
    tower = VisionTower(config)
    _stir(tower)
    pixels = torch.randn(3, 3, config.image_size, config.image_size)
    hidden_states = _transformers_siglip(tower)(pixel_values=pixels, output_hidden_states=True).hidden_states
    with torch.set_grad_enabled(gradients):
        patches = tower(pixels)
    assert patches.shape == (3, config.grid**2, config.width)
    assert patches.requires_grad == gradients
    torch.testing.assert_close(patches, hidden_states[select_layer], rtol=0, atol=5e-6)


def test_vision_tower_never_reads_what_lies_above_the_selected_layer(small_config: HumanOmniConfig) -> None:
    tower = VisionTower(small_config.vision)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        before = tower(pixels)
    siglip = tower.vision_tower.vision_model
    with torch.no_grad():
        for module in (siglip.encoder.layers[-1], siglip.post_layernorm, siglip.head):
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
        assert torch.equal(tower(pixels), before)
    torch.testing.assert_close(tower(pixels), before)


def test_real_vision_tower_runs_eleven_of_twelve_layers() -> None:
    assert VisionConfig().num_computed_layers == 11


@pytest.mark.parametrize("gradients", [True, False], ids=["plain", "fused"])
@pytest.mark.parametrize("pool", [1, 3])
def test_audio_tower_is_the_pooled_last_hidden_state(
    small_config: HumanOmniConfig, pool: int, gradients: bool
) -> None:
    config: AudioConfig = replace(small_config.audio, pool=pool)
    torch.manual_seed(0)
    tower = AudioTower(config).eval()
    _stir(tower)
    mel = torch.randn(2, config.num_mel_bins, config.num_mel_frames)
    positions = _transformers_whisper(tower).encoder(mel).last_hidden_state
    with torch.set_grad_enabled(gradients):
        rows = tower(mel)
    assert rows.requires_grad == gradients
    torch.testing.assert_close(rows, _pooled(positions, config), rtol=0, atol=5e-6)


@torch.no_grad()
def test_fused_layers_equal_transformers_at_the_real_widths() -> None:
    torch.manual_seed(0)
    vision = VisionTower(VisionConfig(num_layers=3)).eval()
    audio = AudioTower(AudioConfig(num_layers=1, chunk_seconds=4)).eval()
    pixels, mel = torch.randn(2, 3, 224, 224), torch.randn(1, 128, 400)
    hidden = _transformers_siglip(vision)(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(vision(pixels), hidden, rtol=0, atol=1e-5)
    positions = _transformers_whisper(audio).encoder(mel).last_hidden_state
    torch.testing.assert_close(audio(mel), _pooled(positions, audio.config), rtol=0, atol=1e-5)


@torch.no_grad()
def test_fused_layers_in_bfloat16_err_no_more_than_twice_what_transformers_err() -> None:
    torch.manual_seed(0)
    vision = VisionTower(VisionConfig(num_layers=5)).bfloat16()
    audio = AudioTower(AudioConfig(num_layers=3, chunk_seconds=2)).bfloat16()
    pixels, mel = torch.randn(1, 3, 224, 224).bfloat16(), torch.randn(1, 128, 200).bfloat16()
    siglip, whisper = _transformers_siglip(vision), _transformers_whisper(audio).encoder

    def siglip_features(dtype: torch.dtype) -> Tensor:
        nn.Module.to(siglip, dtype)
        return siglip(pixel_values=pixels.to(dtype), output_hidden_states=True).hidden_states[-2]

    def whisper_features(dtype: torch.dtype) -> Tensor:
        nn.Module.to(whisper, dtype)
        return _pooled(whisper(mel.to(dtype)).last_hidden_state, audio.config)

    for ours, theirs in ((vision(pixels), siglip_features), (audio(mel), whisper_features)):
        exact = theirs(torch.float64)
        error = (ours.double() - exact).square().mean()
        assert error.sqrt() <= 2 * (theirs(torch.bfloat16).double() - exact).square().mean().sqrt()


@torch.no_grad()
def test_audio_tower_clamps_float16_as_transformers_does(small_config: HumanOmniConfig) -> None:
    torch.manual_seed(0)
    tower = AudioTower(small_config.audio).eval()
    for layer in tower.audio_tower.encoder.layers:
        layer.get_parameter("fc2.bias")[3] = 65504
    tower.half()
    mel = torch.randn(1, 20, 100).half()
    rows = tower(mel)
    positions = _transformers_whisper(tower).half().encoder(mel).last_hidden_state
    assert rows.isfinite().all()
    torch.testing.assert_close(rows.float(), _pooled(positions, tower.config).float(), rtol=0, atol=1e-2)


@pytest.mark.parametrize("tower_type", ["vision", "audio"])
def test_towers_train_after_a_fused_pass_and_fuse_what_they_learnt(
    small_config: HumanOmniConfig, tower_type: str
) -> None:
    torch.manual_seed(0)
    vision = tower_type == "vision"
    tower = VisionTower(small_config.vision) if vision else AudioTower(small_config.audio)
    inputs = torch.randn(2, 3, 32, 32) if vision else torch.randn(2, 20, 100)
    parameters = {n: p for n, p in tower.named_parameters() if "encoder.layers.0" in n or "conv1" in n}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(2):
        with torch.no_grad():
            fused = tower(inputs)
        plain = tower(inputs)
        torch.testing.assert_close(fused, plain, rtol=0, atol=5e-6)
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        optimizer.zero_grad()
        plain.square().mean().backward()
        optimizer.step()
        assert all(not torch.equal(before[name], parameter) for name, parameter in parameters.items())


def test_audio_tower_refuses_an_unpadded_spectrogram(small_config: HumanOmniConfig) -> None:
    with pytest.raises(ValueError, match="length 100"):
        AudioTower(small_config.audio)(torch.randn(1, 20, 99))


def test_towers_cast_their_input_to_the_weights(small_config: HumanOmniConfig) -> None:
    vision = VisionTower(small_config.vision).bfloat16()
    audio = AudioTower(small_config.audio).bfloat16()
    assert vision(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
    assert audio(torch.randn(1, 20, 100)).dtype == torch.bfloat16
