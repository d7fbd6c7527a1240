"""What a judge is: who compares two answers about a clip."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Preference = Literal["first", "second", "tie"]


class JudgeError(OSError):
    """A judge did not answer, or answered with no preference; its comparison has no result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two answers about one clip."""

    clip: Path
    question: str
    first: str
    second: str

    @property
    def swapped(self) -> "Comparison":
        """The same with the answers in the other order."""
        return Comparison(clip=self.clip, question=self.question, first=self.second, second=self.first)


class Judge(Protocol):
    """An asynchronous function that prefers one of two answers; whatever it raises counts as no answer."""

    async def __call__(self, comparison: Comparison) -> Preference:
        """Compare."""
        ...
