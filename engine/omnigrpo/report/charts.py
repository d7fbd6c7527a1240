"""Charts on matplotlib axes, with colours from a palette."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from omnigrpo.evaluate.emotion_metrics import OTHER, EmotionMetrics
from omnigrpo.report.theme import Palette
from omnigrpo.runtime.spans import Phase

_MAX_POINTS = 400
_MAX_BINS = 120
_LENGTH_BINS = 40
_SMOOTHED_FROM = 24
"""Points from which a line is drawn faintly with its running mean on top."""

REST = "rest"
"""What the step took beyond its phases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One curve."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fill:
    """How one phase is painted."""

    colour: str
    opacity: float


def draw_curves(axes: Axes, lines: Sequence[Line], *, unit: str, log: bool = False) -> None:
    """Draw curves over the step; long ones faintly, under their running mean."""
    for line in lines:
        steps, values = binned(line.steps, line.values, _MAX_POINTS)
        smooth = len(steps) >= _SMOOTHED_FROM
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps,
            values,
            color=line.colour,
            alpha=0.28 if smooth else 1.0,
            lw=0.9 if smooth else 1.6,
            marker=marker,
        )
        if smooth:
            axes.plot(steps, running_mean(values, max(3, len(steps) // 15)), color=line.colour)
    if log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)


def draw_phases(
    axes: Axes, steps: Sequence[int], seconds: Mapping[str, Sequence[float]], fills: Mapping[str, Fill]
) -> None:
    """Stack the seconds of each phase over the step."""
    lower: np.ndarray | None = None
    for phase, values in seconds.items():
        bin_steps, binned_values = binned(steps, values, _MAX_BINS)
        edges = _edges(bin_steps)
        upper = np.nan_to_num(binned_values) + (0 if lower is None else lower)
        base = np.zeros_like(upper) if lower is None else lower
        fill = fills[phase]
        axes.fill_between(
            edges, np.append(base, base[-1]), np.append(upper, upper[-1]), step="post", lw=0,
            color=to_rgba(fill.colour, fill.opacity),
        )  # fmt: skip
        lower = upper
    axes.set_xlabel("step")
    axes.set_ylabel("seconds per step")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_confusion(axes: Axes, metrics: EmotionMetrics, palette: Palette) -> None:
    """Draw counts by gold label (row) and answer (column), shaded by their share of the row."""
    columns = (*metrics.labels, OTHER)
    for row, counts in enumerate(metrics.confusion):
        total = sum(counts)
        for column, count in enumerate(counts):
            share = count / total if total else 0.0
            axes.add_patch(Rectangle((column, row), 0.94, 0.94, lw=0, facecolor=palette.line, alpha=0.35))
            axes.add_patch(
                Rectangle((column, row), 0.94, 0.94, lw=0, facecolor=palette.blue, alpha=share**0.8)
            )
            if count:
                colour = palette.on_blue if share > 0.5 else palette.ink
                axes.text(
                    column + 0.47, row + 0.47, str(count), ha="center", va="center", color=colour, fontsize=8
                )
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(metrics.labels), 0)
    axes.set_xticks(np.arange(len(columns)) + 0.47, columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(metrics.labels)) + 0.47, metrics.labels)
    axes.set_xlabel("answer")
    axes.set_ylabel("gold label")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_aspect("equal")


def draw_recalls(
    axes: Axes, before: Mapping[str, float], after: Mapping[str, float], palette: Palette
) -> None:
    """One row per class: recall before (hollow) and after (full)."""
    labels = list(dict.fromkeys((*before, *after)))
    for row, label in enumerate(labels):
        ends = [100 * recalls[label] for recalls in (before, after) if label in recalls]
        axes.plot((min(ends), max(ends)), (row, row), color=palette.muted, lw=1.2, zorder=1)
        if label in before:
            axes.plot(
                100 * before[label], row, "o", ms=6, mfc=palette.panel, mec=palette.orange, mew=1.6, zorder=2
            )
        if label in after:
            axes.plot(100 * after[label], row, "o", ms=7, color=palette.blue, mew=0, zorder=3)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(-3, 103)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("recall, %")
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)


def draw_lengths(axes: Axes, lengths: Sequence[int], palette: Palette) -> None:
    """Draw how many completions are how long, in tokens, and where their median lies."""
    width = max(1, -(-(max(lengths) + 1) // _LENGTH_BINS))
    edges = np.arange(-0.5, max(lengths) + width + 0.5, width)  # A bin of one length is centred on it.
    axes.hist(lengths, bins=edges.tolist(), color=palette.blue, rwidth=0.92)
    median = float(np.median(lengths))
    is_right = median > edges[-1] / 2
    axes.axvline(median, color=palette.orange, lw=1.4)
    axes.text(
        median,
        1.0,
        f"median {median:g}",
        transform=axes.get_xaxis_transform(),
        color=palette.orange,
        ha="right" if is_right else "left",
        va="bottom",
    )
    axes.set_xlabel("tokens")
    axes.set_ylabel("completions")
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(visible=False, axis="x")


def phase_fills(palette: Palette) -> dict[str, Fill]:
    """Colours of the phases: media green, rollout blue, reward to reference purple, update orange, rose."""
    colours = {
        Phase.MEDIA_WAIT: (palette.green, 0.3),
        Phase.DECODE: (palette.green, 1.0),
        Phase.ENCODE: (palette.green, 0.55),
        Phase.PREFILL: (palette.blue, 1.0),
        Phase.DECODE_TOKENS: (palette.blue, 0.6),
        Phase.REWARD: (palette.purple, 1.0),
        Phase.PACK: (palette.purple, 0.7),
        Phase.REFERENCE: (palette.purple, 0.4),
        Phase.FORWARD: (palette.orange, 1.0),
        Phase.HEAD: (palette.orange, 0.75),
        Phase.BACKWARD: (palette.orange, 0.5),
        Phase.OPTIMIZER: (palette.rose, 1.0),
        Phase.PUBLISH: (palette.rose, 0.55),
    }
    named = {str(phase): Fill(colour=colour, opacity=opacity) for phase, (colour, opacity) in colours.items()}
    return named | {REST: Fill(colour=palette.muted, opacity=0.4)}


def binned(steps: Sequence[int], values: Sequence[float], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most ``limit`` points: means over neighbouring steps, NaN left out where others are there."""
    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    if len(x) <= limit:
        return x, y
    bounds = np.linspace(0, len(x), limit + 1).astype(int)
    runs = list(pairwise(bounds))
    return (
        np.array([x[first:last].mean() for first, last in runs]),
        np.array([_mean_of_finite(y[first:last]) for first, last in runs]),
    )


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over a centred window that is cut off at both ends; NaN left out where others are there."""
    half = width // 2
    return np.array([_mean_of_finite(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _mean_of_finite(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _edges(steps: np.ndarray) -> np.ndarray:
    """Bounds of a bar around each step."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[:-1] + steps[1:]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
