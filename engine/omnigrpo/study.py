"""R1-Omni's Table 1 in miniature: four models on synthetic clips, in and out of distribution, over several seeds."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console

from omnigrpo.config import RunConfig
from omnigrpo.data.dataset import read_dataset
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.demo import build_base
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.metrics import Metric, read_metrics
from omnigrpo.progress import counting
from omnigrpo.stages import Stage, evaluate_missing, preset_config

ROWS = ("base", "cold start", "SFT on labels", "RLVR")
SPLITS = {"heldout": "in distribution", "ood": "out of distribution"}
RESULT_FILE = "study.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyConfig:
    """What a study varies."""

    output: Path
    seeds: tuple[int, ...] = (0, 1, 2)
    data: SyntheticConfig = field(default_factory=SyntheticConfig)
    cold_start: tuple[str, ...] = ()
    """Overrides of the cold start's preset."""
    sft: tuple[str, ...] = ()
    """Overrides of the preset of supervised training on labels."""
    rlvr: tuple[str, ...] = ()
    """Overrides of the GRPO preset."""

    def __post_init__(self) -> None:
        """Raises ValueError without seeds, or with one twice."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"a study needs seeds, each once, got {self.seeds}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One model on one split, over the seeds; fractions."""

    war: tuple[float, ...]
    uar: tuple[float, ...]
    format_rate: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What one row's training was given."""

    clips: int
    """In its data set."""
    steps: int
    clips_per_step: int
    completions_per_clip: int
    """Learnt from in a step: 1 is the given answer."""
    seconds: tuple[float, ...]
    """Wall time of all steps, by seed."""

    @property
    def epochs(self) -> float:
        """Passes over the data set."""
        return self.steps * self.clips_per_step / self.clips


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """The table."""

    seeds: tuple[int, ...]
    cells: dict[str, dict[str, Cell]]
    """By row, then split."""
    budgets: dict[str, Budget]
    """By trained row."""

    def drop(self, row: str) -> tuple[float, ...]:
        """By how much a model is worse out of distribution than in it, WAR, seed by seed."""
        inside, outside = (self.cells[row][split].war for split in SPLITS)
        return tuple(a - b for a, b in zip(inside, outside, strict=True))

    def verdict(self) -> str:
        """Whether RLVR generalises better than supervised training on labels here, as the numbers have it."""
        gains = [
            rlvr - sft
            for rlvr, sft in zip(
                self.cells["RLVR"]["ood"].war, self.cells["SFT on labels"]["ood"].war, strict=True
            )
        ]
        better = sum(gain > 0 for gain in gains)
        mean = statistics.fmean(gains)
        drops = {row: statistics.fmean(self.drop(row)) for row in ("SFT on labels", "RLVR")}
        word = "better" if mean > 0 else "no better"
        return (
            f"Out of distribution RLVR is {word} than SFT on labels: {100 * mean:+.1f} points of WAR on average, ahead "
            f"in {better} of {len(gains)} seeds. From in to out of distribution SFT loses "
            f"{100 * drops['SFT on labels']:.1f} points, RLVR {100 * drops['RLVR']:.1f}."
        )


def run_study(config: StudyConfig) -> StudyResult:
    """Train and evaluate all rows for every seed; what an earlier call finished is not done again."""
    console = Console()
    stages = {seed: _stages(config, seed) for seed in config.seeds}
    reports = {seed: _one_seed(console, config, seed, stages[seed]) for seed in config.seeds}
    cells = {
        row: {split: _cell([reports[seed][row][split] for seed in config.seeds]) for split in SPLITS}
        for row in ROWS
    }
    budgets = {row: _budget([stages[seed][row] for seed in config.seeds]) for row in ROWS[1:]}
    result = StudyResult(seeds=config.seeds, cells=cells, budgets=budgets)
    config.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(result) | {"verdict": result.verdict()}, indent=1)
    (config.output / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
    return result


def _stages(config: StudyConfig, seed: int) -> dict[str, Stage]:
    """The trained rows of a seed, in order."""
    root = config.output / f"seed{seed}"
    cold_start = _stage(root, seed, "cold_start", "sft", root / "base", "cold_start", config.cold_start)
    sft = _stage(root, seed, "sft", "sft", root / "base", "rl", config.sft)
    rlvr = _stage(root, seed, "grpo", "grpo", cold_start.model, "rl", config.rlvr)
    return dict(zip(ROWS[1:], (cold_start, sft, rlvr), strict=True))


def _one_seed(
    console: Console, config: StudyConfig, seed: int, stages: Mapping[str, Stage]
) -> dict[str, dict[str, EvaluationReport]]:
    root = config.output / f"seed{seed}"
    base = root / "base"
    console.rule(f"seed {seed}")
    with counting("render clips") as show:
        generate_dataset(root / "data", replace(config.data, seed=seed), on_progress=show)
    if not base.is_dir():
        build_base(base, seed=seed)
    for stage in stages.values():
        console.print(f"seed {seed}: {stage.name}")
        stage.run()
    models = {ROWS[0]: base} | {row: stage.model for row, stage in stages.items()}
    settings = stages[ROWS[-1]].config
    return {
        row: _evaluated(console, settings, model, row, root / "evaluations") for row, model in models.items()
    }


def _budget(stages: Sequence[Stage]) -> Budget:
    """Of one row, whose stages differ by their seed alone."""
    config = stages[0].config
    return Budget(
        clips=len(read_dataset(config.data.train, config.data.style)),
        steps=config.run.steps,
        clips_per_step=config.trainer.prompts_per_step,
        completions_per_clip=config.rollout.samples if stages[0].kind == "grpo" else 1,
        seconds=tuple(
            sum(step[Metric.STEP_SECONDS] for step in read_metrics(stage.config.run.output))
            for stage in stages
        ),
    )


def _stage(
    root: Path, seed: int, preset: str, kind: str, model: Path, train: str, overrides: Sequence[str]
) -> Stage:
    config = preset_config(
        f"demo_{preset}",
        model=model,
        train=root / "data" / f"{train}.json",
        output=root / preset,
        evaluate={split: root / "data" / f"{split}.json" for split in SPLITS},
        overrides=[f"run.seed={seed}", *overrides],
    )
    return Stage(name=preset, kind="sft" if kind == "sft" else "grpo", config=config)


def _evaluated(
    console: Console, config: RunConfig, model: Path, row: str, output: Path
) -> dict[str, EvaluationReport]:
    """All rows with the same settings."""
    reports = evaluate_missing(config, model, row.replace(" ", "_"), output)
    for split, report in reports.items():
        console.print(f"{row}, {split}: {report.headline()}", highlight=False)
    return reports


def _cell(reports: Sequence[EvaluationReport]) -> Cell:
    return Cell(
        war=tuple(report.alias.war for report in reports),
        uar=tuple(report.alias.uar for report in reports),
        format_rate=tuple(report.format_rate for report in reports),
    )
