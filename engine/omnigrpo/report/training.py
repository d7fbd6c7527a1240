"""Sections about the training itself: curves and time per phase."""

import math
from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from omnigrpo.metrics import REWARD_COMPONENT_PREFIX, SECONDS_PREFIX, Metric
from omnigrpo.report.charts import REST, Fill, Line, draw_curves, draw_phases, phase_fills
from omnigrpo.report.html import NOTHING, Markup, details, figure, missing, section, swatch, table
from omnigrpo.report.inputs import RunData
from omnigrpo.report.theme import VARIABLES, chart_style, svg, variable
from omnigrpo.runtime.spans import OVERLAPPED_PREFIX

ACCURACY = f"{REWARD_COMPONENT_PREFIX}accuracy"
_CHART_INCHES = (4.3, 2.5)
_WIDE_INCHES = (5.2, 4.7)
_NO_METRICS = "metrics.jsonl holds no step: nothing was trained here, or the run ended before its first step."


def curves_section(run: RunData) -> str:
    """Reward, accuracy, length, KL, entropy, log-prob difference and throughput over the steps."""
    if not run.metrics:
        return section("curves", "Training curves", missing(_NO_METRICS))
    charts = [_chart(run, *chart) for chart in _charts(run)]
    drawn = [chart for chart in charts if chart]
    absent = [title for (title, *_), chart in zip(_charts(run), charts, strict=True) if not chart]
    body = f'<div class="charts">{"".join(drawn)}</div>'
    if absent:
        body += missing("Not logged by this run: " + ", ".join(title.lower() for title in absent) + ".")
    shown = {name for _, names, _ in _charts(run) for name, _ in names}
    rest = [name for name in run.names() if name not in shown and not name.startswith(SECONDS_PREFIX)]
    others = "".join(_chart(run, name, ((name, name),), "") for name in rest)
    if others:
        body += details(f"{len(rest)} more metrics", f'<div class="charts">{others}</div>')
    return section("curves", "Training curves", body)


def time_section(run: RunData) -> str:
    """Seconds per phase, stacked over the steps, and their means."""
    names = [
        name.removeprefix(SECONDS_PREFIX)
        for name in run.names()
        if name.startswith(SECONDS_PREFIX) and name != Metric.STEP_SECONDS
    ]
    phases = [name for name in names if not name.startswith(OVERLAPPED_PREFIX)]
    if not phases:
        return section("time", "Time per phase", missing("The run logged no seconds per phase."))
    fills = phase_fills(VARIABLES)
    order = [name for name in fills if name in phases] + [name for name in phases if name not in fills]
    seconds = {name: _column(run, SECONDS_PREFIX + name) for name in order}
    rest = _rest(run, seconds)
    if rest is not None:
        seconds[REST] = rest
    fills |= {name: Fill(colour=VARIABLES.muted, opacity=0.7) for name in order if name not in fills}
    overlapped = {
        name: _column(run, SECONDS_PREFIX + name) for name in names if name.startswith(OVERLAPPED_PREFIX)
    }
    with chart_style(VARIABLES):
        chart = Figure(figsize=_WIDE_INCHES, layout="constrained")
        draw_phases(chart.subplots(), [record["step"] for record in run.metrics], seconds, fills)
        picture = svg(chart, name="time", title="Seconds per step by phase")
    body = figure("Wall time of a step, by phase", picture) + _time_table(seconds, overlapped, fills)
    note = "Phases are exclusive: nested time counts once. What ran beside the step is listed apart."
    return section("time", "Time per phase", f'<div class="wide">{body}</div>', note)


def _charts(run: RunData) -> list[tuple[str, tuple[tuple[str, str], ...], str]]:
    """Title, (metric, label) pairs and unit of each chart."""
    components = [name for name in run.names() if name.startswith(REWARD_COMPONENT_PREFIX)]
    named = [(name, name.removeprefix(REWARD_COMPONENT_PREFIX)) for name in components]
    return [
        ("Reward", ((Metric.REWARD, "total"), *named), "mean reward"),
        ("Accuracy of the rollouts", ((ACCURACY, "accuracy"),), "%"),
        ("Completion length", ((Metric.LENGTH, "length"),), "tokens"),
        ("KL to the reference", ((Metric.KL, "KL"),), "nats per token"),
        ("Entropy", ((Metric.ENTROPY, "entropy"),), "nats per token"),
        (
            "Log-prob difference, training and rollout",
            (
                (Metric.LOGPROB_DIFFERENCE, "mean"),
                (Metric.LOGPROB_DIFFERENCE_P99, "99th percentile"),
                (Metric.LOGPROB_DIFFERENCE_MAX, "largest"),
            ),
            "nats, absolute",
        ),
        ("Throughput", ((Metric.SAMPLES_PER_SECOND, "samples/s"),), "samples per second"),
        ("Groups of equal rewards (no signal)", ((Metric.EQUAL_GROUPS, "groups"),), "%"),
        ("Gradient norm before clipping", ((Metric.GRAD_NORM, "norm"),), "norm"),
    ]


def _chart(run: RunData, title: str, metrics: Sequence[tuple[str, str]], unit: str) -> str:
    """One figure; empty when none of the metrics has a finite value."""
    lines = []
    for index, (name, label) in enumerate(metrics):
        steps, values = run.series(name)
        if unit == "%":
            values = [100 * value for value in values]
        if any(math.isfinite(value) for value in values):
            lines.append(Line(label=label, steps=steps, values=values, colour=VARIABLES.series(index)))
    if not lines:
        return ""
    log = metrics[0][0] == Metric.LOGPROB_DIFFERENCE and all(
        value > 0 for line in lines for value in line.values
    )
    with chart_style(VARIABLES):
        chart = Figure(figsize=_CHART_INCHES, layout="constrained")
        axes = chart.subplots()
        draw_curves(axes, lines, unit=unit, log=log)
        if unit == "%":
            axes.set_ylim(0, 102)
        elif metrics[0][0] == Metric.SAMPLES_PER_SECOND:
            axes.set_ylim(bottom=0)
        picture = svg(chart, name=f"curve-{title}", title=title)
    legend = [(line.label, f"background:{variable(line.colour)}") for line in lines] if len(lines) > 1 else []
    return figure(title, picture, legend)


def _column(run: RunData, name: str) -> list[float]:
    """One value per step; 0 where the step did not log it."""
    return [float(record.get(name) or 0.0) for record in run.metrics]


def _rest(run: RunData, seconds: dict[str, list[float]]) -> list[float] | None:
    """What is left of each step's wall time; None when the run did not log it."""
    if Metric.STEP_SECONDS not in run.names():
        return None
    walls = _column(run, Metric.STEP_SECONDS)
    return [max(0.0, wall - sum(parts)) for wall, *parts in zip(walls, *seconds.values(), strict=True)]


def _time_table(
    seconds: dict[str, list[float]], overlapped: dict[str, list[float]], fills: dict[str, Fill]
) -> str:
    means = {name: sum(values) / len(values) for name, values in seconds.items()}
    total = sum(means.values())
    rows: list[tuple[str | Markup, str, str]] = [
        (_named(name, fills[name]), f"{mean:.3f}", f"{100 * mean / total:.1f}" if total else NOTHING)
        for name, mean in means.items()
    ]
    rows.append((Markup("<b>step</b>"), f"{total:.3f}", "100.0"))
    rows += [
        (
            f"{name.removeprefix(OVERLAPPED_PREFIX)}, in the background",
            f"{sum(values) / len(values):.3f}",
            NOTHING,
        )
        for name, values in overlapped.items()
    ]
    return table(("phase", "mean, s", "share, %"), rows)


def _named(name: str, fill: Fill) -> Markup:
    css = f"background:{variable(fill.colour)};opacity:{fill.opacity}"
    return Markup(swatch(css) + escape(name.replace("_", " ")))
