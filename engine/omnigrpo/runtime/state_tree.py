"""A tree of tensors and numbers on disk: its tensors in safetensors, everything else in JSON, no pickle."""

import json
import random
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

StateValue: TypeAlias = Any
"""A tensor, int, float, str, bool or None, or a list, tuple or dict (string or int keys) of these."""
State: TypeAlias = dict[str, StateValue]
"""An optimizer's ``state_dict()`` is one."""

_JSON_NAME = "state.json"
_TENSORS_NAME = "state.safetensors"


def write_state(state: State, directory: Path) -> None:
    """Write ``state.json`` and ``state.safetensors``; a value of another type raises ``TypeError``."""
    tensors: dict[str, Tensor] = {}
    structure = _encode(state, "state", tensors)
    (directory / _JSON_NAME).write_text(json.dumps(structure), encoding="utf-8")
    save_file(tensors, directory / _TENSORS_NAME)


def read_state(directory: Path) -> State:
    """Read back what ``write_state`` wrote: same structure, types, dtypes and bits."""
    structure = json.loads((directory / _JSON_NAME).read_text(encoding="utf-8"))
    return _decode(structure, load_file(directory / _TENSORS_NAME))


def _encode(value: StateValue, name: str, tensors: dict[str, Tensor]) -> object:
    """A scalar as itself; anything else as ``{kind: content}``, so that tuples and int keys survive JSON."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        # A clone: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        return {
            "dict": [
                [_key(key, name), _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()
            ]
        }
    raise TypeError(
        f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, None, lists, "
        "tuples and dicts"
    )


def _key(key: object, name: str) -> object:
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise TypeError(f"a key of {name} is a {type(key).__name__}; only strings and integers can be keys")
    return key


def _decode(structure: object, tensors: dict[str, Tensor]) -> StateValue:
    if not isinstance(structure, dict):
        return structure
    [(kind, content)] = structure.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def capture_rng() -> State:
    """The state of torch's default generators (the CPU's and each CUDA device's) and of Python's ``random``.

    No other generator is captured: not NumPy's, and no ``torch.Generator`` of a component.
    """
    version, words, gauss = random.getstate()
    return {
        "torch_cpu": torch.get_rng_state(),
        "torch_cuda": list(torch.cuda.get_rng_state_all()),
        "python": torch.tensor(words),
        "python_version": version,
        "python_gauss": gauss,
    }


def restore_rng(state: State) -> None:
    """Put the generators of ``capture_rng`` back where it found them."""
    cuda_states = state["torch_cuda"]
    if len(cuda_states) != torch.cuda.device_count():
        raise ValueError(
            f"the generators of {len(cuda_states)} CUDA devices were saved, but this process sees "
            f"{torch.cuda.device_count()}; resume with as many devices"
        )
    torch.set_rng_state(state["torch_cpu"])
    torch.cuda.set_rng_state_all(cuda_states)
    random.setstate((state["python_version"], tuple(state["python"].tolist()), state["python_gauss"]))
