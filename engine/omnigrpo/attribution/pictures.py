"""The figures of a data set as pictures: values, attention by layer, and every clip's Shapley values."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from omnigrpo.attribution.clip_attribution import ClipAttribution, Value
from omnigrpo.attribution.shapley import Coalition
from omnigrpo.attribution.summary import AttentionSummary, DatasetAttribution, Mean, ValueSummary
from omnigrpo.report.theme import LIGHT, chart_style

VALUES_PICTURE = "values.png"
ATTENTION_PICTURE = "attention.png"
SHAPLEY_PICTURE = "shapley.png"

_SETTINGS = {"axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlepad": 8}
_DPI = 140
_COLOURS = {"video": LIGHT.blue, "audio": LIGHT.orange, "text": LIGHT.muted, "completion": LIGHT.green}
_COALITION_COLOURS = {
    Coalition.NEITHER: LIGHT.muted,
    Coalition.VIDEO: LIGHT.blue,
    Coalition.AUDIO: LIGHT.orange,
    Coalition.BOTH: LIGHT.green,
}
_LOGPROBS = {
    Value.GOLD: "gold answer\n(reasoning redone)",
    Value.GOLD_FIXED: "gold answer\n(reasoning held)",
    Value.OWN_FIXED: "own answer\n(reasoning held)",
}


def draw_values(summary: DatasetAttribution, path: Path, *, unfounded_below: float) -> None:
    """Accuracy by coalition, Shapley values of answers and by label, and claims; error bars are standard errors."""
    with chart_style(LIGHT, _SETTINGS):
        figure = Figure(figsize=(11, 7.4), layout="constrained", facecolor=LIGHT.panel)
        (accuracy, answers), (claims, labels) = figure.subplots(2, 2, width_ratios=(0.8, 1.2))
        _draw_accuracy(accuracy, summary.values[Value.ACCURACY])
        named = {
            words: summary.values[value] for value, words in _LOGPROBS.items() if value in summary.values
        }
        _draw_shapley(answers, named, title="Shapley values, log-probs")
        _draw_shapley(labels, summary.by_label, title="Shapley values by label, gold answer")
        _draw_claims(claims, summary, unfounded_below)
        figure.legend(
            *answers.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2
        )
        figure.savefig(path, dpi=_DPI)


def draw_attention(summary: DatasetAttribution, path: Path) -> None:
    """Attention mass by layer from reasoning and answer tokens; dotted: the share of the visible rows."""
    with chart_style(LIGHT, _SETTINGS):
        figure = Figure(figsize=(11, 3.9), layout="constrained", facecolor=LIGHT.panel)
        all_axes = figure.subplots(1, max(len(summary.attention), 1), sharey=True, squeeze=False)[0]
        for axes, (name, each) in zip(all_axes, summary.attention.items(), strict=False):
            _draw_layers(axes, each)
            axes.set_title(f"Attention from {name} tokens", loc="left")
        all_axes[0].set_ylabel("attention mass, mean over heads")
        if summary.attention:
            figure.legend(
                *all_axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5
            )
        figure.savefig(path, dpi=_DPI)


def draw_clips(clips: Sequence[ClipAttribution], path: Path) -> None:
    """Every clip's Shapley values of the gold answer, video across and audio up."""
    with chart_style(LIGHT, _SETTINGS):
        figure = Figure(figsize=(5.6, 5.2), layout="constrained", facecolor=LIGHT.panel)
        axes = figure.subplots()
        for is_right, words in ((True, "answered right"), (False, "answered wrong")):
            points = [
                clip.shapley[Value.GOLD]
                for clip in clips
                if clip.is_right == is_right and Value.GOLD in clip.shapley
            ]
            axes.scatter(
                [point.video for point in points],
                [point.audio for point in points],
                s=22,
                facecolor=LIGHT.blue if is_right else "none",
                edgecolor=LIGHT.blue if is_right else LIGHT.rose,
                linewidth=1.0,
                alpha=0.65 if is_right else 0.9,
                label=f"{words} ({len(points)})",
            )
        axes.axhline(0, color=LIGHT.muted, lw=0.8)
        axes.axvline(0, color=LIGHT.muted, lw=0.8)
        axes.axline((0, 0), slope=1, color=LIGHT.muted, lw=0.8, ls=":")
        axes.set_xlabel("video, nats")
        axes.set_ylabel("audio, nats")
        axes.set_title("Shapley values of the gold answer, one point per clip", loc="left")
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
        figure.savefig(path, dpi=_DPI)


def _draw_accuracy(axes: Axes, each: ValueSummary) -> None:
    for at, coalition in enumerate(Coalition):
        _bar(axes, at, 0.7, each.coalitions[coalition], _COALITION_COLOURS[coalition], None)
    axes.set_xticks(range(len(Coalition)), list(Coalition))
    axes.set_ylim(0, 1.05)
    axes.set_title("Accuracy by the clip's own modalities", loc="left")
    axes.grid(visible=False, axis="x")


def _draw_shapley(axes: Axes, groups: dict[str, ValueSummary], *, title: str) -> None:
    for at, each in enumerate(groups.values()):
        _bar(axes, at - 0.2, 0.38, each.video, LIGHT.blue, "video" if at == 0 else None)
        _bar(axes, at + 0.2, 0.38, each.audio, LIGHT.orange, "audio" if at == 0 else None)
    axes.axhline(0, color=LIGHT.muted, lw=0.8)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("nats")
    axes.set_title(title, loc="left")
    axes.grid(visible=False, axis="x")


def _draw_claims(axes: Axes, summary: DatasetAttribution, unfounded_below: float) -> None:
    """What sentences about each modality lose when video (blue) and audio (orange) are swapped."""
    for at, (modality, each) in enumerate(summary.claims.items()):
        video, audio = (each.drop, each.drop_other) if modality == "video" else (each.drop_other, each.drop)
        _bar(axes, at - 0.2, 0.38, video, LIGHT.blue, None)
        _bar(axes, at + 0.2, 0.38, audio, LIGHT.orange, None)
    names = [
        f"about {modality}\n{each.unfounded.mean:.0%} unfounded" for modality, each in summary.claims.items()
    ]
    axes.axhline(unfounded_below, color=LIGHT.ink, lw=1.0, ls=":")
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("nats per token")
    axes.set_title("What claims lose when a modality is swapped", loc="left")
    axes.grid(visible=False, axis="x")


def _bar(axes: Axes, at: float, width: float, mean: Mean, colour: str, label: str | None) -> None:
    axes.bar(
        at,
        mean.mean,
        width,
        yerr=mean.standard_error,
        color=colour,
        label=label,
        error_kw={"ecolor": LIGHT.ink, "elinewidth": 1.0, "capsize": 2.5},
    )


def _draw_layers(axes: Axes, each: AttentionSummary) -> None:
    for kind, layers in each.mass.items():
        numbers = range(1, len(layers) + 1)
        errors = [layer.standard_error or 0.0 for layer in layers]
        means = [layer.mean for layer in layers]
        axes.errorbar(
            numbers, means, yerr=errors, color=_COLOURS[kind], marker="o", ms=3.5, capsize=2, label=kind
        )
        axes.axhline(each.rows[kind], color=_COLOURS[kind], lw=1.0, ls=":")
    axes.plot([], [], color=LIGHT.muted, lw=1.0, ls=":", label="share of the visible rows")
    axes.set_xlabel("layer")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
