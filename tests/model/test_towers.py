"""The towers against transformers' own forward passes."""

from dataclasses import replace

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel, WhisperConfig, WhisperForAudioClassification

from omnigrpo.model.audio_tower import AudioTower
from omnigrpo.model.config import AudioConfig, HumanOmniConfig, VisionConfig
from omnigrpo.model.vision_tower import VisionTower


@pytest.mark.parametrize("select_layer", [-1, -2, -3, 1])
def test_vision_tower_is_the_selected_hidden_state(small_config: HumanOmniConfig, select_layer: int) -> None:
    config = replace(small_config.vision, select_layer=select_layer)
    torch.manual_seed(0)
    tower = VisionTower(config)
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
    pixels = torch.randn(3, 3, config.image_size, config.image_size)
    hidden_states = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states
    patches = tower(pixels)
    assert patches.shape == (3, config.grid**2, config.width)
    torch.testing.assert_close(patches, hidden_states[select_layer], rtol=0, atol=1e-6)


def test_vision_tower_never_reads_what_lies_above_the_selected_layer(small_config: HumanOmniConfig) -> None:
    tower = VisionTower(small_config.vision)
    pixels = torch.randn(1, 3, 32, 32)
    before = tower(pixels)
    siglip = tower.vision_tower.vision_model
    with torch.no_grad():
        for module in (siglip.encoder.layers[-1], siglip.post_layernorm, siglip.head):
            for parameter in module.parameters():
                parameter.fill_(torch.nan)
    assert torch.equal(tower(pixels), before)


def test_real_vision_tower_runs_eleven_of_twelve_layers() -> None:
    assert VisionConfig().num_computed_layers == 11


@pytest.mark.parametrize("pool", [1, 3])
def test_audio_tower_is_the_pooled_last_hidden_state(small_config: HumanOmniConfig, pool: int) -> None:
    config: AudioConfig = replace(small_config.audio, pool=pool)
    torch.manual_seed(0)
    tower = AudioTower(config).eval()
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
    mel = torch.randn(2, config.num_mel_bins, config.num_mel_frames)
    positions = theirs.encoder(mel).last_hidden_state
    expected = torch.stack(
        [positions[:, i * pool : (i + 1) * pool].mean(1) for i in range(config.num_tokens)], 1
    )
    torch.testing.assert_close(tower(mel), expected, rtol=0, atol=1e-6)


def test_audio_tower_refuses_an_unpadded_spectrogram(small_config: HumanOmniConfig) -> None:
    with pytest.raises(ValueError, match="length 100"):
        AudioTower(small_config.audio)(torch.randn(1, 20, 99))


def test_towers_cast_their_input_to_the_weights(small_config: HumanOmniConfig) -> None:
    vision = VisionTower(small_config.vision).bfloat16()
    audio = AudioTower(small_config.audio).bfloat16()
    assert vision(torch.randn(1, 3, 32, 32)).dtype == torch.bfloat16
    assert audio(torch.randn(1, 20, 100)).dtype == torch.bfloat16
