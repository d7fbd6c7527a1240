"""Every part of HumanOmni-0.5B at its real widths and depths, random weights, float32, against other statements of it.

Whisper hears 4 s of sound instead of 30: its layers are what they are, on fewer positions.
"""

import torch
from tests.model.projector_transcription import projected
from torch import Tensor, nn
from transformers import SiglipVisionModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnigrpo.model.audio_tower import AudioTower
from omnigrpo.model.config import AudioConfig, GateConfig, VisionConfig
from omnigrpo.model.gate import build_gate
from omnigrpo.model.projectors import AllInOneSmall, mlp_2x_gelu
from omnigrpo.model.vision_tower import VisionTower

WIDTH = 896


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def test_siglip() -> None:
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig()).eval()
    siglip = tower.vision_tower.vision_model
    whole = SiglipVisionModel(siglip.config).eval()
    getattr(whole, "vision_model", whole).load_state_dict(siglip.state_dict())
    pixels = torch.randn(1, 3, 224, 224)
    expected = whole(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    patches = tower(pixels)
    assert patches.shape == (1, 196, 768)
    assert relative_error(patches, expected) < 1e-5


@torch.no_grad()
def test_whisper() -> None:
    torch.manual_seed(0)
    tower = AudioTower(AudioConfig(chunk_seconds=4)).eval()
    assert len(tower.audio_tower.encoder.layers) == 32
    mel = torch.randn(1, 128, 400)
    encoder: WhisperEncoder = tower.audio_tower.encoder
    positions = encoder(mel).last_hidden_state
    rows = tower(mel)
    assert rows.shape == (1, 66, 1280)
    expected = nn.functional.avg_pool1d(positions.transpose(1, 2), 3, 3).transpose(1, 2)
    assert relative_error(rows, expected) < 1e-5


@torch.no_grad()
def test_visual_projector() -> None:
    torch.manual_seed(0)
    projector = AllInOneSmall(VisionConfig(), WIDTH)
    for parameter in projector.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    weights = {name: tensor.detach() for name, tensor in projector.state_dict().items()}
    clip = torch.randn(8, 196, 768)
    gate = torch.tensor([0.2, 0.5, 0.3])
    rows = projector(clip[None], gate[None])[0]
    assert rows.shape == (392, WIDTH)
    assert relative_error(rows, projected(clip, gate, weights)) < 1e-5


@torch.no_grad()
def test_audio_projector() -> None:
    torch.manual_seed(0)
    projector = mlp_2x_gelu(1280, WIDTH)
    weights = {name: tensor.detach() for name, tensor in projector.state_dict().items()}
    rows = torch.randn(500, 1280)
    hidden = rows @ weights["0.weight"].T + weights["0.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    assert relative_error(projector(rows), hidden @ weights["2.weight"].T + weights["2.bias"]) < 1e-5


@torch.no_grad()
def test_gate() -> None:
    torch.manual_seed(0)
    gate = build_gate(GateConfig())
    weights = {name: tensor.detach() for name, tensor in gate.state_dict().items()}
    assert weights["0.weight"].shape == (3584, 768)
    assert weights["2.weight"].shape == (3, 3584)
    state = torch.randn(4, 768)
    hidden = state @ weights["0.weight"].T + weights["0.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    scores = hidden @ weights["2.weight"].T + weights["2.bias"]
    shares = scores.exp() / scores.exp().sum(1, keepdim=True)
    assert relative_error(gate(state).softmax(-1), shares) < 1e-5
