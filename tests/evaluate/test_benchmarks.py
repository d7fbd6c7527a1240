"""Which published figures a split is set beside."""

import pytest

from omnigrpo.evaluate.benchmarks import BENCHMARKS, benchmark_of, benchmarks_of, named_benchmarks


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("dfew_test", "dfew"),
        ("DFEW-fold1", "dfew"),
        ("mafw", "mafw"),
        ("ravdess_speech", "ravdess"),
        ("dfew_train", None),
        ("mafw-train-2", None),
        ("heldout", None),
        ("my_dfew", None),
    ],
)
def test_a_splits_name_tells_its_benchmark_unless_it_is_for_training(split: str, name: str | None) -> None:
    found = benchmark_of(split)
    assert (None if found is None else found.name) == name


def test_what_is_said_goes_before_the_name() -> None:
    found = benchmarks_of(["one", "dfew_test", "mafw_test"], {"one": "ravdess", "dfew_test": "none"})
    assert found == {"one": BENCHMARKS["ravdess"], "dfew_test": None, "mafw_test": BENCHMARKS["mafw"]}


def test_one_name_is_for_all_splits_and_a_split_may_have_its_own() -> None:
    assert named_benchmarks([], ["a", "b"]) == {}
    assert named_benchmarks(["dfew", "b=none"], ["a", "b"]) == {"a": "dfew", "b": "none"}


def test_published_wars_are_whole_clips_of_the_test_sets() -> None:
    for benchmark in BENCHMARKS.values():
        for row in benchmark.published:
            if benchmark.num_clips is not None:
                clips = row.war / 100 * benchmark.num_clips
                assert abs(round(clips) / benchmark.num_clips - row.war / 100) < 0.5e-4, (benchmark.name, row)


def test_published_standard_errors() -> None:
    ravdess = BENCHMARKS["ravdess"]
    assert ravdess.war_standard_error(ravdess.published[-1]) == pytest.approx(2.86, abs=0.005)
    assert BENCHMARKS["mafw"].war_standard_error(BENCHMARKS["mafw"].published[0]) is None
