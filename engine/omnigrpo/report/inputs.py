"""What the report reads from a run directory.

    RUN/metrics.jsonl               scalars of every step, see ``omnigrpo.metrics.Metric``
    RUN/rollouts.jsonl              some sampled groups, see ``omnigrpo.metrics.RolloutRecord``
    RUN/dropped.jsonl               prompts that left their step, see ``omnigrpo.metrics.DroppedRecord``
    RUN/config.toml or config.json  the resolved configuration
    RUN/evaluations/*.json          one ``EvaluationReport`` each, named ``<stage>_<split>.json``; stages are
                                    ``base``, ``cold_start``, ``grpo`` in this order, then any other
    RUN/summary.json                figures that the run itself reports

Any of them may be missing, but not all.
"""

import json
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

from omnigrpo.evaluate.evaluation_report import EvaluationReport
from omnigrpo.metrics import (
    DROPPED_FILE,
    EVALUATIONS_DIRECTORY,
    METRICS_FILE,
    ROLLOUTS_FILE,
    DroppedRecord,
    RolloutRecord,
    read_jsonl,
)

CONFIG_FILES = ("config.toml", "config.json")
SUMMARY_FILE = "summary.json"
BASE_STAGE = "base"
BEFORE_STAGE = "cold_start"
AFTER_STAGE = "grpo"
_STAGE_ORDER = (BASE_STAGE, BEFORE_STAGE, AFTER_STAGE)
_SPLIT_ORDER = ("heldout", "held_out", "ood")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunData:
    """Everything that is known of a run."""

    directory: Path
    metrics: tuple[dict, ...]
    """One record per step, by step."""
    rollouts: tuple[dict, ...]
    dropped: tuple[dict, ...]
    config: dict
    """The resolved configuration; empty when there is none."""
    summary: dict
    evaluations: tuple[EvaluationReport, ...]
    """By split, then by stage."""
    problems: tuple[str, ...]
    """Files that are there and cannot be read, and why."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the evaluated splits, held-out first."""
        return tuple(dict.fromkeys(report.split for report in self.evaluations))

    def evaluation(self, stage: str, split: str) -> EvaluationReport | None:
        """The report of one stage on one split."""
        found = (report for report in self.evaluations if (report.stage, report.split) == (stage, split))
        return next(found, None)

    def compared(self, split: str) -> tuple[EvaluationReport, ...]:
        """The one or two reports of a split to set side by side, the earlier stage first.

        Those of ``cold_start`` and ``grpo`` when both are there, else those of the first and the last stage.
        """
        before, after = self.evaluation(BEFORE_STAGE, split), self.evaluation(AFTER_STAGE, split)
        if before is not None and after is not None:
            return before, after
        reports = [report for report in self.evaluations if report.split == split]
        return (reports[0], reports[-1]) if len(reports) > 1 else tuple(reports)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one scalar; steps without the scalar are left out, null is NaN."""
        points = [
            (record["step"], float("nan") if record[name] is None else float(record[name]))
            for record in self.metrics
            if name in record
        ]
        return [step for step, _ in points], [value for _, value in points]

    def names(self) -> tuple[str, ...]:
        """Names of all scalars of the run, in the order in which they first occur."""
        names = dict.fromkeys(name for record in self.metrics for name in record)
        return tuple(name for name in names if name not in ("step", "non_finite"))


def load_run(directory: Path) -> RunData:
    """Read a run directory; raises ValueError when it is none."""
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is no directory; give the directory that a run has written (run.output)"
        )
    expected = (METRICS_FILE, *CONFIG_FILES, EVALUATIONS_DIRECTORY, SUMMARY_FILE)
    if not any((directory / name).exists() for name in expected):
        raise ValueError(
            f"{directory} is no run directory: it holds none of {', '.join(expected)}; "
            "give the directory that a run has written (run.output)"
        )
    problems: list[str] = []
    return RunData(
        directory=directory,
        metrics=_records(directory / METRICS_FILE, (), problems),
        rollouts=_records(directory / ROLLOUTS_FILE, _names(RolloutRecord), problems),
        dropped=_records(directory / DROPPED_FILE, _names(DroppedRecord), problems),
        config=_config(directory, problems),
        summary=_object(directory / SUMMARY_FILE, problems),
        evaluations=_evaluations(directory / EVALUATIONS_DIRECTORY, problems),
        problems=tuple(problems),
    )


def _lines(path: Path, problems: list[str]) -> list[dict]:
    try:
        return read_jsonl(path)
    except ValueError as error:
        problems.append(str(error))
        return []


def _names(kind: type[RolloutRecord | DroppedRecord]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _records(path: Path, wanted: tuple[str, ...], problems: list[str]) -> tuple[dict, ...]:
    """The lines that hold the step and every wanted field."""
    wanted = ("step", *wanted)
    complete: list[dict] = []
    for record in _lines(path, problems):
        lacking = [name for name in wanted if name not in record]
        if lacking:
            problems.append(
                f"{path.name}: a line of step {record.get('step', '?')} lacks {', '.join(lacking)}"
            )
        else:
            complete.append(record)
    return tuple(complete)


def _object(path: Path, problems: list[str]) -> dict:
    if not path.exists():
        return {}
    try:
        data = (tomllib if path.suffix == ".toml" else json).loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(data, dict):
        problems.append(f"{path.name} holds a {type(data).__name__}, not an object")
        return {}
    return data


def _config(directory: Path, problems: list[str]) -> dict:
    return next(
        (_object(directory / name, problems) for name in CONFIG_FILES if (directory / name).exists()), {}
    )


def _evaluations(directory: Path, problems: list[str]) -> tuple[EvaluationReport, ...]:
    reports: list[EvaluationReport] = []
    for path in sorted(directory.glob("*.json")):
        data = _object(path, problems)
        if data:
            try:
                reports.append(EvaluationReport.from_json(data))
            except ValueError as error:
                problems.append(f"{EVALUATIONS_DIRECTORY}/{path.name}: {error}")
    return tuple(
        sorted(
            reports, key=lambda report: (_rank(report.split, _SPLIT_ORDER), _rank(report.stage, _STAGE_ORDER))
        )
    )


def _rank(name: str, order: tuple[str, ...]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)
