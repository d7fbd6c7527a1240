"""Strengths of items from pairwise preferences (Bradley and Terry, 1952)."""

import numpy as np

_PRIOR_GAMES = 0.1
"""Ties that every item is taken to have played against every other: an item that won or lost all games has a finite
strength, and items that never met compare."""
_TOLERANCE = 1e-10
_MAX_ROUNDS = 10_000


def bradley_terry(wins_GG: np.ndarray) -> np.ndarray:
    """Maximum-likelihood log-strengths, float64 ``[G]``, mean 0.

    ``wins_GG[i, j]`` is how often i was preferred over j, a tie being half for each; the diagonal is ignored. Solved by
    the minorisation-maximisation iteration of Hunter (2004), with a prior of a tenth of a tie for each pair.

    Raises ValueError for a table that is not square, negative or not finite.
    """
    wins = np.array(wins_GG, dtype=np.float64)
    if wins.ndim != 2 or wins.shape[0] != wins.shape[1] or not wins.size:
        raise ValueError(f"need a square table of wins, got shape {wins.shape}")
    if not np.isfinite(wins).all() or (wins < 0).any():
        raise ValueError("wins must be finite and not negative")
    wins = wins + _PRIOR_GAMES / 2
    np.fill_diagonal(wins, 0.0)
    games, total = wins + wins.T, wins.sum(1)
    if len(wins) == 1:
        return np.zeros(1)
    strength = np.ones(len(wins))
    for _ in range(_MAX_ROUNDS):
        updated = total / (games / (strength[:, None] + strength[None, :])).sum(1)
        updated /= np.exp(np.log(updated).mean())
        change = np.abs(np.log(updated / strength)).max()
        strength = updated
        if change < _TOLERANCE:
            break
    return np.log(strength)


def upper_half(strengths_G: np.ndarray) -> np.ndarray:
    """float64 ``[G]``: 1 for the stronger half (G // 2 items), 0 for the others.

    Items as strong as the weakest of that half, to 1e-6, belong to it too: of items that all tie, each gets 1, and the
    group teaches nothing. A single item gets 1.
    """
    count = max(len(strengths_G) // 2, 1)
    weakest = np.sort(strengths_G)[-count]
    return (strengths_G >= weakest - 1e-6).astype(np.float64)
