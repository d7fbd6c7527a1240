"""Evaluations that are interrupted and go on, and the pages that they write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import omnigrpo.run
from omnigrpo.cli import app
from omnigrpo.config import load_config
from omnigrpo.evaluate.evaluation_report import EvaluatedClip
from omnigrpo.evaluate.journal import EvaluationJournal
from omnigrpo.run import run_evaluation

PARTIAL = "eval_heldout.partial.jsonl"


def config(job, *more: str):
    settings = job.settings(Path(), f"data.evaluate={{heldout='{job.data}/heldout.json'}}", *more)
    return load_config(None, settings)


class ProcessEnd(BaseException):
    """Stands for the end of the process."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    keep = EvaluationJournal.add
    left = [batches]

    def add(self: EvaluationJournal, clips: list[EvaluatedClip]) -> None:
        keep(self, clips)
        left[0] -= 1
        if not left[0]:
            raise ProcessEnd

    monkeypatch.setattr(EvaluationJournal, "add", add)


def test_an_interrupted_evaluation_goes_on(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omnigrpo.run, "EVALUATION_BATCH", 2)
    whole = run_evaluation(config(job), output=None)["heldout"]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        with pytest.raises(ProcessEnd):
            run_evaluation(config(job), output=tmp_path)
    assert len((tmp_path / PARTIAL).read_text().splitlines()) == 1 + 4

    answered: list[int] = []
    keep = EvaluationJournal.add

    def counted(self: EvaluationJournal, clips: list[EvaluatedClip]) -> None:
        answered.append(len(clips))
        keep(self, clips)

    monkeypatch.setattr(EvaluationJournal, "add", counted)
    resumed = run_evaluation(config(job), output=tmp_path)["heldout"]
    assert answered == [2, 1]
    assert resumed.clips == whole.clips
    assert resumed.strict == whole.strict
    assert not (tmp_path / PARTIAL).exists()
    assert (tmp_path / "eval_heldout.json").is_file()


def test_other_settings_do_not_go_on(job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omnigrpo.run, "EVALUATION_BATCH", 2)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(ProcessEnd):
            run_evaluation(config(job), output=tmp_path)
    report = run_evaluation(config(job, "rollout.max_new_tokens=3"), output=tmp_path)["heldout"]
    assert {clip.num_tokens for clip in report.clips} <= {1, 2, 3}


def in_shards(directory: Path) -> Path:
    """Split a checkpoint's one file into two; returns the second."""
    whole = directory / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    whole.unlink()
    places = {name: file for file, held in shards.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return directory / "b.safetensors"


def change_a_shard(model: Path, data: Path) -> None:
    shard = model / "b.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(shard).items()}, shard)


def change_the_tokenizer(model: Path, data: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def change_the_gates_tokenizer(model: Path, data: Path) -> None:
    path = next((model / "gate_tokenizer").glob("*.json"))
    path.write_text(path.read_text() + "\n")


def change_a_clip(model: Path, data: Path) -> None:
    first, second = sorted((data / "clips" / "heldout").glob("*.mp4"))[:2]
    shutil.copyfile(first, second)


def change_nothing(model: Path, data: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "more", "num_kept"),
    [
        (change_nothing, (), 2),
        (change_nothing, ("media.num_workers=1",), 2),
        (change_a_shard, (), 0),
        (change_the_tokenizer, (), 0),
        (change_the_gates_tokenizer, (), 0),
        (change_a_clip, (), 0),
        (change_nothing, ("media.audio_failure='silence'",), 0),
        (change_nothing, ("media.min_frames=3",), 0),
    ],
    ids=["same", "workers", "shard", "tokenizer", "gate_tokenizer", "clip", "silence", "min_frames"],
)
def test_answers_go_on_only_where_what_gave_them_is_the_same(
    job,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, Path], None],
    more: tuple[str, ...],
    num_kept: int,
) -> None:
    monkeypatch.setattr(omnigrpo.run, "EVALUATION_BATCH", 2)
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(job.base, model)
    in_shards(model)
    shutil.copytree(job.data, data)
    own = (
        f"model.path='{model}'",
        f"data.evaluate={{heldout='{data}/heldout.json'}}",
        "rollout.max_new_tokens=2",
    )
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(ProcessEnd):
            run_evaluation(config(job, *own), output=tmp_path)
    change(model, data)
    answered: list[str] = []
    keep = EvaluationJournal.add

    def noted(self: EvaluationJournal, clips: list[EvaluatedClip]) -> None:
        answered.extend(clip.prompt_id for clip in clips)
        keep(self, clips)

    monkeypatch.setattr(EvaluationJournal, "add", noted)
    report = run_evaluation(config(job, *own, *more), output=tmp_path)["heldout"]
    assert len(report.clips) == 7
    assert len(answered) == 7 - num_kept


def as_benchmark(job, name: str, path: Path) -> Path:
    items = json.loads((job.data / "heldout.json").read_text())
    for item in items:
        item["video"] = str(job.data / item["video"])
    (path / f"{name}.json").write_text(json.dumps(items))
    return path / f"{name}.json"


def test_a_benchmarks_page_has_published_and_measured_figures(job, tmp_path: Path) -> None:
    split = as_benchmark(job, "dfew_test", tmp_path)
    arguments = ["eval", "--model", str(job.base), "--data", str(split), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--set", "rollout.max_new_tokens=4"])
    assert result.exit_code == 0, result.output
    markdown = (tmp_path / "out" / "eval.md").read_text()
    assert "## DFEW: published and measured (7 clips here, 2341 there)" in markdown
    assert "| R1-Omni | 65.83 | 56.27 |" in markdown
    assert "| measured, strict | 0.00 | 0.00 |" in markdown
    assert "| always " in markdown
    page = (tmp_path / "out" / "eval.html").read_text()
    assert page.count("<svg") == 2  # the confusion matrix and the lengths
    assert "| model | WAR | UAR | s.e. of WAR | s.e. of UAR |" in markdown
    assert "| R1-Omni | 65.83 | 56.27 | 0.98 |" in markdown
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_a_label_outside_the_benchmarks_set(job, tmp_path: Path) -> None:
    split = as_benchmark(job, "mafw_test", tmp_path)
    items = json.loads(split.read_text())
    items[3]["conversations"][1]["value"] = "bored"
    split.write_text(json.dumps(items))
    result = CliRunner().invoke(app, ["eval", "--model", "no-such-model", "--data", str(split)])
    assert isinstance(result.exception, ValueError)
    assert f"{split}, item 3: the label in conversations[1].value must be one of happy," in str(
        result.exception
    )
    assert "got 'bored'" in str(result.exception)


def test_the_benchmark_is_said_where_the_name_does_not_tell(job, tmp_path: Path) -> None:
    files = [as_benchmark(job, name, tmp_path) for name in ("one", "dfew_two")]
    arguments = ["eval", "--model", str(job.base), *(f"--data={path}" for path in files)]
    arguments += ["--output", str(tmp_path / "out"), "--set=rollout.max_new_tokens=1"]
    result = CliRunner().invoke(app, [*arguments, "--benchmark", "one=mafw", "--benchmark", "dfew_two=none"])
    assert result.exit_code == 0, result.output
    one, two = (json.loads((tmp_path / "out" / f"eval_{s}.json").read_text()) for s in ("one", "dfew_two"))
    assert (one["benchmark"], two["benchmark"]) == ("mafw", None)
    assert len(one["strict"]["labels"]) == 11
    assert "## MAFW: published" in (tmp_path / "out" / "eval.md").read_text()
    assert "## DFEW" not in (tmp_path / "out" / "eval.md").read_text()


@pytest.mark.parametrize(
    ("benchmark", "message"),
    [
        ("meld", "the benchmark of split 'one' must be one of dfew, mafw, ravdess, none, got 'meld'"),
        ("two=dfew", "a benchmark is given for the split 'two'; there are one"),
    ],
)
def test_benchmarks_that_are_not_there(job, tmp_path: Path, benchmark: str, message: str) -> None:
    split = as_benchmark(job, "one", tmp_path)
    arguments = ["eval", "--model", str(job.base), "--data", str(split), "--benchmark", benchmark]
    assert message in str(CliRunner().invoke(app, arguments).exception)
