"""AffectGPT's fusion against its formulae, and its towers against transformers' own calls."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from omnigrpo.model.affect_config import AffectGPTConfig, HubertConfig, tiny_affect
from omnigrpo.model.affect_fusion import AffectFusion
from omnigrpo.model.affect_towers import SAMPLE_RATE_HZ, ClipTower, HubertTower, audio_windows
from omnigrpo.model.lora import LoRAConfig, add_lora
from omnigrpo.model.qwen2 import Qwen2Decoder

TINY = tiny_affect()


@pytest.fixture
def fusion() -> AffectFusion:
    torch.manual_seed(0)
    return AffectFusion(TINY).double()


def test_pooling_and_fusion_are_the_formulae(fusion: AffectFusion) -> None:
    frames = torch.randn(3, 8, TINY.vision.projection_width, dtype=torch.float64)
    windows = torch.randn(3, 4, TINY.audio.width, dtype=torch.float64)
    rows = fusion(frames, windows)
    weights = {name: p.detach() for name, p in fusion.named_parameters()}

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for clip in range(3):
        video = sum(linear("video_attention_mlp", frame) * frame for frame in frames[clip])
        audio = sum(linear("audio_attention_mlp", window) * window for window in windows[clip])
        torch.testing.assert_close(rows.video_BD[clip], linear("affectgpt_proj", video))
        torch.testing.assert_close(rows.audio_BD[clip], linear("audio_llama_proj", audio))
        seen = linear("multi_video_embs", frames[clip].mean(0))
        heard = linear("multi_audio_embs", windows[clip].mean(0))
        first, second = linear("fc_att", linear("attention_mlp", torch.cat([seen, heard])))
        torch.testing.assert_close(
            rows.multi_BD[clip], linear("multi_llama_proj", first * seen + second * heard)
        )


def test_the_released_models_adapters_have_their_size() -> None:
    """Rank 16 on all seven projections of Qwen2.5-7B: the 40.4 M that its training log prints."""
    with torch.device("meta"):
        decoder = Qwen2Decoder(AffectGPTConfig().decoder)
        add_lora(decoder, LoRAConfig())
    assert sum(p.numel() for p in decoder.parameters() if p.requires_grad) == 40_370_176


def test_clip_equals_transformers() -> None:
    torch.manual_seed(0)
    tower = ClipTower(TINY.vision).eval()
    clip = CLIPModel(
        CLIPConfig(
            vision_config=tower.model.config.to_dict(),
            text_config={},
            projection_dim=TINY.vision.projection_width,
        )
    ).eval()
    clip.vision_model.load_state_dict(tower.model.vision_model.state_dict())
    clip.visual_projection.load_state_dict(tower.model.visual_projection.state_dict())
    pixels = torch.randn(5, 3, 96, 96)
    with torch.no_grad():
        features = clip.get_image_features(pixel_values=pixels)
        expected = getattr(features, "pooler_output", features)
        torch.testing.assert_close(tower(pixels), expected, rtol=1e-5, atol=1e-5)


def test_hubert_is_the_mean_of_its_last_layers_over_time() -> None:
    torch.manual_seed(0)
    config = HubertConfig(
        width=32, num_layers=5, num_heads=4, ffn_width=64, conv_width=16, num_windows=2, num_averaged_layers=4
    )
    tower = HubertTower(config).eval()
    waves = torch.randn(2, SAMPLE_RATE_HZ // 2)
    with torch.no_grad():
        states = tower.model(waves, output_hidden_states=True).hidden_states
        assert len(states) == 6
        expected = (states[2] + states[3] + states[4] + states[5]).mean(1) / 4
        torch.testing.assert_close(tower(waves), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.0, 20.0])
def test_windows_cover_the_sound(seconds: float) -> None:
    config = HubertConfig()
    waveform = torch.arange(round(seconds * SAMPLE_RATE_HZ), dtype=torch.float32) + 1
    windows = audio_windows(waveform, config)
    assert windows.shape == (8, 2 * SAMPLE_RATE_HZ)
    assert windows[0, 0] == 1
    if seconds >= 2:
        assert windows[-1, -1] == len(waveform)
        steps = windows[:, 0].diff()
        assert steps.max() - steps.min() <= 1
    else:
        assert (windows == windows[0]).all()
        assert windows[0, len(waveform) :].abs().sum() == 0
