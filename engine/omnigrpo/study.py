"""R1-Omni's Table 1 in miniature: four models on synthetic clips, in and out of distribution, over several seeds."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich.console import Console

from omnigrpo.config import RunConfig
from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.demo import build_base
from omnigrpo.evaluate.evaluation_report import EvaluationReport
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

    @property
    def mean_war(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.war)

    @property
    def spread_war(self) -> float:
        """Sample standard deviation over the seeds; 0 for one seed."""
        return statistics.stdev(self.war) if len(self.war) > 1 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """The table."""

    seeds: tuple[int, ...]
    cells: dict[str, dict[str, Cell]]
    """By row, then split."""

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
    reports = {seed: _one_seed(console, config, seed) for seed in config.seeds}
    cells = {
        row: {split: _cell([reports[seed][row][split] for seed in config.seeds]) for split in SPLITS}
        for row in ROWS
    }
    result = StudyResult(seeds=config.seeds, cells=cells)
    config.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(result) | {"verdict": result.verdict()}, indent=1)
    (config.output / RESULT_FILE).write_text(text + "\n", encoding="utf-8")
    return result


def _one_seed(console: Console, config: StudyConfig, seed: int) -> Mapping[str, dict[str, EvaluationReport]]:
    root = config.output / f"seed{seed}"
    data, base = root / "data", root / "base"
    console.rule(f"seed {seed}")
    with counting("render clips") as show:
        generate_dataset(data, replace(config.data, seed=seed), on_progress=show)
    if not base.is_dir():
        build_base(base, seed=seed)
    cold_start = _stage(root, seed, "cold_start", "sft", base, "cold_start", config.cold_start)
    sft = _stage(root, seed, "sft", "sft", base, "rl", config.sft)
    rlvr = _stage(root, seed, "grpo", "grpo", cold_start.model, "rl", config.rlvr)
    for stage in (cold_start, sft, rlvr):
        console.print(f"seed {seed}: {stage.name}")
        stage.run()
    models = zip(ROWS, (base, cold_start.model, sft.model, rlvr.model), strict=True)
    return {row: _evaluated(console, rlvr.config, model, row, root / "evaluations") for row, model in models}


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
