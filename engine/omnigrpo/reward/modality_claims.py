"""Which sentences of a reasoning speak of what is seen or heard.

A sentence *cites* a modality when it holds one of that modality's terms as a whole word, case aside; a term that ends
in ``*`` stands for all words that begin so. A sentence may cite both. The terms are those of R1-Omni's and EMER's
English descriptions; words that speak of either (``expression``, ``intense``, ``calm``) are left out on purpose.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Self

from omnigrpo.reward.token_spans import Span
from omnigrpo.schema import Modality

VIDEO_TERMS: tuple[str, ...] = (
    "video", "visual*", "image*", "screen", "frame*", "scene*", "see", "seen", "sees", "watch*", "face", "faces",
    "facial*", "eye", "eyes", "gaze*", "gazing", "brow", "brows", "eyebrow*", "forehead", "mouth*", "lip", "lips",
    "cheek*", "jaw*", "chin", "teeth", "smil*", "frown*", "grimac*", "stare*", "staring", "glare*", "blink*", "tear",
    "tears", "head", "hand", "hands", "arm", "arms", "shoulder*", "gestur*", "postur*", "body", "wearing", "wears",
)  # fmt: skip
AUDIO_TERMS: tuple[str, ...] = (
    "audio", "audible", "sound*", "hear", "heard", "hears", "listen*", "voice*", "vocal*", "tone", "tones", "pitch*",
    "intonation*", "timbre", "speech*", "speak*", "spoke", "spoken", "utter*", "say", "says", "said", "saying",
    "volume", "loud*", "whisper*", "shout*", "yell*", "scream*", "sob", "sobs", "sobbing", "sigh*", "laughter",
    "tempo", "prosod*", "music*",
)  # fmt: skip

_REASONING = re.compile(r"<think>(.*?)(?:</think>|<answer>|\Z)", re.DOTALL)
_SENTENCE = re.compile(r"[^.!?\u3002\uff01\uff1f\n]+[.!?\u3002\uff01\uff1f]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Lexicon:
    """The terms by which a sentence cites a modality."""

    video: tuple[str, ...] = VIDEO_TERMS
    audio: tuple[str, ...] = AUDIO_TERMS

    def __post_init__(self) -> None:
        """Raises ValueError for a term that could not be a word."""
        for term in (*self.video, *self.audio):
            if not re.fullmatch(r"[\w'-]+(?: [\w'-]+)*\*?", term):
                raise ValueError(
                    f"a term must be a word or several, with * at its end for all that begin so, got {term!r}"
                )

    def extended(self, *, video: Iterable[str] = (), audio: Iterable[str] = ()) -> Self:
        """The same with more terms."""
        return type(self)(video=(*self.video, *video), audio=(*self.audio, *audio))

    def cites(self, sentence: str, modality: Modality) -> bool:
        """Whether the sentence holds a term of the modality."""
        return _pattern(self.video if modality == "video" else self.audio).search(sentence) is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A sentence of the reasoning that cites a modality."""

    modality: Modality
    span: Span
    """Its characters in the completion's text."""


def reasoning_span(text: str) -> Span | None:
    """The characters inside the first ``<think>`` block, which may be left open; None without one."""
    match = _REASONING.search(text)
    return match.span(1) if match else None


def find_claims(text: str, lexicon: Lexicon) -> tuple[Claim, ...]:
    """The claims of a completion in order; a sentence that cites both modalities makes two."""
    block = reasoning_span(text)
    if block is None:
        return ()
    modalities: tuple[Modality, ...] = ("video", "audio")
    return tuple(
        Claim(modality=modality, span=_stripped(text, sentence.span()))
        for sentence in _SENTENCE.finditer(text, *block)
        for modality in modalities
        if lexicon.cites(sentence.group(), modality)
    )


def _stripped(text: str, span: Span) -> Span:
    start, end = span
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


@cache
def _pattern(terms: tuple[str, ...]) -> re.Pattern[str]:
    words = (re.escape(term.removesuffix("*")) + (r"\w*" if term.endswith("*") else "") for term in terms)
    return re.compile(rf"\b(?:{'|'.join(words)})\b", re.IGNORECASE)
