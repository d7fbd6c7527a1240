"""run_steps: what is logged and saved, in which order, and what an interruption leaves."""

from dataclasses import replace
from pathlib import Path

import pytest

from omnigrpo.loop import LoopConfig, run_steps
from omnigrpo.metrics import Metric, MetricsLog, read_jsonl, read_metrics
from omnigrpo.runtime.spans import Phase, SpanRecorder
from omnigrpo.schema import ClipStatus, DroppedPrompt, StepReport
from omnigrpo.step_records import dropped_records, rollout_records


class Steps:
    """A trainer that only counts: four groups and a dropped prompt a step; it raises at ``breaks_at``."""

    def __init__(
        self, builders, spans: SpanRecorder, *, breaks_at: int = 0, error: type = ValueError
    ) -> None:
        self.steps_done = 0
        self._builders = builders
        self._spans = spans
        self._breaks_at = breaks_at
        self._error = error

    def step(self) -> StepReport:
        if self.steps_done + 1 == self._breaks_at:
            raise self._error("broken")
        with self._spans.span(Phase.FORWARD):
            self.steps_done += 1
        return report(self._builders, self.steps_done)


def report(builders, step: int) -> StepReport:
    groups = [builders.group(builders.inputs(name, modalities=("audio",)), [1, 2]) for name in "abcd"]
    groups = [replace(group, texts=(f"{step}", f"{step}!")) for group in groups]
    return StepReport(
        step=step,
        metrics={Metric.SAMPLES: 8.0, Metric.LOSS: 1 / step},
        groups=groups,
        rewards=[builders.rewards(float(at), 0.0) for at in range(4)],
        dropped=(DroppedPrompt(prompt_id="x", status=ClipStatus.CORRUPT, error="x.mp4 is corrupt"),),
    )


class Run:
    """One run in a directory, with its saves and how many steps each one found logged."""

    def __init__(
        self,
        builders,
        directory: Path,
        *,
        steps: int,
        save_every: int = 100,
        log_rollouts_every: int = 10,
        rollouts_logged: int = 2,
    ) -> None:
        self.directory = directory
        self.spans = SpanRecorder()
        self.builders = builders
        self.config = LoopConfig(
            output=directory,
            steps=steps,
            save_every=save_every,
            log_rollouts_every=log_rollouts_every,
            rollouts_logged=rollouts_logged,
        )
        self.saved: list[int] = []
        self.logged_at_save: list[int] = []

    def save(self, step: int) -> None:
        self.saved.append(step)
        self.logged_at_save.append(len(read_metrics(self.directory)))

    def go(self, *, start: int = 0, breaks_at: int = 0, error: type = ValueError) -> None:
        trainer = Steps(self.builders, self.spans, breaks_at=breaks_at, error=error)
        trainer.steps_done = start
        with MetricsLog(self.directory) as log:
            run_steps(trainer, config=self.config, log=log, spans=self.spans, save=self.save, title="test")


@pytest.mark.parametrize(
    ("steps", "every", "saved"),
    [(7, 3, [3, 6, 7]), (6, 3, [3, 6]), (2, 100, [2]), (3, 1, [1, 2, 3])],
    ids=["last is saved too", "last saved once", "only the last", "each"],
)
def test_every_kth_and_the_last_step_are_saved(builders, tmp_path, steps, every, saved):
    run = Run(builders, tmp_path, steps=steps, save_every=every)
    run.go()
    assert run.saved == saved


def test_a_step_is_logged_before_it_is_saved(builders, tmp_path):
    run = Run(builders, tmp_path, steps=5, save_every=2)
    run.go()
    assert run.logged_at_save == run.saved == [2, 4, 5]


def test_each_step_has_its_scalars_and_seconds(builders, tmp_path):
    Run(builders, tmp_path, steps=3).go()
    steps = read_metrics(tmp_path)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert [step[Metric.LOSS] for step in steps] == [1, 1 / 2, 1 / 3]
    for step in steps:
        assert 0 < step["seconds/forward"] <= step[Metric.STEP_SECONDS]
        assert step[Metric.SAMPLES_PER_SECOND] == pytest.approx(8 / step[Metric.STEP_SECONDS])


@pytest.mark.parametrize(("start", "logged"), [(0, [1, 3, 6]), (4, [6])], ids=["fresh", "resumed"])
def test_rollouts_are_logged_at_the_first_step_and_every_kth(builders, tmp_path, start, logged):
    Run(builders, tmp_path, steps=7, log_rollouts_every=3, rollouts_logged=2).go(start=start)
    records = read_jsonl(tmp_path / "rollouts.jsonl")
    assert [record["step"] for record in records] == [step for step in logged for _ in range(2)]
    assert [record["texts"][1] for record in records] == [f"{step}!" for step in logged for _ in range(2)]
    dropped = read_jsonl(tmp_path / "dropped.jsonl")
    assert [(record["step"], record["prompt_id"]) for record in dropped] == [
        (step, "x") for step in range(start + 1, 8)
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, FloatingPointError])
def test_an_interruption_saves_what_is_done_and_goes_on_up(builders, tmp_path, error):
    run = Run(builders, tmp_path, steps=9, save_every=3)
    with pytest.raises(error, match="broken"):
        run.go(breaks_at=6, error=error)
    assert run.saved == [3, 5]
    assert [step["step"] for step in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("start", "breaks_at", "saved"), [(0, 1, []), (4, 5, []), (0, 4, [3])])
def test_an_interruption_saves_nothing_twice(builders, tmp_path, start, breaks_at, saved):
    run = Run(builders, tmp_path, steps=9, save_every=3)
    with pytest.raises(ValueError, match="broken"):
        run.go(start=start, breaks_at=breaks_at)
    assert run.saved == saved


def test_a_run_without_a_single_usable_clip_is_an_error(builders, tmp_path, monkeypatch):
    run = Run(builders, tmp_path, steps=2)
    empty = report(builders, 1)
    empty = replace(empty, groups=(), rewards=(), metrics={Metric.SAMPLES: 0.0})
    monkeypatch.setitem(globals(), "report", lambda builders, step: replace(empty, step=step))
    with pytest.raises(ValueError, match=r"x\.mp4 is corrupt"):
        run.go()
    assert len(read_metrics(tmp_path)) == 2


def test_a_finished_run_takes_no_step(builders, tmp_path):
    run = Run(builders, tmp_path, steps=4)
    run.go(start=4)
    assert run.saved == []
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    ("limit", "chosen"),
    [(0, []), (1, ["a"]), (2, ["a", "c"]), (4, ["a", "b", "c", "d"]), (9, ["a", "b", "c", "d"])],
)
def test_logged_groups_are_spread_over_the_step(builders, limit, chosen):
    records = rollout_records(report(builders, 1), limit=limit)
    assert [record.prompt_id for record in records] == chosen


def test_a_rollout_record_holds_its_own_groups_rewards(builders):
    second = rollout_records(report(builders, 1), limit=4)[1]
    assert (second.prompt_id, second.totals, second.texts) == ("b", (1.0, 0.0), ("1", "1!"))
    assert (second.clip, second.question, second.solution) == ("b.mp4", "?", "happy")


def test_no_groups_give_no_records(builders):
    assert rollout_records(StepReport(step=1, metrics={}), limit=2) == []


def test_dropped_records_name_prompt_status_and_reason(builders):
    (record,) = dropped_records(report(builders, 1))
    assert (record.prompt_id, record.status, record.error) == ("x", "corrupt", "x.mp4 is corrupt")
