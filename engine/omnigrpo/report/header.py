"""Head of the page: what was run and where it ended."""

import json
from collections.abc import Iterator
from html import escape

from omnigrpo.metrics import Metric
from omnigrpo.report.html import details, missing, percent
from omnigrpo.report.inputs import RunData
from omnigrpo.report.results import split_name

_LAST_STEPS = 10
_SHOWN_KEYS = (
    "model.path", "data.train", "run.steps", "run.seed", "trainer.prompts_per_step", "rollout.samples",
    "rollout.temperature", "rollout.max_new_tokens", "optimizer.learning_rate", "objective.kl_coefficient",
    "objective.loss", "reward.terms",
)  # fmt: skip


def header(run: RunData) -> str:
    """Title, final figures, the configuration in short and in full."""
    tiles = "".join(
        f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in _figures(run)
    )
    problems = "".join(f'<p class="problem">{escape(problem)}</p>' for problem in run.problems)
    return (
        f'<header id="header"><h1>{escape(run.directory.resolve().name)}</h1>'
        f'<p class="sub">{_steps(run)}</p>{problems}'
        f'<div class="tiles">{tiles}</div>{_configuration(run)}{_summary(run)}</header>'
    )


def _steps(run: RunData) -> str:
    if not run.metrics:
        return "no training steps"
    training = "GRPO" if Metric.REWARD in run.names() else "supervised training"
    return f"{run.metrics[-1]['step']} steps of {training}"


def _figures(run: RunData) -> Iterator[tuple[str, str]]:
    """Value and label of each tile, as HTML."""
    for split in run.splits:
        *before, after = run.compared(split)
        from_text = f", from {percent(before[0].alias.war)}" if before else ""
        yield f"{percent(after.alias.war)} %", f"accuracy, {escape(split_name(split))}{from_text}"
    for name, label, form in (
        (Metric.REWARD, "reward", "{:.2f}"),
        (Metric.SAMPLES_PER_SECOND, "samples per second", "{:.1f}"),
        (Metric.LENGTH, "tokens per completion", "{:.0f}"),
        (Metric.STEP_SECONDS, "seconds per step", "{:.2f}"),
    ):
        values = [value for value in run.series(name)[1][-_LAST_STEPS:] if value == value]
        if values:
            yield form.format(sum(values) / len(values)), f"{label}, last {len(values)} steps"
    seconds = [value for value in run.series(Metric.STEP_SECONDS)[1] if value == value]
    if seconds:
        yield _duration(sum(seconds)), "in training steps"


def _configuration(run: RunData) -> str:
    if not run.config:
        return missing("No config.toml or config.json: the page cannot say how the run was configured.")
    flat = dict(_flatten(run.config))
    shown = [(key, flat[key]) for key in _SHOWN_KEYS if key in flat]
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in shown)
    every = "\n".join(f"{key} = {value}" for key, value in flat.items())
    return (f"<dl>{rows}</dl>" if rows else "") + details(
        "whole configuration", f"<pre>{escape(every)}</pre>"
    )


def _summary(run: RunData) -> str:
    if not run.summary:
        return ""
    return details(
        "summary.json", f"<pre>{escape(json.dumps(run.summary, indent=2, ensure_ascii=False))}</pre>"
    )


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _shown(value)


def _shown(value: object) -> str:
    """A value in one line; a list of tables as pieces like ``name accuracy, weight 1.0``."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "; ".join(", ".join(f"{key} {item}" for key, item in entry.items()) for entry in value)
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02} h" if hours else f"{minutes}:{rest:02} min"
