"""Sections about single prompts: sampled rollouts with their frames, and prompts that were dropped."""

import re
from collections import Counter
from html import escape

from omnigrpo.report.html import details, missing, section, table
from omnigrpo.report.inputs import RunData
from omnigrpo.report.thumbnails import Frames, clip_frames, clip_of, data_uri
from omnigrpo.reward.aliases import canonical_label
from omnigrpo.reward.tagged_answer import first_answer

_GROUPS_SHOWN = 4
"""Groups from each end of the training."""
_NUM_FRAMES = 4
_DROPPED_SHOWN = 50
_THINKING = re.compile(r"<think>(.*?)</think>", re.DOTALL)


def rollouts_section(run: RunData) -> str:
    """Sampled groups from the first and the last logged steps."""
    if not run.rollouts:
        return section(
            "rollouts", "Sampled rollouts", missing("rollouts.jsonl holds no group: the run logged none.")
        )
    early, late = _both_ends(run.rollouts)
    frames = clip_frames(
        [clip_of(record, run.directory) for record in (*early, *late)], num_frames=_NUM_FRAMES
    )
    body = ""
    for title, records, first in (("Early in training", early, 0), ("Late in training", late, len(early))):
        if records:
            cards = "".join(_card(record, frames[first + at]) for at, record in enumerate(records))
            body += f'<h3>{title}</h3><div class="rollouts">{cards}</div>'
    note = "Of each group the best and the worst completion are open; the others are folded."
    return section("rollouts", "Sampled rollouts", body, note)


def dropped_section(run: RunData) -> str:
    """Prompts whose clip could not be used."""
    if not run.dropped:
        none = "Every clip could be used." if run.metrics else "The run logged no dropped prompt."
        return section("dropped", "Dropped prompts", f'<p class="note">{none}</p>')
    counts = Counter(record["status"] for record in run.dropped)
    prompts = len({record["prompt_id"] for record in run.dropped})
    total = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in counts.most_common())
    rows = [
        (str(record["step"]), record["prompt_id"], record["status"].replace("_", " "), record["error"])
        for record in run.dropped[-_DROPPED_SHOWN:]
    ]
    shown = f" The last {_DROPPED_SHOWN} are listed." if len(run.dropped) > _DROPPED_SHOWN else ""
    note = f"{prompts} {'prompts' if prompts > 1 else 'prompt'} could not be used because of the clip: {total}.{shown}"
    return section(
        "dropped",
        "Dropped prompts",
        table(("step", "prompt", "status", "reason"), rows, numeric_from=4),
        note,
    )


def _both_ends(records: tuple[dict, ...]) -> tuple[tuple[dict, ...], tuple[dict, ...]]:
    """Groups of the first and the last logged steps; each group once."""
    early = records[: min(_GROUPS_SHOWN, (len(records) + 1) // 2)]
    late = records[max(len(early), len(records) - _GROUPS_SHOWN) :]
    return early, late


def _card(record: dict, frames: Frames) -> str:
    order = sorted(range(len(record["texts"])), key=lambda index: -record["totals"][index])
    opened = [order[0], order[-1]] if len(order) > 1 else order
    folded = [index for index in order if index not in opened]
    window = "" if record["start_seconds"] is None else f", from {record['start_seconds']:g} s"
    body = "".join(_completion(record, index) for index in opened)
    if folded:
        body += details(
            f"{len(folded)} more completions", "".join(_completion(record, index) for index in folded)
        )
    mean = sum(record["totals"]) / max(len(record["totals"]), 1)
    return (
        f"<article>{_strip(record, frames)}<div>Gold label <b>{escape(record['solution'])}</b></div>"
        f'<p class="meta">step {record["step"]} · {escape(record["prompt_id"])} · '
        f"{escape(record['clip'])}{window} · mean reward {mean:.2f}</p>"
        f"{details('question', '<p class=meta>' + escape(record['question']) + '</p>')}{body}</article>"
    )


def _strip(record: dict, frames: Frames) -> str:
    if frames.error is not None:
        return missing(frames.error)
    images = "".join(
        f'<img src="{data_uri(image)}" alt="frame {number} of {escape(record["prompt_id"])}" '
        f'width="{image.width}" height="{image.height}">'
        for number, image in enumerate(frames.images, start=1)
    )
    return f'<div class="strip">{images}</div>'


def _completion(record: dict, index: int) -> str:
    text = record["texts"][index]
    answer = first_answer(text) if "<answer>" in text else ""
    is_right = canonical_label(answer) == canonical_label(record["solution"])
    verdict = f'<span class="{"right" if is_right else "wrong"}">{escape(answer) or "no answer"}</span>'
    parts = ", ".join(f"{escape(name)} {values[index]:g}" for name, values in record["components"].items())
    thinking = _THINKING.search(text)
    reasoning = thinking.group(1).strip() if thinking and answer else text
    return (
        f'<div class="completion"><div class="head"><span>answers {verdict}</span>'
        f'<span class="reward">reward {record["totals"][index]:g} ({parts})</span></div>'
        f"<p>{escape(reasoning)}</p></div>"
    )
