"""Intervals against resampling clip by clip, and against the normal approximation."""

import numpy as np
import pytest

from omnigrpo.evaluate.bootstrap import NUM_RESAMPLES, bootstrap_intervals


def test_intervals_equal_those_of_resampled_clips() -> None:
    sizes, right = {"a": 30, "b": 12}, {"a": 21, "b": 3}
    found = bootstrap_intervals(right, sizes)
    rng = np.random.default_rng(7)
    clips = {label: np.arange(size) < right[label] for label, size in sizes.items()}
    wars, uars = [], []
    for _ in range(NUM_RESAMPLES):
        drawn = {label: rng.choice(flags, len(flags)) for label, flags in clips.items()}
        wars.append(sum(flags.sum() for flags in drawn.values()) / 42)
        uars.append(np.mean([flags.mean() for flags in drawn.values()]))
    for interval, values in ((found.war, wars), (found.uar, uars)):
        low, high = np.percentile(values, [2.5, 97.5])
        assert interval.low == pytest.approx(low, abs=0.025)
        assert interval.high == pytest.approx(high, abs=0.025)


def test_intervals_are_the_same_every_time_and_shrink_with_clips() -> None:
    few = bootstrap_intervals({"a": 6, "b": 4}, {"a": 10, "b": 10})
    assert few == bootstrap_intervals({"a": 6, "b": 4}, {"a": 10, "b": 10})
    many = bootstrap_intervals({"a": 600, "b": 400}, {"a": 1000, "b": 1000})
    assert many.war.high - many.war.low < (few.war.high - few.war.low) / 5
    assert few.war.low < 0.5 < few.war.high


def test_absent_classes_do_not_count_and_certainty_has_no_width() -> None:
    found = bootstrap_intervals({"a": 5, "b": 0}, {"a": 5, "b": 0})
    assert (found.war.low, found.war.high, found.uar.low) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("right", "sizes"), [({}, {}), ({"a": 3}, {"a": 2}), ({"a": 0}, {"a": 0})])
def test_counts_that_cannot_be(right: dict[str, int], sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="need right clips of every class"):
        bootstrap_intervals(right, sizes)
