"""The visual projector against a plain transcription of its definition, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from omnigrpo.model.config import HumanOmniConfig, VisionConfig
from omnigrpo.model.projectors import AllInOneSmall, mlp_2x_gelu

WIDTH = 32
FRAMES, GRID = 3, 4


@pytest.fixture
def projector(small_config: HumanOmniConfig) -> AllInOneSmall:
    torch.manual_seed(0)
    projector = AllInOneSmall(small_config.vision, WIDTH).double()
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return projector


@pytest.fixture
def features() -> Tensor:
    return torch.randn(
        2, FRAMES, GRID * GRID, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def _norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    """Over the channels, which come first: [C, Y, X]."""
    centred = x - x.mean(0)
    scaled = centred / (centred.square().mean(0) + 1e-5).sqrt()
    return scaled * weights[f"{name}.bn.weight"][:, None, None] + weights[f"{name}.bn.bias"][:, None, None]


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("oi,iyx->oyx", weight[:, :, 0, 0], x)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    padded = functional.pad(x, (1, 1, 1, 1))
    height, width = x.shape[1:]
    out = torch.zeros_like(x)
    for dy in range(3):
        for dx in range(3):
            out += weight[:, 0, dy, dx][:, None, None] * padded[:, dy : dy + height, dx : dx + width]
    return out


def _block(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    shortcut = x
    if f"{name}.downsample.conv.weight" in w:
        shortcut = _norm(_pointwise(x, w[f"{name}.downsample.conv.weight"]), w, f"{name}.downsample")
    y = _silu(_norm(_pointwise(x, w[f"{name}.conv1.conv.weight"]), w, f"{name}.conv1"))
    y = _silu(_norm(_depthwise(y, w[f"{name}.conv2.conv.weight"]), w, f"{name}.conv2"))
    mean = y.mean((1, 2))
    hidden = _silu(w[f"{name}.se.fc1.weight"][:, :, 0, 0] @ mean + w[f"{name}.se.fc1.bias"])
    gate = 1 / (1 + torch.exp(-(w[f"{name}.se.fc2.weight"][:, :, 0, 0] @ hidden + w[f"{name}.se.fc2.bias"])))
    y = _norm(_pointwise(y * gate[:, None, None], w[f"{name}.conv3.conv.weight"]), w, f"{name}.conv3")
    return _silu(y + shortcut)


def _mlp(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    hidden = x @ w[f"{name}.0.weight"].T + w[f"{name}.0.bias"]
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ w[f"{name}.2.weight"].T + w[f"{name}.2.bias"]


def _conv_branch(clip: Tensor, w: dict[str, Tensor], branch: str) -> Tensor:
    """As the reference writes it: time padded on both sides, the ninth of eight steps dropped."""
    frames = []
    for frame in clip:
        x = frame.T.reshape(-1, GRID, GRID)
        for block in ("b1", "b2"):
            x = _block(x, w, f"s1_{branch}.{block}")
        frames.append(x)
    volume = torch.stack(frames, 1)[None]
    weight, bias = w[f"sampler_{branch}.0.weight"], w[f"sampler_{branch}.0.bias"]
    sampled = _silu(functional.conv3d(volume, weight, bias, stride=(1, 2, 2), padding=(1, 0, 0)))[0, :, :-1]
    rows = []
    for t in range(len(clip)):
        x = sampled[:, t]
        for block in ("b1", "b2"):
            x = _block(x, w, f"s2_{branch}.{block}")
        rows += [x[:, y, z] for y in range(GRID // 2) for z in range(GRID // 2)]
    return _mlp(torch.stack(rows), w, f"readout_{branch}")


def _face_branch(clip: Tensor, w: dict[str, Tensor]) -> Tensor:
    images = _mlp(clip, w, "mlp_2xgelu_face").reshape(len(clip), GRID, GRID, WIDTH).permute(0, 3, 1, 2)
    halved = functional.interpolate(images, size=(GRID // 2, GRID // 2), mode="bilinear")
    return halved.permute(0, 2, 3, 1).reshape(-1, WIDTH)


def test_projector_equals_its_transcription(projector: AllInOneSmall, features: Tensor) -> None:
    weights = {name: tensor.detach() for name, tensor in projector.state_dict().items()}
    gates = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], dtype=torch.float64)
    rows = projector(features, gates)
    assert rows.shape == (2, FRAMES * (GRID // 2) ** 2, WIDTH)
    for clip, gate, actual in zip(features, gates, rows, strict=True):
        branches = [
            _conv_branch(clip, weights, "video"),
            _conv_branch(clip, weights, "body"),
            _face_branch(clip, weights),
        ]
        expected = sum(p * branch for p, branch in zip(gate, branches, strict=True))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_bilinear_halving_is_the_mean_of_two_by_two() -> None:
    image = torch.randn(2, 5, 14, 14, dtype=torch.float64)
    halved = functional.interpolate(image, size=(7, 7), mode="bilinear")
    torch.testing.assert_close(halved, functional.avg_pool2d(image, 2), rtol=0, atol=1e-12)


def test_a_frame_changes_its_own_rows_and_the_next_frames_only(
    projector: AllInOneSmall, features: Tensor
) -> None:
    gates = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    changed = features.clone()
    changed[:, 1] += 1
    per_frame = (GRID // 2) ** 2
    moved = (projector(changed, gates) - projector(features, gates)).abs().amax((0, 2))
    assert moved[:per_frame].max() == 0
    assert moved[per_frame:].min() > 0


def test_clips_do_not_mix(projector: AllInOneSmall, features: Tensor) -> None:
    gates = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], dtype=torch.float64)
    together = projector(features, gates)
    for i in range(2):
        torch.testing.assert_close(
            together[i : i + 1], projector(features[i : i + 1], gates[i : i + 1]), rtol=0, atol=1e-12
        )


def test_an_odd_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="15 patches a side"):
        AllInOneSmall(VisionConfig(image_size=240), WIDTH)


def test_audio_projector_is_two_linears_around_an_exact_gelu() -> None:
    mlp = mlp_2x_gelu(5, 7).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    weights = {f"p.{name}": tensor for name, tensor in mlp.state_dict().items()}
    torch.testing.assert_close(mlp(x), _mlp(x, weights, "p"), rtol=0, atol=1e-12)
