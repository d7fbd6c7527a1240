"""A published recipe from one directory of data: its stages, their evaluation, and the table."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from omnigrpo.config import ConfigError, RunConfig
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.metrics import EVALUATIONS_DIRECTORY, Metric, read_metrics
from omnigrpo.recipe import BASE, EVALUATION, R1_OMNI, RecipeData, RecipeStage, find_data, num_steps
from omnigrpo.report.evaluation_page import write_evaluation
from omnigrpo.stages import Stage, evaluate_missing, preset_config

RESULT_FILE = "reproduction.json"
FEATURES_DIRECTORY = "features"
_FIXED = ("model.path", "data.train", "data.evaluate", "run.output")
_LAST_STEPS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ReproduceConfig:
    """What a reproduction starts from and where it goes."""

    model: Path
    """The base checkpoint."""
    data: Path
    """Directory with cold_start.json, rl.json, test splits and, for the baseline, sft.json."""
    output: Path
    faithful: bool = False
    """Do as the published code does, quirks included."""
    overrides: tuple[str, ...] = ()
    """``stage.section.key=value``, see ``stage_overrides``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFigures:
    """What the training of one stage came to."""

    steps: int
    hours: float
    """Wall time of the steps."""
    samples_per_second: float
    """Median over the steps."""
    reward: float | None
    """Mean over the last 20 steps; None for supervised training."""
    loss: float
    """Mean over the last 20 steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproduction:
    """The result: every row of the table, and the stages behind it."""

    faithful: bool
    stages: dict[str, StageFigures]
    rows: dict[str, dict[str, EvaluationReport]]
    """Reports by row (``base``, then the stages), then split."""

    def to_json(self) -> dict[str, object]:
        """Figures without the completions, which the evaluations hold."""
        return {
            "faithful": self.faithful,
            "stages": {name: asdict(figures) for name, figures in self.stages.items()},
            "rows": {
                row: {
                    split: {
                        "war": report.strict.war,
                        "uar": report.strict.uar,
                        "war_alias": report.alias.war,
                        "uar_alias": report.alias.uar,
                        "war_standard_error": report.strict.war_standard_error,
                        "format_rate": report.format_rate,
                        "clips": len(report.clips),
                        "dropped": report.num_dropped,
                    }
                    for split, report in reports.items()
                }
                for row, reports in self.rows.items()
            },
        }


def run_reproduction(config: ReproduceConfig) -> Reproduction:
    """Train and evaluate every stage; what an earlier call finished is not done again, what it began goes on.

    Raises ValueError, before anything is loaded, for data or settings that some stage could not use.
    """
    console = Console()
    data = find_data(config.data)
    names = (*R1_OMNI, EVALUATION)
    overrides = {
        name: checked_overrides(items) for name, items in stage_overrides(config.overrides, names).items()
    }
    stages = _stages(config, data, overrides)
    evaluation = _evaluation(config, data, overrides[EVALUATION])
    _check_starts(stages)

    rows = {BASE: _evaluated(console, config, evaluation, config.model, BASE, asks_for_tags=False)}
    for name, stage in stages.items():
        console.rule(f"{name}: {stage.config.run.steps} steps")
        if not stage.run():
            console.print(f"{name} was done before")
        asks = R1_OMNI[name].asks_for_tags
        rows[name] = _evaluated(console, config, evaluation, stage.model, name, asks_for_tags=asks)
    figures = {name: _figures(stage) for name, stage in stages.items()}
    result = Reproduction(faithful=config.faithful, stages=figures, rows=rows)
    text = json.dumps(result.to_json(), indent=1)
    (config.output / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
    return result


def stage_overrides(overrides: Sequence[str], stages: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Overrides ``stage.section.key=value`` by stage; those that begin with ``all.`` go to every one.

    Raises ValueError for one that begins with no stage.
    """
    found: dict[str, list[str]] = {stage: [] for stage in stages}
    for override in overrides:
        stage, _, rest = override.partition(".")
        if stage not in (*stages, "all"):
            raise ValueError(
                f"--set {override!r} must begin with a stage ({', '.join(stages)}, or all), e.g. "
                f"{stages[-1]}.run.steps=10"
            )
        for name in stages if stage == "all" else (stage,):
            found[name].append(rest)
    return {stage: tuple(items) for stage, items in found.items()}


def checked_overrides(overrides: tuple[str, ...]) -> tuple[str, ...]:
    """The same; raises ConfigError for one of the paths that tie the stages together."""
    for override in overrides:
        if override.strip().startswith(_FIXED):
            raise ConfigError(
                f"--set ...{override}: which model, data and directory a stage has follows from --model, --data and "
                "--output; change those"
            )
    return overrides


def _stages(
    config: ReproduceConfig, data: RecipeData, overrides: Mapping[str, tuple[str, ...]]
) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for name, recipe in R1_OMNI.items():
        file = data.train.get(name)
        if file is None:
            if any(override.startswith(f"{name}.") for override in config.overrides):
                raise ConfigError(
                    f"--set {name}...: there is no such stage without {recipe.data} in {config.data}: add that file"
                )
            continue
        start = config.model if recipe.start == BASE else stages[recipe.start].model
        stages[name] = Stage(
            name=name, kind=recipe.kind, config=_config(config, recipe, start, file, data, overrides[name])
        )
    return stages


def _config(
    config: ReproduceConfig,
    recipe: RecipeStage,
    start: Path,
    file: Path,
    data: RecipeData,
    overrides: tuple[str, ...],
) -> RunConfig:
    settings = preset_config(
        _preset(recipe.preset, config),
        model=start,
        train=file,
        output=config.output / recipe.name,
        evaluate=data.tests,
        overrides=(*_cache(config), *overrides),
    )
    counted = num_steps(recipe, settings)
    if any(override.startswith("run.steps") for override in overrides):
        return settings
    return replace(settings, run=replace(settings.run, steps=counted))


def _evaluation(config: ReproduceConfig, data: RecipeData, overrides: tuple[str, ...]) -> RunConfig:
    settings = preset_config(
        _preset("r1_omni_evaluation", config),
        model=config.model,
        train=next(iter(data.tests.values())),
        output=config.output,
        evaluate=data.tests,
        overrides=(*_cache(config), *overrides),
    )
    data.check_tests(settings)
    return settings


def _preset(name: str, config: ReproduceConfig) -> str:
    return f"{name}_faithful" if config.faithful else name


def _cache(config: ReproduceConfig) -> tuple[str, ...]:
    """Tower outputs are kept for all stages, unless the presets say that they are made anew."""
    if config.faithful:
        return ()
    return (f"media.cache_directory='''{config.output / FEATURES_DIRECTORY}'''",)


def _check_starts(stages: Mapping[str, Stage]) -> None:
    """Raise ConfigError for a stage that was begun from one that is not there, and would be trained anew."""
    for name, stage in stages.items():
        start = stages.get(R1_OMNI[name].start)
        if start is not None and stage.is_begun and not start.model.is_dir():
            raise ConfigError(
                f"{stage.config.run.output} was begun from a {start.name} that is not there any more: remove that "
                "directory, so that it starts from the one to come"
            )


def _evaluated(
    console: Console,
    config: ReproduceConfig,
    evaluation: RunConfig,
    model: Path,
    row: str,
    *,
    asks_for_tags: bool,
) -> dict[str, EvaluationReport]:
    if not asks_for_tags:
        style = replace(evaluation.data.style, instruction="")
        evaluation = replace(evaluation, data=replace(evaluation.data, style=style))
    output = config.output / row / EVALUATIONS_DIRECTORY
    reports = evaluate_missing(evaluation, model, row, output)
    write_evaluation(list(reports.values()), output, row)
    for split, report in reports.items():
        console.print(f"{row}, {split}: {report.headline()}", highlight=False)
    return reports


def _figures(stage: Stage) -> StageFigures:
    steps = read_metrics(stage.config.run.output)
    return StageFigures(
        steps=len(steps),
        hours=sum(step[Metric.STEP_SECONDS] for step in steps) / 3600,
        samples_per_second=statistics.median(step[Metric.SAMPLES_PER_SECOND] for step in steps),
        reward=_last(steps, Metric.REWARD),
        loss=_last(steps, Metric.LOSS) or 0.0,
    )


def _last(steps: Sequence[dict], key: str) -> float | None:
    values = [step[key] for step in steps[-_LAST_STEPS:] if step.get(key) is not None]
    return statistics.fmean(values) if values else None
