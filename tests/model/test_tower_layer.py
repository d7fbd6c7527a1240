"""How the projections of a tower's layer come to share one matrix."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from omnigrpo.model.checkpoint_format import save_weights
from omnigrpo.model.tower_layer import join_rows


@pytest.fixture
def projections() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(4, rows) for rows in (3, 5, 2)])


def _weights(projections: nn.ModuleList) -> tuple[nn.Parameter, ...]:
    return tuple(linear.get_parameter("weight") for linear in projections)


def test_joined_rows_are_the_weights_and_share_their_memory(projections: nn.ModuleList) -> None:
    expected = torch.cat([weight.detach().clone() for weight in _weights(projections)])
    before = {name: tensor.clone() for name, tensor in projections.state_dict().items()}
    joined = join_rows(_weights(projections))
    assert torch.equal(joined, expected)
    after = projections.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        projections[1].get_parameter("weight").fill_(7)
    assert (joined[3:8] == 7).all()


def test_weights_are_moved_once(projections: nn.ModuleList) -> None:
    joined = join_rows(_weights(projections))
    again = join_rows(_weights(projections))
    assert again.data_ptr() == joined.data_ptr()
    assert torch.equal(again, joined)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_replaced_weight_is_found(projections: nn.ModuleList, index: int) -> None:
    join_rows(_weights(projections))
    projections[index].weight = nn.Parameter(torch.full_like(_weights(projections)[index], 2.0))
    assert torch.equal(join_rows(_weights(projections)), torch.cat(_weights(projections)))


@pytest.mark.parametrize("order", [(0, 2), (1, 0), (2, 1, 0)], ids=str)
def test_other_rows_of_the_same_storage_are_not_taken_for_neighbours(
    projections: nn.ModuleList, order: tuple[int, ...]
) -> None:
    join_rows(_weights(projections))
    chosen = tuple(_weights(projections)[index] for index in order)
    assert torch.equal(join_rows(chosen), torch.cat(chosen))


def test_a_change_of_dtype_and_a_copy_start_anew(projections: nn.ModuleList) -> None:
    joined = join_rows(_weights(projections))
    copied = copy.deepcopy(projections)
    with torch.no_grad():
        copied[0].get_parameter("weight").zero_()
    assert not (joined[:3] == 0).all()
    assert torch.equal(join_rows(_weights(copied)), torch.cat(_weights(copied)))
    projections.bfloat16()
    assert torch.equal(join_rows(_weights(projections)), joined.bfloat16())


def test_joined_weights_are_saved_one_by_one(projections: nn.ModuleList, tmp_path: Path) -> None:
    join_rows(_weights(projections))
    state = projections.state_dict()
    save_weights(state, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_weights_joined_in_inference_mode_still_train(projections: nn.ModuleList) -> None:
    with torch.inference_mode():
        join_rows(_weights(projections))
    projections[0](torch.ones(1, 4)).sum().backward()
    assert (projections[0].get_parameter("weight").grad == 1).all()
