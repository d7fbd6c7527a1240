"""Strengths against the model's own equations."""

import numpy as np
import pytest

from omnigrpo.judge.bradley_terry import bradley_terry, upper_half

PRIOR = 0.05


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_expected_wins_equal_the_wins(size: int) -> None:
    """The likelihood's gradient is zero: of every item the wins that the strengths predict are those it had."""
    rng = np.random.default_rng(size)
    wins = np.triu(rng.integers(0, 2, (size, size)), 1).astype(float)
    wins += np.tril(1 - wins.T, -1)
    strength = bradley_terry(wins)
    assert strength.mean() == pytest.approx(0.0, abs=1e-9)
    chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
    games = wins + wins.T + 2 * PRIOR
    np.fill_diagonal(games, 0.0)
    np.fill_diagonal(wins, 0.0)
    np.testing.assert_allclose((games * chance).sum(1), wins.sum(1) + PRIOR * (size - 1), atol=1e-6)


def test_two_items_by_hand() -> None:
    # 3.05 wins against 1.05: the strengths are log(3.05 / 1.05) apart.
    strength = bradley_terry(np.array([[0, 3], [1, 0]]))
    assert strength[0] - strength[1] == pytest.approx(np.log(3.05 / 1.05))


def test_a_champion_has_a_finite_strength_and_the_order_is_kept() -> None:
    strength = bradley_terry(np.triu(np.ones((5, 5)), 1))
    assert np.isfinite(strength).all()
    assert (np.diff(strength) < 0).all()


def test_ties_are_all_alike() -> None:
    np.testing.assert_allclose(bradley_terry(np.full((4, 4), 0.5)), 0.0, atol=1e-12)
    assert bradley_terry(np.zeros((1, 1))).tolist() == [0.0]


@pytest.mark.parametrize(
    "wins", [np.zeros((2, 3)), np.full((2, 2), np.nan), -np.ones((2, 2)), np.zeros((0, 0))]
)
def test_tables_that_cannot_be(wins: np.ndarray) -> None:
    with pytest.raises(ValueError, match="wins"):
        bradley_terry(wins)


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ([3.0, 1.0, 2.0, 0.0], [1, 0, 1, 0]),
        ([3.0, 1.0, 1.0, 0.0], [1, 1, 1, 0]),
        ([1.0, 1.0, 1.0], [1, 1, 1]),
        ([1.0, 3.0, 2.0], [0, 1, 0]),
        ([1.0], [1]),
    ],
)
def test_the_upper_half(strengths: list[float], expected: list[int]) -> None:
    assert upper_half(np.array(strengths)).tolist() == expected
