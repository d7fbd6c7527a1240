"""The visual projector against a plain transcription of its definition, in float64."""

import pytest
import torch
from tests.model.projector_transcription import mlp_with_gelu, projected
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


def test_projector_equals_its_transcription(projector: AllInOneSmall, features: Tensor) -> None:
    weights = {name: tensor.detach() for name, tensor in projector.state_dict().items()}
    gates = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]], dtype=torch.float64)
    rows = projector(features, gates)
    assert rows.shape == (2, FRAMES * (GRID // 2) ** 2, WIDTH)
    for clip, gate, actual in zip(features, gates, rows, strict=True):
        torch.testing.assert_close(actual, projected(clip, gate, weights), rtol=0, atol=1e-10)


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
    torch.testing.assert_close(mlp(x), mlp_with_gelu(x, weights, "p"), rtol=0, atol=1e-12)
