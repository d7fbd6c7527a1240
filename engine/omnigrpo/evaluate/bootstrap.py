"""Bootstrap intervals of WAR and UAR.

Clips are resampled with replacement within each gold class, so that class sizes stay as they are (stratified; Efron and
Tibshirani 1993, section 8.3). A resampled recall is then a binomial count over the class size, which is drawn directly.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Percentile interval of a fraction, at 95 %."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Intervals:
    """Of both accuracies."""

    war: Interval
    uar: Interval


def bootstrap_intervals(correct: Mapping[str, int], sizes: Mapping[str, int]) -> Intervals:
    """Intervals from the number of clips of every gold class, and of those that are right; the same every time.

    Raises ValueError without clips, or with more right ones than there are.
    """
    present = [label for label, size in sizes.items() if size > 0]
    if not present or any(not 0 <= correct[label] <= sizes[label] for label in present):
        raise ValueError(
            f"need right clips of every class, at most its size, got {dict(correct)} of {dict(sizes)}"
        )
    sizes_C = np.array([sizes[label] for label in present])
    right_C = np.array([correct[label] for label in present])
    rng = np.random.default_rng(_SEED)
    counts_BC = rng.binomial(sizes_C, right_C / sizes_C, (NUM_RESAMPLES, len(present)))
    return Intervals(
        war=_percentiles(counts_BC.sum(1) / sizes_C.sum()),
        uar=_percentiles((counts_BC / sizes_C).mean(1)),
    )


def _percentiles(values_B: np.ndarray) -> Interval:
    low, high = np.percentile(values_B, [2.5, 97.5])
    return Interval(low=float(low), high=float(high))
