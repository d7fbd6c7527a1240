"""Trees of tensors and numbers, and generator states, to disk and back."""

import random
from pathlib import Path

import pytest
import torch
from torch import nn

from omnigrpo.runtime.state_tree import State, capture_rng, read_state, restore_rng, write_state


def round_trip(state: State, directory: Path) -> State:
    write_state(state, directory)
    return read_state(directory)


def test_structure_and_types_survive(tmp_path: Path):
    state = {
        "step": 7,
        "big": 2**80,
        "rate": 0.1 + 0.2,
        "infinite": float("inf"),
        "name": "ünïcode",
        "none": None,
        "flag": True,
        "nested": {0: [1, (2.5, "x")], 1: {}, "1": []},
        "tensor": {"kind": "a dict that looks like an encoded tensor"},
    }
    loaded = round_trip(state, tmp_path)
    assert loaded == state
    assert [type(key) for key in loaded["nested"]] == [int, int, str]
    assert isinstance(loaded["nested"][0][1], tuple)
    assert loaded["flag"] is True


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool],
)
def test_tensors_survive_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    base = torch.arange(12).reshape(3, 4).to(dtype)
    state = {"plain": base, "view": base.T, "scalar": base[1, 1], "empty": base[:0], "again": [base, base]}
    loaded = round_trip(state, tmp_path)
    for name in ("plain", "view", "scalar", "empty"):
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == state[name].shape
        assert torch.equal(loaded[name], state[name])
    assert torch.equal(loaded["again"][1], base)


def test_state_without_tensors_and_parameters_with_gradients(tmp_path: Path):
    assert round_trip({"step": 1}, tmp_path) == {"step": 1}
    loaded = round_trip({"w": nn.Parameter(torch.ones(2))}, tmp_path)
    assert torch.equal(loaded["w"], torch.ones(2))
    assert not loaded["w"].requires_grad


def test_optimizer_state_resumes_an_optimizer(tmp_path: Path):
    def make() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.named_parameters(), lr=0.1, fused=True)

    model, optimizer = make()
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(round_trip(optimizer.state_dict(), tmp_path))
    for trained, stepper in ((model, optimizer), (other, resumed)):
        stepper.zero_grad()
        trained(torch.ones(1, 3)).pow(2).sum().backward()
        stepper.step()
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize(("value", "name"), [({1, 2}, "state.a.0"), (b"x", "state.a.0")])
def test_other_types_are_refused_by_name(value: object, name: str, tmp_path: Path):
    with pytest.raises(TypeError, match=f"{name} is a {type(value).__name__}"):
        write_state({"a": [value]}, tmp_path)


def test_other_keys_are_refused(tmp_path: Path):
    with pytest.raises(TypeError, match=r"a key of state\.a is a float"):
        write_state({"a": {0.5: 1}}, tmp_path)


def test_generators_go_on_where_they_were_captured(tmp_path: Path):
    random.gauss(0, 1)  # leaves the second half of a pair in the generator
    state = round_trip(capture_rng(), tmp_path)
    expected = (torch.rand(5).tolist(), random.random(), random.gauss(0, 1))
    torch.rand(3)
    random.gauss(0, 1)
    restore_rng(state)
    assert (torch.rand(5).tolist(), random.random(), random.gauss(0, 1)) == expected


def test_generators_of_other_devices_are_refused():
    state = capture_rng() | {"torch_cuda": [torch.get_rng_state()] * 17}
    with pytest.raises(ValueError, match="17 CUDA devices"):
        restore_rng(state)
