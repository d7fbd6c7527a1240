"""One picture of a run, for a README: training curve, confusion before and after, frames of clips."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from omnigrpo.metrics import EVALUATIONS_DIRECTORY, METRICS_FILE, Metric
from omnigrpo.report.charts import Line, draw_confusion, draw_curves
from omnigrpo.report.html import percent
from omnigrpo.report.inputs import AFTER_STAGE, BEFORE_STAGE, RunData, load_run
from omnigrpo.report.results import split_name, stage_name
from omnigrpo.report.theme import LIGHT, chart_style
from omnigrpo.report.thumbnails import clip_frames, clip_of
from omnigrpo.report.training import ACCURACY

_NUM_CLIPS = 8


def summary_picture(run_dir: Path, path: Path) -> None:
    """Write a PNG of the run to ``path``.

    Raises ValueError when the run has no metrics, no evaluations to compare, or no clip that can be read.
    """
    run = load_run(run_dir)
    if not run.metrics:
        raise ValueError(f"{run_dir / METRICS_FILE} holds no step: train first")
    split = _split(run)
    with chart_style(LIGHT, {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlepad": 8}):
        figure = Figure(figsize=(13, 5.9), layout="constrained", facecolor=LIGHT.panel)
        top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(4.4, 1.5))[:, 0]
        curve, before, after = top.subplots(1, 3, width_ratios=(1.15, 1, 1))
        _draw_training(curve, run)
        for axes, stage in ((before, BEFORE_STAGE), (after, AFTER_STAGE)):
            _draw_evaluation(axes, run, stage, split)
        after.set_ylabel("")
        _draw_strip(bottom, run)
        figure.savefig(path, dpi=130)


def _split(run: RunData) -> str:
    for split in run.splits:
        if run.evaluation(BEFORE_STAGE, split) and run.evaluation(AFTER_STAGE, split):
            return split
    raise ValueError(
        f"{run.directory / EVALUATIONS_DIRECTORY} holds no split that was evaluated both as {BEFORE_STAGE} "
        f"and {AFTER_STAGE}; evaluate the model before and after training"
    )


def _draw_training(axes: Axes, run: RunData) -> None:
    steps, rewards = run.series(Metric.REWARD)
    accuracy_steps, accuracies = run.series(ACCURACY)
    lines = [Line(label="reward", steps=steps, values=rewards, colour=LIGHT.blue)]
    if accuracies:
        lines.append(Line(label="accuracy", steps=accuracy_steps, values=accuracies, colour=LIGHT.orange))
    draw_curves(axes, lines, unit="mean over the step's rollouts")
    axes.set_title("GRPO: reward and accuracy" if accuracies else "GRPO: reward", loc="left")
    axes.set_ylim(bottom=0)
    axes.set_box_aspect(0.8)
    for line in lines:
        axes.plot([], [], color=line.colour, label=line.label)
    axes.legend(frameon=False, loc="lower right")


def _draw_evaluation(axes: Axes, run: RunData, stage: str, split: str) -> None:
    report = run.evaluation(stage, split)
    assert report is not None
    draw_confusion(axes, report.alias, LIGHT)
    when = "Before" if stage == BEFORE_STAGE else "After"
    axes.set_title(
        f"{when} ({stage_name(stage)}): {percent(report.alias.war)} %, {split_name(split)}", loc="left"
    )


def _draw_strip(figure: SubFigure, run: RunData) -> None:
    """One frame per clip, one clip per label while there are new labels."""
    records = sorted(run.rollouts, key=lambda record: record["step"])
    by_label = {record["solution"]: record for record in records}
    by_clip = {record["clip"]: record for record in (*by_label.values(), *reversed(records))}
    chosen = list(by_clip.values())[:_NUM_CLIPS]
    frames = clip_frames([clip_of(record, run.directory) for record in chosen], num_frames=1)
    readable = [(record, clip) for record, clip in zip(chosen, frames, strict=True) if clip.images]
    if not readable:
        reason = frames[0].error if frames else "rollouts.jsonl holds no group"
        raise ValueError(f"no clip of {run.directory} can be shown: {reason}")
    all_axes = figure.subplots(1, len(readable), squeeze=False)[0]
    for axes, (record, clip) in zip(all_axes, readable, strict=True):
        axes.imshow(np.asarray(clip.images[0]))
        axes.set_axis_off()
        axes.set_title(record["solution"], fontsize=9, fontweight="normal", color=LIGHT.muted, pad=4)
