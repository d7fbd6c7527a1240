"""The run around the steps: progress, metrics, checkpoints, resumption."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console

from omnigrpo.metrics import DROPPED_FILE, SECONDS_PREFIX, Metric, MetricsLog, training_progress
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.schema import StepReport
from omnigrpo.step_records import dropped_records, rollout_records


class Steps(Protocol):
    """A trainer as the loop sees it."""

    steps_done: int

    def step(self) -> StepReport:
        """Take one step."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopConfig:
    """How long a run is and what it leaves behind."""

    output: Path
    """Run directory: config.toml, metrics.jsonl, rollouts.jsonl, dropped.jsonl, checkpoints/."""
    steps: int = 100
    seed: int = 0
    save_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = 2
    """Checkpoints kept."""
    log_rollouts_every: int = 10
    """Steps between the groups written to rollouts.jsonl."""
    rollouts_logged: int = 2
    """Groups written each time."""
    threads: int | None = None
    """CPU threads of torch; None leaves torch's choice."""
    tensorboard: bool = False
    synchronize_cuda: bool = False
    """Wait for the device at both ends of every phase: true times, at the price of the overlap."""

    def __post_init__(self) -> None:
        """Reject intervals that never come."""
        for name in ("steps", "save_every", "keep_last", "log_rollouts_every", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"run.{name} must be at least 1, got {value}")


def run_steps(
    trainer: Steps,
    *,
    config: LoopConfig,
    log: MetricsLog,
    spans: SpanRecorder,
    save: Callable[[int], None],
    title: str,
) -> None:
    """Step until ``config.steps`` are done, logging each one and saving every ``save_every``.

    What ends the run early (a reward that raises, an interrupt) ends it after the finished steps were saved. Raises
    ValueError when not one prompt of the run could be used.
    """
    first = saved = trainer.steps_done
    samples, dropped = 0.0, []
    try:
        with training_progress(config.steps, first_step=first, title=title) as progress:
            while trainer.steps_done < config.steps:
                started = time.perf_counter()
                report = trainer.step()
                metrics = report.metrics | _timing(report, spans.drain(), time.perf_counter() - started)
                _log(log, report, metrics, config)
                progress.update(report.step, metrics)
                samples += report.metrics[Metric.SAMPLES]
                dropped += report.dropped
                if report.step % config.save_every == 0:
                    save(report.step)
                    saved = report.step
    finally:
        if trainer.steps_done > saved:
            save(trainer.steps_done)
    if dropped:
        message = (
            f"{len(dropped)} prompts were dropped, see {DROPPED_FILE}; the first because {dropped[0].error}"
        )
        if not samples:
            raise ValueError(f"{title} could not use a single clip: {message}")
        Console(stderr=True).print(f"{title}: {message}", highlight=False)


def _log(log: MetricsLog, report: StepReport, metrics: Mapping[str, float], config: LoopConfig) -> None:
    log.log(report.step, metrics)
    log.log_dropped(report.step, dropped_records(report))
    if report.step == 1 or report.step % config.log_rollouts_every == 0:
        log.log_rollouts(report.step, rollout_records(report, limit=config.rollouts_logged))


def _timing(report: StepReport, phase_seconds: Mapping[str, float], wall_seconds: float) -> dict[str, float]:
    phases = {f"{SECONDS_PREFIX}{name}": seconds for name, seconds in phase_seconds.items()}
    rate = report.metrics[Metric.SAMPLES] / wall_seconds
    return phases | {Metric.STEP_SECONDS: wall_seconds, Metric.SAMPLES_PER_SECOND: rate}
