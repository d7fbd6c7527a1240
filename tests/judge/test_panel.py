"""Asking a judge: how often, how many at once, and what happens when it fails."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omnigrpo.judge.interface import Comparison, JudgeError, Preference
from omnigrpo.judge.panel import PairSource, Panel, PanelConfig


class LongerIsBetter:
    """A judge that counts what it is asked."""

    def __init__(self, before: Callable[[int], None] | None = None) -> None:
        self.num_calls = self.inside = self.most_inside = 0
        self._before = before

    async def __call__(self, comparison: Comparison) -> Preference:
        self.num_calls += 1
        if self._before is not None:
            self._before(self.num_calls)
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        await asyncio.sleep(0.005)
        self.inside -= 1
        if len(comparison.first) == len(comparison.second):
            return "tie"
        return "first" if len(comparison.first) > len(comparison.second) else "second"


def source(*answers: str) -> PairSource:
    return PairSource(clip=Path("clip.mp4"), question="How?", answers=answers)


def ask(judge, *answers: str, config: PanelConfig | None = None, times: int = 1) -> np.ndarray:
    async def run() -> np.ndarray:
        panel = Panel(judge, "judge", config or PanelConfig(retry_seconds=0.0))
        return [await panel.wins(source(*answers)) for _ in range(times)][-1]

    return asyncio.run(run())


def test_every_pair_is_asked_once_whatever_its_order() -> None:
    judge = LongerIsBetter()
    wins = ask(judge, "a", "bbb", "cc", "dd", times=3)
    assert judge.num_calls == 6
    assert wins.tolist() == [[0, 0, 0, 0], [1, 0, 1, 1], [1, 0, 0, 0.5], [1, 0, 0.5, 0]]


def test_equal_answers_tie_unasked() -> None:
    judge = LongerIsBetter()
    assert ask(judge, "a", "a", "bb").tolist() == [[0, 0.5, 0], [0.5, 0, 0], [1, 1, 0]]
    assert judge.num_calls == 1


def test_a_judge_that_prefers_what_it_reads_first_helps_nobody() -> None:
    async def first(comparison: Comparison) -> Preference:
        return "first"

    answers = [f"answer {i}" for i in range(24)]
    wins = ask(first, *answers)
    upper = wins[np.triu_indices(24, 1)]
    assert 0.35 < upper.mean() < 0.65


def test_no_more_at_once_than_allowed() -> None:
    judge = LongerIsBetter()
    ask(judge, *("x" * n for n in range(8)), config=PanelConfig(max_concurrent=3))
    assert judge.most_inside == 3


def test_asked_again_after_a_failure() -> None:
    def fail_twice(call: int) -> None:
        if call <= 2:
            raise ConnectionError("gone")

    judge = LongerIsBetter(fail_twice)
    assert ask(judge, "a", "bb").tolist() == [[0, 0], [1, 0]]
    assert judge.num_calls == 3


async def _slow(comparison: Comparison) -> Preference:
    await asyncio.sleep(60)
    return "tie"


async def _nonsense(comparison: Comparison) -> Preference:
    return "both are nice"  # type: ignore[return-value] - what is tested


async def _dead(comparison: Comparison) -> Preference:
    raise ConnectionRefusedError("connection refused")


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        (_slow, "no answer within 0.05 s"),
        (_nonsense, "answered 'both are nice', which is none of first, second, tie"),
        (_dead, "ConnectionRefusedError: connection refused"),
    ],
)
def test_without_a_result_there_are_no_wins(judge, message: str) -> None:
    with pytest.raises(JudgeError, match=r"clip\.mp4 in 2 attempts: ") as caught:
        ask(judge, "a", "bb", config=PanelConfig(timeout_seconds=0.05, attempts=2, retry_seconds=0.0))
    assert message in str(caught.value)


def test_answers_outlive_the_panel(tmp_path: Path) -> None:
    config = PanelConfig(cache=tmp_path / "answers.jsonl")
    judge = LongerIsBetter()
    first = ask(judge, "a", "bb", "ccc", config=config)
    again = ask(judge, "ccc", "bb", "a", config=config)
    assert judge.num_calls == 3
    np.testing.assert_array_equal(again, first[::-1, ::-1])


def test_a_cut_off_line_is_asked_again_and_a_foreign_file_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    judge = LongerIsBetter()
    ask(judge, "a", "bb", "ccc", config=PanelConfig(cache=path))
    path.write_text(path.read_text()[:-20])
    ask(judge, "a", "bb", "ccc", config=PanelConfig(cache=path))
    assert judge.num_calls == 4
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="line 1 is no judge's answer"):
        ask(judge, "a", "bb", config=PanelConfig(cache=path))


@pytest.mark.parametrize(
    "limits", [{"attempts": 0}, {"max_concurrent": 0}, {"timeout_seconds": -1.0}, {"retry_seconds": -1.0}]
)
def test_limits_that_would_ask_nothing(limits: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(limits))):
        PanelConfig(**limits)
