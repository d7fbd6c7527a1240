"""R1-Omni's two rewards: the right label in ``<answer>``, and the tags in order.

The ``reference`` preset does what the published code does, quirks included:

- accuracy: the first ``<answer>(.*?)</answer>`` that ``re.search`` finds on one line; the *whole completion*
  is the answer when there is none; exact, case-sensitive comparison of the stripped texts.
- format: ``re.fullmatch`` with DOTALL, so surrounding blanks score 0 and repeated blocks score 1.

Its symbolic check (math_verify) is left out: it parses an emotion word to nothing and never fires.

The ``robust`` preset leaves nothing to gain by formatting tricks: exactly one ``<think>`` block, then exactly
one ``<answer>`` block; the answer may span lines, and case, punctuation and the word's form do not matter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from omnigrpo.reward.aliases import EMOTION_ALIASES, canonical_label
from omnigrpo.schema import Group


class Preset(StrEnum):
    """Whose rules apply."""

    REFERENCE = "reference"
    ROBUST = "robust"


_ANSWER_ON_ONE_LINE = re.compile(r"<answer>(.*?)</answer>")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_BLOCKS = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
_FILLED_BLOCKS = re.compile(r"\s*<think>.*?\S.*?</think>\s*<answer>.*?\S.*?</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """1 where the completion answers with the prompt's label, else 0."""

    preset: Preset
    aliases: Mapping[str, str] = field(default_factory=lambda: EMOTION_ALIASES)
    """Used by the robust preset: other form of a label to the label."""

    def __call__(self, group: Group) -> list[float]:
        """Score every completion of ``group``."""
        return [float(self.is_right(text, group.inputs.prompt.solution)) for text in group.texts]

    def is_right(self, text: str, label: str) -> bool:
        """Whether ``text`` answers ``label``."""
        if self.preset is Preset.REFERENCE:
            return _reference_answer(text) == _reference_answer(f"<answer> {label} </answer>")
        answer = only_answer(text)
        return answer is not None and canonical_label(answer, self.aliases) == canonical_label(
            label, self.aliases
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """1 where the completion is a think block followed by an answer block, else 0."""

    preset: Preset

    def __call__(self, group: Group) -> list[float]:
        """Score every completion of ``group``."""
        return [float(self.is_right(text)) for text in group.texts]

    def is_right(self, text: str) -> bool:
        """Whether ``text`` has the format."""
        if self.preset is Preset.REFERENCE:
            return _BLOCKS.fullmatch(text) is not None
        return _FILLED_BLOCKS.fullmatch(text) is not None and _has_each_tag_once(text)


def only_answer(text: str) -> str | None:
    """What the one ``<answer>`` block holds; None without a block or with several."""
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    match = _ANSWER.search(text)
    return match.group(1) if match else None


def first_answer(text: str) -> str:
    """What the first ``<answer>`` block holds, the whole text without one; stripped.

    For evaluation, where a model that was never asked for tags may answer with the bare label.
    """
    match = _ANSWER.search(text)
    return (match.group(1) if match else text).strip()


def reasoning_of(text: str) -> str | None:
    """What the first ``<think>`` block holds, stripped; None without one."""
    match = _THINK.search(text)
    return match.group(1).strip() if match else None


def answer_span(text: str) -> tuple[int, int] | None:
    """The characters inside the first ``<answer>`` block, blanks around them left out; None without any."""
    match = _ANSWER.search(text)
    if match is None or not match.group(1).strip():
        return None
    start = match.start(1) + len(match.group(1)) - len(match.group(1).lstrip())
    return start, start + len(match.group(1).strip())


def _reference_answer(text: str) -> str:
    match = _ANSWER_ON_ONE_LINE.search(text)
    return (match.group(1) if match else text).strip()


def _has_each_tag_once(text: str) -> bool:
    return all(text.count(tag) == 1 for tag in _TAGS)
