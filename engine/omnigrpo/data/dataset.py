"""Reads datasets in R1-Omni's JSON format."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omnigrpo.data.dataset_files import DatasetError, read_items
from omnigrpo.schema import Clip, Modality, Prompt

__all__ = ["INSTRUCTION", "DatasetError", "PromptStyle", "check_responses", "read_dataset"]

INSTRUCTION = "Output the thinking process in <think> </think> and final emotion in <answer> </answer> tags."
"""R1-Omni's request for tagged output, appended to every question."""

_TAGS: dict[str, Modality] = {"<video>": "video", "<audio>": "audio"}
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptStyle:
    """How the question of a dataset becomes the user's text."""

    instruction: str = INSTRUCTION
    """Asked for after every question; empty to leave the question alone."""
    separator: str = "\n"
    """Between question and instruction (a newline in R1-Omni's RL prompt)."""
    label_response: str | None = None
    """What supervised training imitates where the gpt text is a bare label, with ``{label}`` for the label; None
    refuses such data. ``"{label}"`` is the label itself, R1-Omni's baseline without reasoning."""

    def __post_init__(self) -> None:
        """Reject a response without the label."""
        if self.label_response is not None and "{label}" not in self.label_response:
            raise ValueError(
                f"data.style.label_response must contain {{label}}, got {self.label_response!r}: every label would "
                "have the same response"
            )


def read_dataset(
    path: Path, style: PromptStyle, *, media_root: Path | None = None, labels: Sequence[str] | None = None
) -> tuple[Prompt, ...]:
    """Read a list of ``{"video": path, "conversations": [human, gpt]}``: JSON, JSON lines, ``{a,b}.json``, or YAML.

    See ``read_items`` for the forms of file. Clip paths are relative to ``media_root``, else to the file's own
    directory. The human text's ``<video>`` and ``<audio>`` tags say which modalities the prompt asks for. The gpt text
    is a bare label, or reasoning with an ``<answer>`` tag, which then also is the prompt's response. An item may
    carry ``"subtitle": text``, which ``prompt.subtitle`` puts into the prompt. ``labels`` are what a solution may be;
    None allows everything.

    Raises:
        DatasetError: a file that cannot be read, an empty list, an item with a missing or malformed field, an id
            that two items have, or a label outside the set.
    """
    items = read_items(path)
    prompts = tuple(
        _prompt(item.content, item.where, index, media_root or item.file.parent, style)
        for index, item in enumerate(items)
    )
    _check_ids(prompts, path)
    if labels is not None:
        for item, prompt in zip(items, prompts, strict=True):
            if prompt.solution not in labels:
                raise DatasetError(
                    f"{item.where}: the label in conversations[1].value must be one of {', '.join(labels)}, got "
                    f"{prompt.solution!r}"
                )
    return prompts


def check_responses(prompts: Sequence[Prompt], path: Path) -> None:
    """Raise DatasetError unless every prompt carries a response to imitate."""
    for index, prompt in enumerate(prompts):
        if prompt.response is None:
            raise DatasetError(
                f"{path}, item {index}: supervised training needs a gpt text with <think> and <answer> tags, "
                f"got the bare label {prompt.solution!r}; use a cold-start file, `omnigrpo train` for labels, or set "
                "data.style.label_response='{label}' to imitate bare labels"
            )


def _check_ids(prompts: Sequence[Prompt], path: Path) -> None:
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        before = first.setdefault(prompt.prompt_id, index)
        if before != index:
            raise DatasetError(
                f"{path}, items {before} and {index}: both have the id {prompt.prompt_id!r}; give each item an id "
                "of its own, or no item an id"
            )


def _prompt(item: object, where: str, index: int, root: Path, style: PromptStyle) -> Prompt:
    if not isinstance(item, dict):
        raise DatasetError(f"{where}: expected an object, got {_kind(item)}")
    source = next((key for key in ("video", "audio") if key in item), None)
    if source is None:
        raise DatasetError(f"{where}: needs the key 'video' or 'audio', got {sorted(item)}")
    if not isinstance(item[source], str) or not item[source]:
        raise DatasetError(f"{where}: {source!r} must be a path, got {item[source]!r}")
    human, answer = _turns(item, where)
    question, modalities = _split_tags(human, where)
    tagged = _ANSWER.search(answer)
    solution = (tagged.group(1) if tagged else answer).strip()
    of_label = style.label_response and style.label_response.replace("{label}", solution)
    return Prompt(
        prompt_id=str(item.get("id", f"{index:06d}")),
        clip=Clip(
            path=root / item[source],
            start_seconds=_seconds(item, "start_seconds", where),
            end_seconds=_seconds(item, "end_seconds", where),
        ),
        question=_with_instruction(question, style),
        modalities=modalities,
        solution=solution,
        response=answer if tagged else of_label,
        subtitle=_subtitle(item, where),
    )


def _turns(item: dict[str, object], where: str) -> tuple[str, str]:
    turns = item.get("conversations")
    if not isinstance(turns, list) or len(turns) < 2:
        raise DatasetError(f"{where}: 'conversations' must list a human and a gpt turn, got {turns!r}")
    texts = []
    for turn, speaker in zip(turns, ("human", "gpt"), strict=False):
        if (
            not isinstance(turn, dict)
            or turn.get("from") != speaker
            or not isinstance(turn.get("value"), str)
        ):
            raise DatasetError(f'{where}: expected {{"from": "{speaker}", "value": text}}, got {turn!r}')
        texts.append(turn["value"])
    return texts[0], texts[1]


def _split_tags(human: str, where: str) -> tuple[str, tuple[Modality, ...]]:
    modalities: tuple[Modality, ...] = tuple(modality for tag, modality in _TAGS.items() if tag in human)
    if not modalities:
        raise DatasetError(
            f"{where}: names a clip but its question asks for no modality: add <video> or <audio> to the human turn"
        )
    for tag in _TAGS:
        human = human.replace(tag, "")
    if not human.strip():
        raise DatasetError(f"{where}: the human turn asks nothing besides its tags")
    return human.strip(), modalities


def _with_instruction(question: str, style: PromptStyle) -> str:
    if not style.instruction:
        return question
    bare = question.removesuffix(style.instruction).rstrip()
    return f"{bare}{style.separator}{style.instruction}"


def _seconds(item: dict[str, object], key: str, where: str) -> float | None:
    value = item.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise DatasetError(f"{where}: {key!r} must be a number of seconds of at least 0, got {value!r}")
    return float(value)


def _subtitle(item: dict[str, object], where: str) -> str | None:
    """The words said in the clip, in one line; an empty text stands for none."""
    value = item.get("subtitle")
    if value is not None and not isinstance(value, str):
        raise DatasetError(
            f"{where}: 'subtitle' must be the text that is said, got {value!r}; leave it out where there is none"
        )
    return None if value is None else " ".join(value.split()) or None


def _kind(value: object) -> str:
    return "an empty list" if value == [] else f"a {type(value).__name__}"
