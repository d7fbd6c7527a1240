"""Reads and writes HumanOmni checkpoints in the reference's layout.

A directory holds ``model.safetensors`` (reference names; a tied head is not stored), ``config.json``, the
tokenizer's files, and the gate's tokenizer in ``gate_tokenizer/``.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.config_json import from_json, to_json
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.parts import PART_PREFIXES, TOWER_PARTS, part_of, unused_prefixes, used_tower_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
GATE_TOKENIZER_DIRECTORY = "gate_tokenizer"
_HEAD = "lm_head.weight"
_NAMES_SHOWN = 4


class CheckpointError(ValueError):
    """A checkpoint that does not fit; the message names the file, the part and the tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokenizers:
    """The decoder's tokenizer and the gate's."""

    text: "PreTrainedTokenizerFast"
    gate: "PreTrainedTokenizerFast"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """What a checkpoint directory holds."""

    model: HumanOmni
    tokenizer: "PreTrainedTokenizerFast"
    gate_tokenizer: "PreTrainedTokenizerFast"

    @property
    def tokenizers(self) -> Tokenizers:
        """Both tokenizers, as ``save_model`` takes them."""
        return Tokenizers(text=self.tokenizer, gate=self.gate_tokenizer)


def save_model(model: HumanOmni, tokenizers: Tokenizers, directory: Path) -> None:
    """Write the whole checkpoint into ``directory``, which may exist; not atomic."""
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(model.state_dict(), directory / WEIGHTS_FILE)
    document = to_json(model.config) | {"torch_dtype": str(model.head_weight_VD.dtype).removeprefix("torch.")}
    (directory / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    tokenizers.text.save_pretrained(directory)
    tokenizers.gate.save_pretrained(directory / GATE_TOKENIZER_DIRECTORY)


def save_weights(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors by name, on the CPU, in a deterministic order."""
    contiguous = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    save_file(contiguous, path, metadata={"format": "pt"})


def load_model(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    gate_tokenizer_directory: Path | None = None,
) -> LoadedModel:
    """Load a checkpoint; ``dtype`` None keeps the file's. BERT and the towers are frozen, as in a new model.

    ``gate_tokenizer_directory`` replaces ``gate_tokenizer/``, which the published checkpoint does not have.

    Raises:
        CheckpointError: an absent file, a tensor missing, unexpected or of another shape (reported by part).
    """
    config, weights_path = read_config(directory), directory / WEIGHTS_FILE
    _check_is_there(weights_path)
    with torch.device("meta"):
        model = HumanOmni(config)
    expected = model.state_dict()
    found = _read(weights_path)
    if _HEAD not in expected:
        found.pop(_HEAD, None)
    _check(expected, found, weights_path, may_lack=unused_prefixes(config.vision))
    dtype = dtype or found["model.embed_tokens.weight"].dtype
    # Copied out of the mapped file, which may later be replaced and whose tensors need not be aligned.
    weights = {
        name: torch.zeros(tensor.shape, dtype=dtype, device=device)
        if name not in found
        else found[name].to(device, dtype, copy=True)
        for name, tensor in expected.items()
    }
    model.load_state_dict(weights, assign=True)
    _restore_buffers(model, device)
    return LoadedModel(
        model=model,
        tokenizer=_load_tokenizer(directory),
        gate_tokenizer=_load_tokenizer(gate_tokenizer_directory or directory / GATE_TOKENIZER_DIRECTORY),
    )


def read_config(directory: Path) -> HumanOmniConfig:
    """Read a checkpoint's geometry; CheckpointError without a config.json, or for one of another architecture."""
    path = directory / CONFIG_FILE
    _check_is_there(path)
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def save_towers(model: HumanOmni, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the tower weights that a forward pass reads, under their names in the whole model."""
    state = model.state_dict()
    save_weights({name: state[name].to(dtype or state[name].dtype) for name in used_tower_names(model)}, path)


@torch.no_grad()
def load_towers(model: HumanOmni, path: Path) -> None:
    """Copy both towers' weights from a file into ``model``; weights that no pass reads may be absent.

    Raises:
        CheckpointError: as ``load_model``, or for a tensor of any other part.
    """
    if not path.is_file():
        raise CheckpointError(f"tower weights {path} do not exist: check the path")
    state = model.state_dict()
    expected = {name: tensor for name, tensor in state.items() if part_of(name) in TOWER_PARTS}
    found = _read(path)
    _check(expected, found, path, may_lack=unused_prefixes(model.config.vision))
    for name, tensor in found.items():
        state[name].copy_(tensor)


def towers_hash(model: HumanOmni) -> str:
    """Return a hex digest of every tower weight that a forward pass reads, dtype included."""
    digest = hashlib.sha256()
    state = model.state_dict()
    for name in sorted(used_tower_names(model)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_is_there(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: give a checkpoint directory with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _check(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, *, may_lack: tuple[str, ...]
) -> None:
    missing = [name for name in expected if name not in found and not name.startswith(may_lack)]
    unexpected = [name for name in found if name not in expected]
    problems = [*_by_part("missing", missing), *_by_part("unexpected", unexpected)]
    problems += [
        f"{part_of(name)}: {name} has shape {tuple(found[name].shape)}, the model needs {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit the model that its config describes:\n  " + "\n  ".join(problems)
        )


def _by_part(kind: str, names: list[str]) -> list[str]:
    lines = []
    for part in PART_PREFIXES:
        mine = [name for name in names if part_of(name) == part]
        if mine:
            more = f" and {len(mine) - _NAMES_SHOWN} more" if len(mine) > _NAMES_SHOWN else ""
            lines.append(f"{part}: {len(mine)} {kind} ({', '.join(mine[:_NAMES_SHOWN])}{more})")
    return lines


def _restore_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Fill the index buffers of transformers' modules, which no checkpoint stores."""
    for name, buffer in list(model.named_buffers()):
        owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        assert leaf in ("position_ids", "token_type_ids"), f"unknown buffer {name}"
        row = (
            torch.arange(buffer.shape[-1], device=device)
            if leaf == "position_ids"
            else torch.zeros(buffer.shape[-1], dtype=torch.int64, device=device)
        )
        owner.register_buffer(leaf, row.expand(buffer.shape), persistent=False)


def _load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    if not (directory / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{directory} holds no tokenizer.json; for the gate of the published checkpoint, give a "
            "directory with the bert-base-uncased tokenizer as the gate tokenizer directory"
        )
    return PreTrainedTokenizerFast.from_pretrained(directory)
