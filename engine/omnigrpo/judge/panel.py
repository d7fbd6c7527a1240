"""Asks a judge about all pairs of a group's answers: at most so many at once, again after a failure, never twice."""

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from omnigrpo.judge.interface import Comparison, Judge, JudgeError, Preference

_POINTS: dict[Preference, float] = {"first": 1.0, "tie": 0.5, "second": 0.0}
_OPPOSITE: dict[Preference, Preference] = {"first": "second", "tie": "tie", "second": "first"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelConfig:
    """How a judge is asked."""

    max_concurrent: int = 16
    """Comparisons under way at once, over all groups."""
    timeout_seconds: float = 60.0
    """For one answer."""
    attempts: int = 3
    """Times that a comparison is asked before it counts as failed."""
    retry_seconds: float = 1.0
    """Wait before the second attempt; doubled before each further one."""
    cache: Path | None = None
    """JSONL file of answers, read at the start and appended to; None keeps them in memory only."""

    def __post_init__(self) -> None:
        """Raises ValueError for limits that would ask nothing."""
        for name in ("max_concurrent", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"judge.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout_seconds", "retry_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"judge.{name} must not be negative, got {getattr(self, name)}")


class Panel:
    """One judge and its answers so far; for one event loop."""

    def __init__(self, judge: Judge, name: str, config: PanelConfig) -> None:
        """``name`` tells judges apart in the cache.

        Raises ValueError for a cache that is not this class's own.
        """
        self._judge, self._name, self._config = judge, name, config
        self._places = asyncio.Semaphore(config.max_concurrent)
        self._answers = {} if config.cache is None else _read_cache(config.cache)
        self._under_way: dict[str, asyncio.Task[Preference]] = {}
        self.num_asked = 0
        """Attempts so far, those that failed included."""

    async def wins(self, comparisons_of: "PairSource") -> np.ndarray:
        """float64 ``[G, G]``: of every two different answers which is preferred, as ``bradley_terry`` takes it.

        Equal answers tie without being asked about. The order of a pair is drawn from its content, so that a judge that
        prefers what it reads first helps nobody. Raises JudgeError when one comparison has no result.
        """
        answers = comparisons_of.answers
        wins = np.zeros((len(answers), len(answers)))
        pairs = list(combinations(range(len(answers)), 2))
        results = await asyncio.gather(*(self._prefer(comparisons_of.comparison(i, j)) for i, j in pairs))
        for (i, j), preference in zip(pairs, results, strict=True):
            wins[i, j] = _POINTS[preference]
            wins[j, i] = 1 - wins[i, j]
        return wins

    async def _prefer(self, comparison: Comparison) -> Preference:
        if comparison.first == comparison.second:
            return "tie"
        key = self._key(comparison)
        swapped_key = self._key(comparison.swapped)
        if swapped_key < key:  # Either order of the same two answers is one question.
            return _OPPOSITE[await self._once(comparison.swapped, swapped_key)]
        return await self._once(comparison, key)

    async def _once(self, comparison: Comparison, key: str) -> Preference:
        if key in self._answers:
            return self._answers[key]
        task = self._under_way.get(key)
        if task is None:
            task = asyncio.ensure_future(self._ask(comparison, key))
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(task)

    async def _ask(self, comparison: Comparison, key: str) -> Preference:
        wait, problem = self._config.retry_seconds, ""
        for attempt in range(self._config.attempts):
            if attempt:
                await asyncio.sleep(wait)
                wait *= 2
            async with self._places:
                self.num_asked += 1
                answer, problem = await self._attempt(comparison)
            if answer is not None:
                self._keep(key, answer)
                return answer
        raise JudgeError(
            f"judge {self._name!r} did not compare two answers about {comparison.clip} in {self._config.attempts} "
            f"attempts: {problem}"
        )

    async def _attempt(self, comparison: Comparison) -> tuple[Preference | None, str]:
        try:
            async with asyncio.timeout(self._config.timeout_seconds):
                answer: object = await self._judge(comparison)
        except TimeoutError:
            return None, f"no answer within {self._config.timeout_seconds} s"
        # A judge is the user's code: whatever it raises is reported with the comparison that has no result.
        except Exception as error:  # noqa: BLE001
            return None, f"{type(error).__name__}: {error}"
        for preference in _POINTS:
            if answer == preference:
                return preference, ""
        return None, f"answered {answer!r}, which is none of first, second, tie"

    def _keep(self, key: str, answer: Preference) -> None:
        self._answers[key] = answer
        if self._config.cache is not None:
            with self._config.cache.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "answer": answer}) + "\n")

    def _key(self, comparison: Comparison) -> str:
        parts = [self._name, str(comparison.clip), comparison.question, comparison.first, comparison.second]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairSource:
    """A group's answers about its clip."""

    clip: Path
    question: str
    answers: Sequence[str]

    def comparison(self, first: int, second: int) -> Comparison:
        """Two of the answers, by position."""
        return Comparison(
            clip=self.clip,
            question=self.question,
            first=self.answers[first],
            second=self.answers[second],
        )


def _read_cache(path: Path) -> dict[str, Preference]:
    """Answers in a cache file; a last line that was cut off is left out."""
    if not path.exists():
        return {}
    answers: dict[str, Preference] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            item = json.loads(line)
            answers[str(item["key"])] = next(known for known in _POINTS if known == item["answer"])
        except (ValueError, KeyError, TypeError, StopIteration):
            raise ValueError(
                f"{path}, line {number} is no judge's answer: remove the file, or name another"
            ) from None
    return answers
