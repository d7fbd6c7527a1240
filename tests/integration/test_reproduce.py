"""`omnigrpo reproduce r1-omni`: the whole chain on a tiny model, interrupted, gone on with, and refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from omnigrpo import stages
from omnigrpo.cli import app
from omnigrpo.config import ConfigError, load_config
from omnigrpo.data.dataset_files import DatasetError
from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.metrics import Metric, read_metrics
from omnigrpo.recipe import R1_OMNI, find_data
from omnigrpo.reproduce import ReproduceConfig, Reproduction, StageFigures, run_reproduction
from omnigrpo.reproduce_report import as_markdown
from omnigrpo.trainer import Trainer

HERE = (
    "all.model.device=cpu",
    "all.model.dtype=float32",
    "all.run.threads=1",
    "all.rollout.max_new_tokens=8",
    "cold_start.trainer.prompts_per_step=4",
    "sft.trainer.prompts_per_step=7",
    "rlvr.trainer.prompts_per_step=4",
    "rlvr.rollout.samples=3",
    "rlvr.run.steps=3",
    "rlvr.run.save_every=1",
)


@pytest.fixture(scope="module")
def data(job, tmp_path_factory) -> Path:
    """7 clips of cold start, 14 of labels for RLVR and SFT, and two test splits, one named after a benchmark."""
    directory = tmp_path_factory.mktemp("recipe")
    sources = {
        "cold_start": "cold_start", "rl": "rl", "sft": "rl", "test_ood": "ood", "dfew_test": "heldout",
    }  # fmt: skip
    for name, source in sources.items():
        items = json.loads((job.data / f"{source}.json").read_text())
        for item in items:
            item["video"] = str(job.data / item["video"])
        (directory / f"{name}.json").write_text(json.dumps(items))
    return directory


def settings(job, data: Path, output: Path, *more: str, faithful: bool = False) -> ReproduceConfig:
    """The reward is one that an untrained model can earn."""
    reward = f"rlvr.reward.terms=[{{name='{job.reward}:vowels'}}]"
    return ReproduceConfig(
        model=job.base, data=data, output=output, faithful=faithful, overrides=(*HERE, reward, *more)
    )


@pytest.fixture(scope="module")
def finished(job, data: Path, tmp_path_factory) -> tuple[ReproduceConfig, Reproduction]:
    config = settings(job, data, tmp_path_factory.mktemp("mended") / "out")
    return config, run_reproduction(config)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def changed(before: Path, after: Path, part: str) -> set[bool]:
    first, second = weights(before), weights(after)
    return {not tensor.equal(second[name]) for name, tensor in first.items() if name.startswith(part)}


def test_every_stage_is_trained_and_every_row_evaluated(
    finished: tuple[ReproduceConfig, Reproduction], job
) -> None:
    config, result = finished
    assert list(result.rows) == ["base", "cold_start", "sft", "rlvr"]
    assert all(list(reports) == ["dfew", "ood"] for reports in result.rows.values())
    # Epochs: 5 of 7 clips by 4, 1 of 14 by 7; RLVR's steps were given.
    assert {name: figures.steps for name, figures in result.stages.items()} == {
        "cold_start": 9, "sft": 2, "rlvr": 3,
    }  # fmt: skip
    for name, start in (("cold_start", job.base), ("rlvr", config.output / "cold_start" / "model")):
        assert load_config(config.output / name / "config.toml").model.path == start
    assert changed(job.base, config.output / "cold_start" / "model", "model.layers.") == {True}
    trained = changed(
        config.output / "cold_start" / "model", config.output / "rlvr" / "model", "model.layers."
    )
    assert trained == {True}
    written = json.loads((config.output / "reproduction.json").read_text())
    assert written["rows"]["rlvr"]["ood"]["clips"] == 7
    evaluations = config.output / "rlvr" / "evaluations"
    assert {path.name for path in evaluations.iterdir()} == {
        "rlvr.toml", "rlvr.md", "rlvr.html", "rlvr_dfew.json", "rlvr_ood.json",
    }  # fmt: skip
    assert any((config.output / "features").iterdir())


def test_only_rows_that_learnt_tags_are_asked_for_them(
    finished: tuple[ReproduceConfig, Reproduction],
) -> None:
    config, _ = finished
    asked = {
        row: load_config(config.output / row / "evaluations" / f"{row}.toml").data.style.instruction != ""
        for row in ("base", "cold_start", "sft", "rlvr")
    }
    assert asked == {"base": False, "cold_start": True, "sft": False, "rlvr": True}


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("was done before")


def test_what_is_done_is_not_done_again(
    finished: tuple[ReproduceConfig, Reproduction], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, result = finished
    for name in ("run_sft", "run_grpo", "run_evaluation"):
        monkeypatch.setattr(stages, name, refuse)
    assert run_reproduction(config) == result
    (config.output / "sft" / "evaluations" / "sft_ood.json").rename(config.output / "aside.json")
    with pytest.raises(AssertionError, match="was done before"):
        run_reproduction(config)
    (config.output / "aside.json").rename(config.output / "sft" / "evaluations" / "sft_ood.json")


def test_an_interrupted_chain_ends_as_one_that_was_not(
    finished: tuple[ReproduceConfig, Reproduction],
    job,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, result = finished
    config = replace(whole, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", breaking_at(2))
        with pytest.raises(KeyboardInterrupt):
            run_reproduction(config)
    assert (config.output / "cold_start" / "model").is_dir()
    assert not (config.output / "rlvr" / "model").exists()
    monkeypatch.setattr(stages, "run_sft", refuse)
    again = run_reproduction(config)
    assert [step["step"] for step in read_metrics(config.output / "rlvr")] == [1, 2, 3]
    first, second = (weights(c.output / "rlvr" / "model") for c in (whole, config))
    assert all(tensor.equal(second[name]) for name, tensor in first.items())
    texts = [[clip.text for clip in r.rows["rlvr"]["ood"].clips] for r in (result, again)]
    assert texts[0] == texts[1]


def breaking_at(step: int) -> Callable[[Trainer], object]:
    """A step that is interrupted once so many are done."""
    real = Trainer.step

    def interrupted(trainer: Trainer) -> object:
        if trainer.steps_done == step:
            raise KeyboardInterrupt
        return real(trainer)

    return interrupted


def test_the_faithful_chain_has_the_quirks(job, data: Path, tmp_path: Path) -> None:
    one_step = ("cold_start.run.steps=1", "sft.run.steps=1", "rlvr.run.steps=1")
    config = settings(job, data, tmp_path / "faithful", *one_step, faithful=True)
    run_reproduction(config)
    cold_start, rlvr = (config.output / name / "model" for name in ("cold_start", "rlvr"))
    bert = "model.bert_model.encoder."
    assert changed(job.base, cold_start, bert) == {False}
    assert True in changed(cold_start, rlvr, bert)
    # The gate is drawn anew before the first step of a learning rate of 2e-5.
    moved = weights(cold_start)["model.bert_gate.2.weight"] - weights(job.base)["model.bert_gate.2.weight"]
    assert moved.abs().max() > 1e-3
    (step,) = read_metrics(config.output / "rlvr")
    assert step[Metric.KL] > 1e-8  # Dropout in the policy, none in the reference of the same weights.
    assert not (config.output / "features").exists()


def test_the_mended_chain_has_none(finished: tuple[ReproduceConfig, Reproduction], job) -> None:
    config, _ = finished
    cold_start, rlvr = (config.output / name / "model" for name in ("cold_start", "rlvr"))
    assert changed(job.base, cold_start, "model.bert_model.") == {False}
    assert changed(cold_start, rlvr, "model.bert_model.") == {False}
    moved = weights(cold_start)["model.bert_gate.2.weight"] - weights(job.base)["model.bert_gate.2.weight"]
    assert moved.abs().max() < 1e-3
    assert read_metrics(config.output / "rlvr")[0][Metric.KL] == pytest.approx(0, abs=1e-10)


def test_other_settings_are_refused(finished: tuple[ReproduceConfig, Reproduction]) -> None:
    config, _ = finished
    for override, named in (
        ("cold_start.run.steps=10", r"finished cold_start of other settings: run\.steps was 9, is 10"),
        ("rlvr.optimizer.learning_rate=1e-5", r"finished rlvr of other settings: optimizer\.learning_rate"),
        (
            "evaluation.media.aspect=stretch",
            r"evaluations of base with other settings: media\.aspect was 'pad'",
        ),
        ("evaluation.evaluation.answer=raw", r"evaluations of base with other settings: evaluation\.answer"),
    ):
        with pytest.raises(ConfigError, match=named):
            run_reproduction(replace(config, overrides=(*config.overrides, override)))


def test_a_stage_does_not_outlive_its_cold_start(
    finished: tuple[ReproduceConfig, Reproduction], tmp_path: Path
) -> None:
    config, _ = finished
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    shutil.rmtree(output / "cold_start" / "model")
    with pytest.raises(ConfigError, match=r"rlvr was begun from a cold_start that is not there any more"):
        run_reproduction(replace(config, output=output))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.steps=3", r"must begin with a stage \(cold_start, sft, rlvr, evaluation, or all\)"),
        ("rlvr.model.path=elsewhere", r"follows from --model, --data and --output"),
        ("all.model.reset_gate=true", "would throw away the gate that GRPO starts from"),
        ("rlvr.rollout.smaples=3", r"unknown key rollout\.smaples .* did you mean rollout\.samples"),
    ],
)
def test_bad_overrides_are_named_before_anything_is_done(
    job, data: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_reproduction(settings(job, data, tmp_path / "out", override))
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(data: Path, tmp_path: Path) -> None:
    for name in ("rl.json", "sft.json"):
        shutil.copy(data / name, tmp_path / name)
    with pytest.raises(
        ConfigError, match=r"lacks cold_start\.json, a test split \(test_NAME\.json or NAME_test"
    ):
        find_data(tmp_path)
    for name in ("cold_start.json", "test_ood.json"):
        shutil.copy(data / name, tmp_path / name)
    assert tuple(find_data(tmp_path).tests) == ("ood",)
    shutil.copy(data / "test_ood.json", tmp_path / "ood_test.json")
    with pytest.raises(ConfigError, match="are both the test split 'ood'"):
        find_data(tmp_path)


def test_without_labels_for_sft_that_row_is_left_out(job, data: Path, tmp_path: Path) -> None:
    for name in ("cold_start", "rl", "dfew_test"):
        shutil.copy(data / f"{name}.json", tmp_path / f"{name}.json")
    assert tuple(find_data(tmp_path).train) == ("cold_start", "rlvr")
    with pytest.raises(ConfigError, match=r"no such stage without sft\.json"):
        run_reproduction(
            ReproduceConfig(
                model=job.base, data=tmp_path, output=tmp_path / "out", overrides=("sft.run.steps=1",)
            )
        )


def test_data_that_a_later_stage_cannot_use_are_refused_at_once(job, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    items = json.loads((broken / "dfew_test.json").read_text())
    items[2]["conversations"][1]["value"] = "joy"
    (broken / "dfew_test.json").write_text(json.dumps(items))
    with pytest.raises(DatasetError, match=r"dfew_test\.json.*must be one of happy, .*got 'joy'"):
        run_reproduction(settings(job, broken, tmp_path / "out"))
    shutil.copy(data / "dfew_test.json", broken / "dfew_test.json")
    shutil.copy(data / "rl.json", broken / "cold_start.json")
    with pytest.raises(DatasetError, match="supervised training needs a gpt text with <think>"):
        run_reproduction(settings(job, broken, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_table_has_the_published_rows(finished: tuple[ReproduceConfig, Reproduction]) -> None:
    _, result = finished
    text = as_markdown(result)
    report: EvaluationReport = result.rows["rlvr"]["dfew"]
    war, uar = 100 * report.strict.war, 100 * report.strict.uar
    assert f"| rlvr | {war:.2f}/{uar:.2f} (" in text
    assert "| R1-Omni, published | 65.83/56.27 |  |  |" in text
    assert "| MAFW-DFEW-SFT, published | 60.23/44.39 |  |  |" in text
    figures: StageFigures = result.stages["cold_start"]
    assert f"| cold start | 9 | {figures.hours:.3g} |" in text


def test_the_command_knows_one_recipe(data: Path, tmp_path: Path) -> None:
    wanted = ["--model", str(tmp_path), "--data", str(data), "--output", str(tmp_path / "out")]
    outcome = CliRunner().invoke(app, ["reproduce", "r2-omni", *wanted])
    assert isinstance(outcome.exception, ValueError)
    assert "the recipes are r1-omni, got 'r2-omni'" in str(outcome.exception)
    assert list(R1_OMNI) == ["cold_start", "sft", "rlvr"]
