"""RunConfig: strict TOML and dotted overrides into typed, frozen dataclasses."""

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import TypeAdapter, ValidationError

from omnigrpo.algorithm.advantage import AdvantageConfig
from omnigrpo.algorithm.agreement import AgreementConfig
from omnigrpo.data.dataset import PromptStyle
from omnigrpo.evaluate.evaluator import EvaluationConfig
from omnigrpo.feature_source import MediaConfig
from omnigrpo.loop import LoopConfig
from omnigrpo.model.prompting import PromptTemplate
from omnigrpo.reward.composition import RewardConfig
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.runtime.optimizer import OptimizerConfig
from omnigrpo.trainer import TrainerConfig, check_off_policy
from omnigrpo_kernels.grpo_objective import ObjectiveConfig


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says what, what was given, and what would do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The checkpoint to start from."""

    path: Path
    """Directory in HumanOmni's layout: model.safetensors, config.json, tokenizer files."""
    gate_tokenizer: Path | None = None
    """Directory of the bert-base-uncased tokenizer, where the checkpoint has no gate_tokenizer/ of its own."""
    vision_tower: Path | None = None
    """Directory of the SigLIP tower in transformers' layout, for a checkpoint that lacks its weights."""
    audio_tower: Path | None = None
    """Directory of the Whisper encoder in transformers' layout, likewise."""
    reference: Path | None = None
    """Checkpoint of the KL's frozen reference; None takes the starting weights."""
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_activations: bool = False
    """Recompute each decoder layer in the backward pass: less memory, a third more work."""
    train_bert: bool = False
    """Train the gate's BERT too, as the reference implementation does."""
    bert_dropout: bool = False
    """Keep BERT's dropout of 0.1 live in training, as the reference does, also where BERT is frozen. Every pass of a
    prefix draws a mask of its own: one in the rollout, one in the update, which the samples of the group share (the
    reference draws one for each of its G copies). Never live in the KL's reference model or in an evaluation."""
    reset_gate: bool = False
    """Draw the gate's MLP anew where supervised training starts, as the reference does; not for GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Datasets in R1-Omni's JSON format."""

    train: Path
    evaluate: dict[str, Path] = field(default_factory=dict)
    """Evaluation splits by name."""
    media_root: Path | None = None
    """Clip paths are relative to this; None takes each JSON file's own directory."""
    style: PromptStyle = field(default_factory=PromptStyle)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run depends on."""

    model: ModelConfig
    data: DataConfig
    run: LoopConfig
    media: MediaConfig = field(default_factory=MediaConfig)
    prompt: PromptTemplate = field(default_factory=PromptTemplate)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    agreement: AgreementConfig = field(default_factory=AgreementConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Reject, before anything is loaded, what the parts would refuse of each other."""
        check_off_policy(self.rollout, self.objective)
        if self.rollout.overlap_update and self.rollout.engine == "native":
            raise ValueError(
                "rollout.overlap_update needs an engine with weights of its own, but rollout.engine is native: set it "
                "to sglang or servers"
            )


_REQUIRED = {
    "model": {"path": "--model DIRECTORY"},
    "data": {"train": "--data FILE"},
    "run": {"output": "--output DIRECTORY"},
}


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a TOML file and apply ``section.key=value`` overrides (values in TOML syntax, bare words are strings).

    Relative paths in the file are relative to the working directory.

    Raises:
        ConfigError: no such file, invalid TOML, an unknown key (the nearest one is named), a value of a wrong type,
            or one that its owner refuses.
    """
    tree: dict[str, object] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"config {path} does not exist: check the path") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"config {path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def parse_config(tree: Mapping[str, object]) -> RunConfig:
    """Build a RunConfig from nested mappings, strictly."""
    _check_keys(tree, RunConfig, "")
    _check_finite(tree, "")
    for section, keys in _REQUIRED.items():
        given = tree.get(section, {})
        for key, option in keys.items():
            if isinstance(given, dict) and key not in given:
                raise ConfigError(f"{section}.{key} is missing: give {option}, or set it in the config file")
    try:
        return TypeAdapter(RunConfig).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}, got {e['input']!r}"
            for e in error.errors()
        ]
        raise ConfigError("the configuration does not fit:\n  " + "\n  ".join(lines)) from error


def changed_settings(config: RunConfig, saved: RunConfig, *, counting: tuple[str, ...] = ()) -> list[str]:
    """Name what differs between two configurations and would make a resumed run another run.

    Keys that begin with one of ``counting`` count although a resumed run may change them.
    """
    now, then = (_flat(dataclasses.asdict(c)) for c in (config, saved))
    return [
        f"{key} was {then.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key)
        and (not key.startswith(_MAY_CHANGE) or (counting and key.startswith(counting)))
    ]


_MAY_CHANGE = (
    "media.num_workers",
    "media.cache",
    "media.prefetch_depth",
    "media.timeout_seconds",
    "media.decoder",
    "data.evaluate",
    "evaluation.",
    "model.device",
    "rollout.server",
    "rollout.sglang",
    "run.output",
    "run.steps",
    "run.save_every",
    "run.keep_last",
    "run.log_rollouts_every",
    "run.rollouts_logged",
    "run.threads",
    "run.tensorboard",
    "run.synchronize_cuda",
)
"""Settings that a resumed run may change; more steps stretch the learning-rate schedule."""


def _flat(tree: Mapping[str, object], where: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{where}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as TOML; keys that are None are left out."""
    tree = TypeAdapter(RunConfig).dump_python(config, mode="json", exclude_none=True)
    path.write_text(tomli_w.dumps(tree), encoding="utf-8")


def _check_finite(value: object, where: str) -> None:
    """Raise ConfigError at the first number that is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, got {value}")
    children = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        _check_finite(child, f"{where}.{key}" if where else str(key))


def _apply(tree: dict[str, object], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"an override must read section.key=value, got {override!r}")
    *sections, last = key.strip().split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
        tree = child
    tree[last] = _value(text.strip())


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _check_keys(tree: Mapping[str, object], owner: type, where: str) -> None:
    """Raise ConfigError at the first key that the dataclass does not have."""
    hints = typing.get_type_hints(owner)
    known = [f.name for f in dataclasses.fields(owner)]
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            advice = f"did you mean {where}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"unknown key {where}{key} in the configuration: {advice}")
        for inner in _dataclasses_in(hints[key]):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict):
                    _check_keys(item, inner, f"{where}{key}.")


def _dataclasses_in(hint: object) -> list[type]:
    """Dataclasses that a field's annotation holds, directly, optionally, or as items of a sequence."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list):
        return [found for argument in typing.get_args(hint) for found in _dataclasses_in(argument)]
    return []
