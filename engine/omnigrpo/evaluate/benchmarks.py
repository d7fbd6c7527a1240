"""The benchmarks of R1-Omni's Table 1 (arXiv 2503.05379): label sets and published figures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from omnigrpo.reward.aliases import DFEW_LABELS, MAFW_LABELS, RAVDESS_LABELS

NO_BENCHMARK = "none"
"""Says that a split is of no benchmark, whatever its name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One row of the table for one benchmark, per cent."""

    model: str
    war: float
    uar: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """A test set and what the paper reports on it."""

    name: str
    title: str
    labels: tuple[str, ...]
    num_clips: int | None
    """Clips of the test set with which all published WARs agree; None where several sizes do."""
    published: tuple[Published, ...]

    def war_standard_error(self, published: Published) -> float | None:
        """Binomial, per cent: sqrt(WAR (1 - WAR) / N); None where N is not known."""
        if self.num_clips is None:
            return None
        share = published.war / 100
        return 100 * math.sqrt(share * (1 - share) / self.num_clips)


def _published(*figures: tuple[float, float]) -> tuple[Published, ...]:
    models = ("HumanOmni-0.5B", "EMER-SFT", "MAFW-DFEW-SFT", "R1-Omni")
    return tuple(
        Published(model=model, war=war, uar=uar) for model, (war, uar) in zip(models, figures, strict=True)
    )


BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="dfew",
            title="DFEW",
            labels=DFEW_LABELS,
            num_clips=2341,
            published=_published((22.64, 19.44), (38.66, 35.31), (60.23, 44.39), (65.83, 56.27)),
        ),
        Benchmark(
            name="mafw",
            title="MAFW",
            labels=MAFW_LABELS,
            num_clips=None,
            published=_published((20.18, 13.52), (38.39, 28.02), (50.44, 30.39), (57.68, 40.04)),
        ),
        Benchmark(
            name="ravdess",
            title="RAVDESS (out of distribution)",
            labels=RAVDESS_LABELS,
            num_clips=300,
            published=_published((7.33, 9.38), (29.00, 27.19), (29.33, 30.75), (43.00, 44.69)),
        ),
    )
}


def benchmark_of(split: str) -> Benchmark | None:
    """The benchmark whose test set a split is by its name, e.g. ``dfew_test``; None for another one, or for training.

    Published figures are of test sets: ``dfew_train`` is no benchmark.
    """
    first, *rest = split.lower().replace("-", "_").split("_")
    return None if "train" in rest else BENCHMARKS.get(first)


def benchmarks_of(splits: Sequence[str], named: Mapping[str, str]) -> dict[str, Benchmark | None]:
    """The benchmark of every split: the one that ``named`` gives by split, else the one of the split's name.

    Raises ValueError where ``named`` names no split, or no benchmark (``none`` stands for none).
    """
    for split, name in named.items():
        if split not in splits:
            raise ValueError(f"a benchmark is given for the split {split!r}; there are {', '.join(splits)}")
        if name not in (*BENCHMARKS, NO_BENCHMARK):
            known = ", ".join((*BENCHMARKS, NO_BENCHMARK))
            raise ValueError(f"the benchmark of split {split!r} must be one of {known}, got {name!r}")
    return {
        split: BENCHMARKS.get(named[split]) if split in named else benchmark_of(split) for split in splits
    }


def named_benchmarks(texts: Sequence[str], splits: Sequence[str]) -> dict[str, str]:
    """``NAME`` for every split, or ``SPLIT=NAME`` for one, as a mapping by split; a later text counts."""
    named: dict[str, str] = {}
    for text in texts:
        split, equals, name = text.rpartition("=")
        named |= {split: name} if equals else dict.fromkeys(splits, name)
    return named
