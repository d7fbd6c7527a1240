"""R1-Omni's stages and the files that they learn from and are tested on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omnigrpo.config import ConfigError, RunConfig
from omnigrpo.data.dataset import check_responses, read_dataset
from omnigrpo.evaluate.benchmarks import benchmarks_of

BASE = "base"
"""The row of the model that everything starts from."""
EVALUATION = "evaluation"
"""What ``--set`` calls the settings of all evaluations."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeStage:
    """One training run of the recipe."""

    name: str
    """Of its directory, and in ``--set``."""
    kind: Literal["sft", "grpo"]
    preset: str
    start: str
    """The stage whose model it starts from, or ``base``."""
    data: str
    """Its file in the data directory."""
    optional: bool = False
    """Whether the recipe goes without it where there is no such file."""
    epochs: int
    asks_for_tags: bool
    """Whether its model has learnt to answer in tags, and is asked to in the evaluation."""


_STAGES = (
    RecipeStage(
        name="cold_start",
        kind="sft",
        preset="r1_omni_cold_start",
        start=BASE,
        data="cold_start.json",
        epochs=5,
        asks_for_tags=True,
    ),
    RecipeStage(
        name="sft",
        kind="sft",
        preset="r1_omni_sft",
        start=BASE,
        data="sft.json",
        optional=True,
        epochs=1,
        asks_for_tags=False,
    ),
    RecipeStage(
        name="rlvr",
        kind="grpo",
        preset="r1_omni",
        start="cold_start",
        data="rl.json",
        epochs=2,
        asks_for_tags=True,
    ),
)
R1_OMNI = {stage.name: stage for stage in _STAGES}
"""By name, in the order in which they run."""
PUBLISHED = {BASE: "HumanOmni-0.5B", "cold_start": "EMER-SFT", "sft": "MAFW-DFEW-SFT", "rlvr": "R1-Omni"}
"""What the paper's table calls the rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeData:
    """The files of a data directory."""

    train: dict[str, Path]
    """By stage; an optional stage without a file is left out."""
    tests: dict[str, Path]
    """By split."""

    def check_tests(self, evaluation: RunConfig) -> None:
        """Raise DatasetError for a test split that the evaluation could not use."""
        benchmarks = benchmarks_of(tuple(self.tests), {})
        for split, path in self.tests.items():
            benchmark = benchmarks[split]
            read_dataset(
                path,
                evaluation.data.style,
                media_root=evaluation.data.media_root,
                labels=None if benchmark is None else benchmark.labels,
            )


def find_data(directory: Path) -> RecipeData:
    """Find the files of the recipe; raises ConfigError where one is missing, or two splits have one name."""
    train = {stage.name: directory / stage.data for stage in _STAGES}
    missing = [path.name for name, path in train.items() if not path.is_file() and not R1_OMNI[name].optional]
    tests: dict[str, Path] = {}
    for path in sorted({*directory.glob("test_*.json"), *directory.glob("*_test.json")}):
        split = path.stem.removeprefix("test_").removesuffix("_test")
        if split in tests:
            raise ConfigError(f"{tests[split]} and {path} are both the test split {split!r}: rename one")
        tests[split] = path
    if not tests:
        missing.append("a test split (test_NAME.json or NAME_test.json)")
    if missing:
        raise ConfigError(
            f"{directory} lacks {', '.join(missing)}: docs/r1_omni.md says what the data directory holds"
        )
    return RecipeData(train={name: path for name, path in train.items() if path.is_file()}, tests=tests)


def num_steps(stage: RecipeStage, config: RunConfig) -> int:
    """Steps of the stage's epochs over its file, rounded, at least one.

    Raises DatasetError for a file that the stage cannot use.
    """
    prompts = read_dataset(config.data.train, config.data.style, media_root=config.data.media_root)
    if stage.kind == "sft":
        check_responses(prompts, config.data.train)
    return max(1, round(stage.epochs * len(prompts) / config.trainer.prompts_per_step))
