"""The benchmarks of R1-Omni's Table 1 (arXiv 2503.05379): label sets and published figures."""

from dataclasses import dataclass

from omnigrpo.reward.aliases import DFEW_LABELS, MAFW_LABELS, RAVDESS_LABELS


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
    """The benchmark that a split is of by its name, e.g. ``dfew_test``; None for a split of something else."""
    return BENCHMARKS.get(split.lower().replace("-", "_").split("_")[0])
