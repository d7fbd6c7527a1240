"""Other forms of the emotion words that label DFEW, MAFW and RAVDESS clips."""

from collections.abc import Mapping
from types import MappingProxyType

DFEW_LABELS = ("happy", "surprise", "neutral", "angry", "disgust", "sad", "fear")
MAFW_LABELS = (*DFEW_LABELS, "contemptuous", "disappointed", "helpless", "anxious")
RAVDESS_LABELS = ("neutral", "calm", "happy", "sad", "angry", "fear", "disgust", "surprise")

EMOTION_ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "happiness": "happy",
        "surprised": "surprise",
        "surprising": "surprise",
        "neutrality": "neutral",
        "anger": "angry",
        "angered": "angry",
        "disgusted": "disgust",
        "disgusting": "disgust",
        "sadness": "sad",
        "fearful": "fear",
        "fearfulness": "fear",
        "contempt": "contemptuous",
        "disappointment": "disappointed",
        "disappointing": "disappointed",
        "helplessness": "helpless",
        "anxiety": "anxious",
        "anxiousness": "anxious",
        "calmness": "calm",
    }
)
"""Other forms of the same word only: a synonym (joy, rage) stays a different answer."""

_AROUND = " \t\r\n\f\v.,;:!?\"'`*"


def canonical_label(text: str, aliases: Mapping[str, str] = EMOTION_ALIASES) -> str:
    """Case-folded, without surrounding blanks and punctuation, and the label that it is a form of."""
    word = " ".join(text.casefold().strip(_AROUND).split())
    return aliases.get(word, word)
