"""Tensors in safetensors files, known by name and shape before any of them is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class CheckpointError(ValueError):
    """A checkpoint that does not fit; the message names the file, the part and the tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor in a file, not read yet."""

    path: Path
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of weights, by safetensors' names."""


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What one safetensors file holds, from its header alone.

    Raises:
        CheckpointError: no such file, or one that is damaged or shorter than its header says.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: check the path")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            shapes = {name: (tuple(piece.get_shape()), piece.get_dtype()) for name, piece in slices.items()}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    strange = next((name for name, (_, dtype) in shapes.items() if dtype not in _DTYPES), None)
    if strange is not None:
        raise CheckpointError(
            f"{path}: {strange} is of type {shapes[strange][1]}; weights must be {', '.join(_DTYPES)} (not quantised)"
        )
    return {
        name: StoredTensor(path=path, name=name, shape=shape, dtype=_DTYPES[dtype])
        for name, (shape, dtype) in shapes.items()
    }


def stored_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """What a directory holds: ``model.safetensors``, or the files of ``model.safetensors.index.json``.

    Raises:
        CheckpointError: as ``stored_tensors``, for neither of the two, and for an index that names a file or a tensor
            that is not there.
    """
    index = weights_path(directory)
    if index.name == WEIGHTS_FILE:
        return stored_tensors(index)
    places = _read_index(index)
    shards = {name: stored_tensors(directory / name) for name in sorted(set(places.values()))}
    missing = [name for name, shard in places.items() if name not in shards[shard]]
    if missing:
        raise CheckpointError(
            f"{index}: {missing[0]} should be in {places[missing[0]]}, but is not"
            + (f", nor are {len(missing) - 1} more where it says" if len(missing) > 1 else "")
        )
    return {name: shards[shard][name] for name, shard in places.items()}


def weights_path(directory: Path) -> Path:
    """The file that says what a directory holds: the index of shards where there is no ``model.safetensors``."""
    whole, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    return index if index.is_file() and not whole.is_file() else whole


def weight_files(directory: Path) -> list[Path]:
    """Every file that ``stored_checkpoint`` reads: one, or an index and its shards.

    Raises:
        CheckpointError: an index that is none.
    """
    index = weights_path(directory)
    if index.name == WEIGHTS_FILE:
        return [index]
    return [index, *(directory / name for name in sorted(set(_read_index(index).values())))]


def read_tensors(
    wanted: Mapping[str, StoredTensor], *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """Read tensors, file by file, into memory of their own."""
    tensors: dict[str, Tensor] = {}
    for path in sorted({stored.path for stored in wanted.values()}):
        with safe_open(path, framework="pt") as file:
            for name, stored in wanted.items():
                if stored.path == path:
                    # A copy: the mapped file may later be replaced, and its tensors need not be aligned.
                    tensors[name] = file.get_tensor(stored.name).to(device, dtype, copy=True)
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(text, str) for item in places.items() for text in item):
            raise TypeError("weight_map holds something else than names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files: {error}") from error
    return places
