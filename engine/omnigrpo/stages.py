"""Runs after one another: each from a preset, begun, gone on with, or found finished; and their evaluations."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from omnigrpo.config import ConfigError, RunConfig, changed_settings, load_config, save_config
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.metrics import METRICS_FILE
from omnigrpo.run import CONFIG_FILE, MODEL_DIRECTORY, check_grpo, run_evaluation, run_grpo, run_sft


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training run of a chain."""

    name: str
    kind: Literal["sft", "grpo"]
    config: RunConfig

    def __post_init__(self) -> None:
        """Reject settings that its kind of training would refuse when its turn comes."""
        if self.kind == "grpo":
            check_grpo(self.config)

    @property
    def model(self) -> Path:
        """The checkpoint that it leaves."""
        return self.config.run.output / MODEL_DIRECTORY

    @property
    def is_begun(self) -> bool:
        """Whether its directory holds a run, finished or not."""
        return self.model.is_dir() or (self.config.run.output / METRICS_FILE).exists()

    def run(self) -> bool:
        """Train unless that is done; whether there was anything to do. What was interrupted goes on.

        Raises ConfigError where the directory holds a run of other settings.
        """
        if self.model.is_dir():
            self._check_finished()
            return False
        if self.kind == "sft":
            run_sft(self.config, resume=self.is_begun, title=self.name.replace("_", " "))
        else:
            run_grpo(self.config, resume=self.is_begun)
        return True

    def _check_finished(self) -> None:
        output = self.config.run.output
        changed = changed_settings(self.config, load_config(output / CONFIG_FILE), counting=("run.steps",))
        if changed:
            raise ConfigError(
                f"{output} holds a finished {self.name} of other settings: {'; '.join(changed)}. Use those, or "
                "remove that directory and those of the stages after it, or choose another output"
            )

    def evaluate(
        self, output: Path, *, pairs: tuple[tuple[str, str], ...] = ()
    ) -> dict[str, EvaluationReport]:
        """Evaluate its model with its own settings; writes ``<name>_<split>.json`` to ``output``."""
        return evaluate_model(self.config, self.model, self.name, output, pairs=pairs)


def evaluate_model(
    config: RunConfig,
    model: Path,
    name: str,
    output: Path,
    *,
    pairs: tuple[tuple[str, str], ...] = (),
) -> dict[str, EvaluationReport]:
    """Evaluate a checkpoint with the settings of a run."""
    settings = replace(config, model=replace(config.model, path=model))
    return run_evaluation(settings, output=output, stage=name, pairs=pairs)


def evaluate_missing(config: RunConfig, model: Path, name: str, output: Path) -> dict[str, EvaluationReport]:
    """The evaluations of a checkpoint on the splits of ``config``: read where they are in ``output``, made where not.

    The settings are kept beside them, in ``<name>.toml``. Raises ConfigError where results of other settings are there.
    """
    config = replace(config, model=replace(config.model, path=model))
    paths = {split: output / f"{name}_{split}.json" for split in config.data.evaluate}
    settings = output / f"{name}.toml"
    known: dict[str, Path] = {}
    if settings.is_file() and any(path.is_file() for path in paths.values()):
        saved = load_config(settings)
        known = saved.data.evaluate
        changed = changed_settings(config, saved, counting=("evaluation.",)) + [
            f"data.evaluate.{split} was {known[split]}, is {file}"
            for split, file in config.data.evaluate.items()
            if known.get(split, file) != file
        ]
        if changed:
            raise ConfigError(
                f"{output} holds evaluations of {name} with other settings: {'; '.join(changed)}. Use those, or "
                "remove that directory, or choose another output"
            )
    found = {
        split: EvaluationReport.from_json(json.loads(path.read_text(encoding="utf-8")))
        for split, path in paths.items()
        if split in known and path.is_file()
    }
    missing = {split: file for split, file in config.data.evaluate.items() if split not in found}
    if missing:
        output.mkdir(parents=True, exist_ok=True)
        save_config(
            replace(config, data=replace(config.data, evaluate=known | config.data.evaluate)), settings
        )
        found |= evaluate_model(
            replace(config, data=replace(config.data, evaluate=missing)), model, name, output
        )
    return {split: found[split] for split in paths}


def preset_config(
    preset: str,
    *,
    model: Path,
    train: Path,
    output: Path,
    evaluate: Mapping[str, Path],
    overrides: Sequence[str] = (),
) -> RunConfig:
    """A preset of the package with the paths of one run; overrides come last."""
    with as_file(files("omnigrpo") / "presets" / f"{preset}.toml") as path:
        values = {"model.path": model, "data.train": train, "run.output": output}
        own = [f"{key}='''{value}'''" for key, value in values.items()]
        splits = ", ".join(f"'{name}' = '''{file}'''" for name, file in evaluate.items())
        return load_config(path, [*own, f"data.evaluate={{{splits}}}", *overrides])
