"""The texts of a clip: R1-Omni's question, and reasoning that describes what was really drawn and sung.

A small vocabulary on purpose: the demo's tokenizer has a few hundred entries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import product

import numpy as np

from omnigrpo.data.dataset import INSTRUCTION
from omnigrpo.data.synthetic.attributes import Expression, Prosody
from omnigrpo.data.synthetic.emotions import LABELS

QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is the "
    "most obvious to you?"
)
"""The one question of R1-Omni's reinforcement learning."""
HUMAN_TURN = f"<video>\n<audio>\n{QUESTION} {INSTRUCTION}"
"""The human turn of every item, spelled as in R1-Omni's cold-start file."""

WORDS: dict[str, tuple[tuple[float, str], ...]] = {
    "mouth_curve": ((-0.35, "turns down"), (0.35, "stays level"), (2.0, "turns up")),
    "brow_raise": ((-0.35, "lowered"), (0.35, "level"), (2.0, "raised")),
    "eye_open": ((0.45, "narrow"), (0.75, "calm"), (2.0, "wide")),
    "pitch": ((-0.2, "low"), (0.35, "middle"), (2.0, "high")),
    "energy": ((0.35, "soft"), (0.7, "even"), (2.0, "loud")),
    "tempo": ((0.35, "slow"), (0.6, "steady"), (2.0, "quick")),
    "tremor": ((0.4, "firm"), (2.0, "shaky")),
}
"""Per attribute the words for its values, each up to (not including) a limit."""

_FACE_SENTENCES = (
    "The mouth {mouth_curve}, the brows are {brow_raise} and the eyes are {eye_open}.",
    "I see {brow_raise} brows and {eye_open} eyes, and the mouth {mouth_curve}.",
)
_VOICE_SENTENCES = (
    "The voice is {pitch}, {energy}, {tempo} and {tremor}.",
    "I hear a {tremor} voice, {pitch}, {energy} and {tempo}.",
)
_CONCLUSIONS = (
    "So the emotion is {label}.",
    "This fits {label} best.",
)


def describe(name: str, value: float) -> str:
    """The word for one attribute's value."""
    return next(word for limit, word in WORDS[name] if value < limit)


def reasoning(expression: Expression, prosody: Prosody, label: str, rng: np.random.Generator) -> str:
    """Three sentences on the face, the voice and the conclusion, in one of 8 wordings."""
    values = asdict(expression) | asdict(prosody)
    words = {name: describe(name, values[name]) for name in WORDS}
    face, voice, conclusion = (
        sentences[rng.integers(len(sentences))]
        for sentences in (_FACE_SENTENCES, _VOICE_SENTENCES, _CONCLUSIONS)
    )
    return " ".join((face.format(**words), voice.format(**words), conclusion.format(label=label)))


def response(thought: str, label: str) -> str:
    """The tagged text that cold start imitates."""
    return f"<think>{thought}</think>\n<answer>{label}</answer>"


def vocabulary_texts() -> tuple[str, ...]:
    """Every sentence with every choice of words, as responses, and the question: what to train a tokenizer on."""
    faces = list(_expand(_FACE_SENTENCES, ("mouth_curve", "brow_raise", "eye_open")))
    voices = list(_expand(_VOICE_SENTENCES, ("pitch", "energy", "tempo", "tremor")))
    endings = [(sentence.format(label=label), label) for sentence in _CONCLUSIONS for label in LABELS]
    responses = (
        response(
            f"{faces[i % len(faces)]} {voice} {endings[i % len(endings)][0]}", endings[i % len(endings)][1]
        )
        for i, voice in enumerate(voices)
    )
    return (QUESTION, INSTRUCTION, HUMAN_TURN, *LABELS, *responses)


def _expand(sentences: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    choices = [[word for _, word in WORDS[name]] for name in names]
    for sentence, words in product(sentences, product(*choices)):
        yield sentence.format(**dict(zip(names, words, strict=True)))
