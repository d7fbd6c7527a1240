"""Reads and writes HumanOmni checkpoints in the reference's layout.

A directory holds ``model.safetensors`` (reference names; a tied head is not stored) or its shards with an index,
``config.json``, the tokenizer's files, and the gate's tokenizer in ``gate_tokenizer/``. The published directories have
no ``gate_tokenizer/``: the tokenizer of bert-base-uncased must be given beside them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.config_json import from_json, to_json
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.model.parts import PART_PREFIXES, TOWER_PARTS, part_of, unused_prefixes, used_tower_names
from omnigrpo.model.tower_files import audio_tower_tensors, vision_tower_tensors
from omnigrpo.model.weight_files import (
    WEIGHTS_FILE,
    CheckpointError,
    StoredTensor,
    read_tensors,
    stored_checkpoint,
    stored_tensors,
    weights_path,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG_FILE = "config.json"
GATE_TOKENIZER_DIRECTORY = "gate_tokenizer"
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_NAMES_SHOWN = 4


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
    vision_tower_directory: Path | None = None,
    audio_tower_directory: Path | None = None,
) -> LoadedModel:
    """Load a checkpoint; ``dtype`` None keeps the file's. BERT and the towers are frozen, as in a new model.

    Names and shapes are checked before memory is spent on any weight. ``gate_tokenizer_directory`` replaces
    ``gate_tokenizer/``, which the published checkpoint does not have; a tower's directory, in transformers' layout,
    gives what the checkpoint lacks of that tower.

    Raises:
        CheckpointError: an absent file, a tensor missing, unexpected or of another shape (reported by part), or a
            tokenizer whose ids the embedding does not reach.
    """
    config = read_config(directory)
    found = stored_checkpoint(directory)
    towers = vision_tower_tensors(vision_tower_directory) if vision_tower_directory else {}
    towers |= audio_tower_tensors(audio_tower_directory) if audio_tower_directory else {}
    with torch.device("meta"):
        model = HumanOmni(config)
    expected = model.state_dict()
    if _HEAD not in expected:
        found.pop(_HEAD, None)
    found = {name: stored for name, stored in towers.items() if name in expected} | found
    _check(expected, found, weights_path(directory), may_lack=unused_prefixes(config.vision))
    tokenizer = _load_tokenizer(directory)
    _check_tokenizer(tokenizer, config, directory)
    gate_tokenizer = _load_tokenizer(gate_tokenizer_directory or directory / GATE_TOKENIZER_DIRECTORY)
    dtype = dtype or found[_EMBEDDING].dtype
    weights = read_tensors(found, dtype=dtype, device=device)
    for name, tensor in expected.items():
        if name not in weights:
            weights[name] = torch.zeros(tensor.shape, dtype=dtype, device=device)
    model.load_state_dict(weights, assign=True)
    _restore_buffers(model, device)
    return LoadedModel(model=model, tokenizer=tokenizer, gate_tokenizer=gate_tokenizer)


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
    state = model.state_dict()
    expected = {name: tensor for name, tensor in state.items() if part_of(name) in TOWER_PARTS}
    found = stored_tensors(path)
    _check(expected, found, path, may_lack=unused_prefixes(model.config.vision))
    for name, tensor in read_tensors(found, dtype=state[_EMBEDDING].dtype, device="cpu").items():
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


def _check(
    expected: Mapping[str, Tensor],
    found: Mapping[str, StoredTensor],
    path: Path,
    *,
    may_lack: tuple[str, ...],
) -> None:
    missing = [name for name in expected if name not in found and not name.startswith(may_lack)]
    unexpected = [name for name in found if name not in expected]
    problems = [*_by_part("missing", missing), *_by_part("unexpected", unexpected)]
    problems += [
        f"{part_of(name)}: {name} has shape {found[name].shape}, the model needs {tuple(tensor.shape)}"
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
    """From ``tokenizer.json``, else from the vocabulary files of Qwen2 or BERT."""
    from transformers import BertTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    readers: dict[str, type[PreTrainedTokenizerFast]] = {
        "tokenizer.json": PreTrainedTokenizerFast,
        "merges.txt": Qwen2Tokenizer,
        "vocab.txt": BertTokenizer,
    }
    for file, reader in readers.items():
        if (directory / file).is_file():
            try:
                return reader.from_pretrained(directory, local_files_only=True)
            # The tokenizers library raises bare exceptions for files it cannot parse.
            except Exception as error:
                raise CheckpointError(f"{directory / file} is no readable tokenizer: {error}") from error
    raise CheckpointError(
        f"{directory} holds no tokenizer.json; for the gate of the published checkpoint, give a "
        "directory with the bert-base-uncased tokenizer as the gate tokenizer directory (model.gate_tokenizer)"
    )


def _check_tokenizer(tokenizer: "PreTrainedTokenizerFast", config: HumanOmniConfig, directory: Path) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= config.decoder.vocab_size:
        raise CheckpointError(
            f"{directory}: the tokenizer gives {token!r} the id {largest}, but the embedding has "
            f"{config.decoder.vocab_size} rows: use the tokenizer that belongs to the checkpoint"
        )
