import builtins
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from omnigrpo.metrics import (
    DROPPED_FILE,
    METRICS_FILE,
    ROLLOUTS_FILE,
    DroppedRecord,
    Metric,
    MetricsLog,
    RolloutRecord,
    describe,
    read_jsonl,
    read_metrics,
    training_progress,
)


def rollout(prompt_id: str = "clip-1") -> RolloutRecord:
    return RolloutRecord(
        prompt_id=prompt_id,
        clip="clips/1.mp4",
        start_seconds=None,
        end_seconds=None,
        question="Which emotion?",
        solution="happy",
        texts=("<answer>happy</answer>", "<answer>sad</answer>"),
        totals=(1.0, 0.0),
        components={"accuracy": (1.0, 0.0)},
    )


def steps_in(directory: Path, name: str = METRICS_FILE) -> list[int]:
    return [record["step"] for record in read_jsonl(directory / name)]


def test_each_step_is_one_flushed_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run")
    log.log(1, {Metric.REWARD: torch.tensor(0.5).item(), "seconds/forward": 2})
    assert read_metrics(tmp_path / "run") == [{"step": 1, "reward/mean": 0.5, "seconds/forward": 2.0}]
    log.log(2, {Metric.REWARD: 0.75})
    assert [record["reward/mean"] for record in read_metrics(tmp_path / "run" / METRICS_FILE)] == [0.5, 0.75]
    log.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_become_null_and_are_named(tmp_path: Path, value: float) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {"loss": value, "kl/mean": 0.0})
    line = (tmp_path / METRICS_FILE).read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1, "loss": None, "kl/mean": 0.0, "non_finite": ["loss"],
    }  # fmt: skip


def test_reading_leaves_a_torn_last_line_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_bytes(b'{"step": 1}\n{"step": 2, "text": "\xc3')
    assert read_metrics(path) == [{"step": 1}]


def test_a_broken_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not JSON"):
        read_metrics(path)


def test_a_missing_file_holds_nothing(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / METRICS_FILE) == []


def test_opening_removes_the_torn_line_before_appending(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1}\n{"step": 2, "lo')
    with MetricsLog(tmp_path) as log:
        log.log(2, {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_resuming_lists_no_step_twice(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"loss": float(step)})
            log.log_rollouts(step, [rollout()])
            log.log_dropped(step, [DroppedRecord(prompt_id="p", status="missing", error="no such file")])
    with MetricsLog(tmp_path) as log:
        log.truncate_after(3)
        log.log(4, {"loss": 40.0})
        log.log_rollouts(4, [rollout("again")])
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 40.0]
    assert steps_in(tmp_path, ROLLOUTS_FILE) == [1, 2, 3, 4]
    assert read_jsonl(tmp_path / ROLLOUTS_FILE)[-1]["prompt_id"] == "again"
    assert steps_in(tmp_path, DROPPED_FILE) == [1, 2, 3]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_step_that_is_there_already_is_refused(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(5, {})
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match="already holds step 5, got step 5"):
        log.log(5, {})


def test_truncating_to_nothing_starts_over(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log(1, {})
        log.truncate_after(0)
        log.log(1, {"loss": 2.0})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_rollouts_keep_their_texts_and_rewards(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.log_rollouts(7, [rollout()])
    (record,) = read_jsonl(tmp_path / ROLLOUTS_FILE)
    assert record["step"] == 7
    assert record["texts"] == ["<answer>happy</answer>", "<answer>sad</answer>"]
    assert record["totals"] == [1.0, 0.0]
    assert record["components"] == {"accuracy": [1.0, 0.0]}


def test_tensorboard_gets_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.log(1, {"loss": 0.5})
        log.log(2, {"loss": 0.25})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_tensorboard_that_is_not_installed_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_tensorboard(name: str, *args: Any, **kwargs: Any) -> object:
        if name == "torch.utils.tensorboard":
            raise ImportError("No module named 'tensorboard'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        MetricsLog(tmp_path, tensorboard=True)


def test_the_description_shows_what_is_there() -> None:
    metrics = {Metric.REWARD: 1.25, Metric.KL: 0.0031, Metric.LENGTH: 42.0, Metric.LOSS: 0.1, "other": 3.0}
    assert describe(metrics) == "reward 1.250  KL 0.0031  length 42.0"
    assert describe({"loss": 0.5, "samples_per_second": 12.0}) == "loss 0.5000  12.00 samples/s"


def test_the_description_shows_dropped_prompts_only_when_there_are_some() -> None:
    assert describe({Metric.REWARD: 1.25, Metric.DROPPED: 3.0}) == "reward 1.250  3 dropped"
    assert describe({Metric.REWARD: 1.25, Metric.DROPPED: 0.0}) == "reward 1.250"


def test_without_a_terminal_every_nth_step_is_a_line() -> None:
    output = io.StringIO()
    seconds = iter(range(0, 1000, 10))
    with training_progress(
        25, lines_every=10, console=Console(file=output, width=40), clock=lambda: float(next(seconds))
    ) as progress:
        for step in range(1, 26):
            progress.update(
                step, {Metric.REWARD: step / 10, Metric.KL: 0.5, Metric.LENGTH: 30, "samples_per_second": 9}
            )
    lines = output.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25"]
    assert lines[0] == "train 1/25  reward 0.100  KL 0.5000  length 30.0  9.00 samples/s  ETA 0:04:00"
    assert lines[-1].endswith("ETA 0:00:00")


def test_a_resumed_run_counts_its_own_steps_for_the_eta() -> None:
    output = io.StringIO()
    seconds = iter((0.0, 5.0))
    with training_progress(
        12, first_step=9, console=Console(file=output), clock=lambda: next(seconds)
    ) as progress:
        progress.update(10, {})
    assert output.getvalue() == "train 10/12  ETA 0:00:10\n"


def test_in_a_terminal_there_is_a_bar() -> None:
    output = io.StringIO()
    with training_progress(4, console=Console(file=output, force_terminal=True, width=120)) as progress:
        progress.update(4, {Metric.REWARD: 1.5})
    assert "4/4" in output.getvalue()
    assert "reward 1.500" in output.getvalue()
