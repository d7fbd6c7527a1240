"""Runs after one another: each from a preset, begun, gone on with, or found finished."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

from omnigrpo.config import RunConfig, load_config
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.metrics import METRICS_FILE
from omnigrpo.run import MODEL_DIRECTORY, run_evaluation, run_grpo, run_sft


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One training run of a chain."""

    name: str
    kind: Literal["sft", "grpo"]
    config: RunConfig

    @property
    def model(self) -> Path:
        """The checkpoint that it leaves."""
        return self.config.run.output / MODEL_DIRECTORY

    def run(self) -> bool:
        """Train unless that is done; whether there was anything to do. What was interrupted goes on."""
        if self.model.is_dir():
            return False
        resume = (self.config.run.output / METRICS_FILE).exists()
        (run_sft if self.kind == "sft" else run_grpo)(self.config, resume=resume)
        return True

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
