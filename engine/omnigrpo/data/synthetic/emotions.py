"""Which face and which voice show each emotion, and how far one modality alone can get.

Every emotion is one cell of (face, voice). The cells form a chain in which neighbours share one of the two,
so both modalities together name the emotion and one alone cannot: its best guess is one emotion per category.
"""

from enum import StrEnum
from itertools import combinations


class Face(StrEnum):
    """What the drawn face can show."""

    SMILE = "smile"
    WIDE = "wide"
    SCOWL = "scowl"
    FLAT = "flat"


class Voice(StrEnum):
    """How the synthesised voice can sound."""

    BRIGHT = "bright"
    TREMBLE = "tremble"
    FLAT = "flat"
    LOUD = "loud"


LABELS: tuple[str, ...] = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
"""The seven classes of DFEW, in the order and spelling of R1-Omni."""

CELLS: dict[str, tuple[Face, Voice]] = {
    "happy": (Face.SMILE, Voice.BRIGHT),
    "surprise": (Face.WIDE, Voice.BRIGHT),
    "fear": (Face.WIDE, Voice.TREMBLE),
    "sad": (Face.FLAT, Voice.TREMBLE),
    "neutral": (Face.FLAT, Voice.FLAT),
    "disgust": (Face.SCOWL, Voice.FLAT),
    "angry": (Face.SCOWL, Voice.LOUD),
}


def labels_with_face(label: str) -> tuple[str, ...]:
    """The emotions that look like ``label``, itself included."""
    return tuple(other for other in LABELS if CELLS[other][0] == CELLS[label][0])


def single_modality_bound(modality: int) -> float:
    """Best possible accuracy from one modality (0 face, 1 voice) when the emotions are equally frequent.

    Given the category, its emotions are equally likely, so the Bayes classifier is right on one of them:
    (number of categories in use) / (number of emotions).
    """
    return len({cell[modality] for cell in CELLS.values()}) / len(CELLS)


def _pairs_sharing(modality: int) -> tuple[tuple[str, str], ...]:
    return tuple(
        pair for pair in combinations(LABELS, 2) if CELLS[pair[0]][modality] == CELLS[pair[1]][modality]
    )


AUDIO_ONLY_PAIRS = _pairs_sharing(0)
"""Emotions with the same face: only the voice tells them apart."""
VIDEO_ONLY_PAIRS = _pairs_sharing(1)
"""Emotions with the same voice: only the face tells them apart."""
