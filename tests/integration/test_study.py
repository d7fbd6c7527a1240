"""The paper in miniature: every row, a few steps each, and what is said of the numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from omnigrpo import stages
from omnigrpo.data.synthetic.dataset import SyntheticConfig
from omnigrpo.metrics import read_metrics
from omnigrpo.reproduce import stage_overrides
from omnigrpo.study import ROWS, Budget, Cell, StudyConfig, StudyResult, run_study
from omnigrpo.study_report import as_markdown, write_study

SHORT = ("run.steps=2", "run.threads=1", "trainer.prompts_per_step=4")
SAMPLING = ("rollout.samples=2", "rollout.max_new_tokens=8")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> StudyConfig:
    return StudyConfig(
        output=tmp_path_factory.mktemp("study"),
        seeds=(0,),
        data=SyntheticConfig(num_cold_start=7, num_rl=7, num_heldout=7, num_ood=7),
        cold_start=SHORT,
        sft=SHORT,
        rlvr=(*SHORT, *SAMPLING),
    )


def test_every_row_is_trained_once_and_evaluated_on_both_splits(
    config: StudyConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first = run_study(config)
    assert tuple(first.cells) == ROWS
    for stage in ("cold_start", "sft", "grpo"):
        assert [step["step"] for step in read_metrics(config.output / "seed0" / stage)] == [1, 2]

    assert {row: (b.clips, b.steps, b.completions_per_clip) for row, b in first.budgets.items()} == {
        "cold start": (7, 2, 1),
        "SFT on labels": (7, 2, 1),
        "RLVR": (7, 2, 2),
    }

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("was done before")

    for name in ("run_sft", "run_grpo", "run_evaluation"):
        monkeypatch.setattr(stages, name, refuse)
    assert run_study(config) == first
    assert json.loads((config.output / "study.json").read_text())["seeds"] == [0]
    with pytest.raises(AssertionError, match="was done before"):
        run_study(replace(config, seeds=(0, 1)))


def cell(*wars: float) -> Cell:
    return Cell(war=wars, uar=wars, format_rate=(1.0,) * len(wars))


def result(sft: tuple[float, ...], rlvr: tuple[float, ...]) -> StudyResult:
    cells = {
        "base": {"heldout": cell(0.0, 0.0), "ood": cell(0.0, 0.0)},
        "cold start": {"heldout": cell(0.5, 0.6), "ood": cell(0.4, 0.5)},
        "SFT on labels": {"heldout": cell(0.9, 0.8), "ood": cell(*sft)},
        "RLVR": {"heldout": cell(0.9, 0.9), "ood": cell(*rlvr)},
    }
    given = Budget(clips=100, steps=30, clips_per_step=10, completions_per_clip=8, seconds=(60.0, 62.0))
    return StudyResult(seeds=(0, 1), cells=cells, budgets={"RLVR": given})


def test_the_verdict_is_the_numbers(tmp_path: Path) -> None:
    better = result((0.5, 0.6), (0.8, 0.9))
    assert (
        "RLVR is better than SFT on labels: +30.0 points of WAR on average, ahead in 2 of 2"
        in better.verdict()
    )
    assert "SFT loses 30.0 points, RLVR 5.0" in better.verdict()
    worse = result((0.9, 0.8), (0.8, 0.8)).verdict()
    assert "no better than SFT on labels: -5.0 points of WAR on average, ahead in 0 of 2" in worse
    assert "| SFT on labels | 85.0 ± 7.1 | 85.0 ± 7.1 | 55.0 ± 7.1 |" in as_markdown(better)
    assert "| RLVR | 100 | 30 x 10 | 3.0 | 2400 | 61 |" in as_markdown(better)
    table, picture = write_study(better, tmp_path)
    assert better.verdict() in table.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_overrides_go_to_their_stage() -> None:
    found = stage_overrides(
        ["sft.run.steps=2", "all.run.seed=1", "rlvr.model.dtype=bfloat16"], ("sft", "rlvr")
    )
    assert found == {"sft": ("run.steps=2", "run.seed=1"), "rlvr": ("run.seed=1", "model.dtype=bfloat16")}
    with pytest.raises(
        ValueError, match=r"must begin with a stage \(sft, rlvr, or all\), e\.g\. rlvr\.run\.steps=10"
    ):
        stage_overrides(["run.steps=2"], ("sft", "rlvr"))


def test_a_study_needs_seeds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs seeds, each once"):
        StudyConfig(output=tmp_path, seeds=(1, 1))
