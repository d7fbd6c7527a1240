"""Against a slow statement of the same metric, and by hand."""

import random
from importlib.resources import as_file, files

import numpy as np
import pytest
from tests.emotion_wheel.slow_metric import SlowMetric

from omnigrpo.emotion_wheel.convert import made_up_wheel
from omnigrpo.emotion_wheel.metric import corpus_score, hit_rate, sample_scores
from omnigrpo.emotion_wheel.tables import LEVELS, Level
from omnigrpo.emotion_wheel.wheel import EmotionWheel

NUM_SETS = 10_000


@pytest.fixture(scope="module")
def wheel() -> EmotionWheel:
    return EmotionWheel(made_up_wheel())


@pytest.fixture(scope="module")
def slow() -> SlowMetric:
    with as_file(files("omnigrpo.emotion_wheel") / "made_up") as directory:
        return SlowMetric(directory)


def random_sets(seed: int, wheel: EmotionWheel) -> list[list[str]]:
    """Empty ones, unknown labels, repetitions, other cases and white space included."""
    rng = random.Random(seed)
    known = list(wheel.tables.forms)
    unknown = ["neutral", "xyzzy", "", "at  ease", "happy sad"]

    def label() -> str:
        word = rng.choice(known if rng.random() < 0.85 else unknown)
        return rng.choice([word, word, word.upper(), f" {word} "])

    sets = [[label() for _ in range(rng.randint(0, 5))] for _ in range(NUM_SETS)]
    return [[*labels, *labels[:1]] if rng.random() < 0.2 else labels for labels in sets]


@pytest.mark.parametrize("level", LEVELS)
def test_every_form_has_the_slow_metrics_nodes(wheel: EmotionWheel, slow: SlowMetric, level: Level) -> None:
    for form in [*wheel.tables.forms, "neutral", "xyzzy"]:
        expected = tuple(slow.node(form, index, level) or None for index in range(5))
        assert wheel.nodes(form, level) == expected, form


@pytest.mark.parametrize("level", LEVELS)
def test_corpus_equals_the_slow_metric(wheel: EmotionWheel, slow: SlowMetric, level: Level) -> None:
    predicted, reference = random_sets(1, wheel), random_sets(2, wheel)
    found = corpus_score(wheel, predicted, reference, level=level)
    expected = slow.corpus(predicted, reference, level)
    assert [[s.f, s.precision, s.recall] for s in found.wheels] == pytest.approx(
        np.array(expected), abs=1e-12
    )
    assert [found.f, found.precision, found.recall] == pytest.approx(np.mean(expected, axis=0), abs=1e-12)
    assert min(s.num_samples for s in found.wheels) < NUM_SETS


@pytest.mark.parametrize("level", LEVELS)
def test_samples_equal_the_slow_metric(wheel: EmotionWheel, slow: SlowMetric, level: Level) -> None:
    predicted, reference = random_sets(3, wheel), random_sets(4, wheel)
    found = sample_scores(wheel, predicted, reference, level=level).f_N
    expected = [slow.sample(p, r, level) for p, r in zip(predicted, reference, strict=True)]
    unscored = np.array([value is None for value in expected])
    assert unscored.any()
    np.testing.assert_array_equal(np.isnan(found), unscored)
    np.testing.assert_allclose(found[~unscored], [v for v in expected if v is not None], atol=1e-12, rtol=0)


def test_by_hand(wheel: EmotionWheel) -> None:
    # joy: glad, bright, on no third wheel, joy, towards. anger: cross, sharp, lively, anger, towards.
    # Against anger, "joy, anger" has one of two nodes right on wheels 1, 2 and 4 (F 2/3), all on wheels 3 and 5.
    (f,) = sample_scores(wheel, [["joy", "anger"]], [["anger"]]).f_N
    assert f == pytest.approx((2 / 3 + 2 / 3 + 1 + 2 / 3 + 1) / 5)


def test_f_of_a_corpus_is_no_mean_of_samples(wheel: EmotionWheel) -> None:
    predicted, reference = [["happy", "sad", "angry"], ["happy"]], [["happy"], ["happy", "sad", "angry"]]
    corpus = corpus_score(wheel, predicted, reference)
    assert corpus.f > sample_scores(wheel, predicted, reference).f_N.mean() + 0.05


def test_references_off_the_wheels_are_skipped(wheel: EmotionWheel) -> None:
    score = corpus_score(wheel, [["happy"], ["happy"]], [["happy"], ["neutral"]])
    assert (score.f, [s.num_samples for s in score.wheels]) == (1.0, [1] * 5)
    assert np.isnan(sample_scores(wheel, [["happy"]], [["neutral"]]).f_N[0])
    assert corpus_score(wheel, [["happy"]], [["neutral"]]).f == 0.0
    assert corpus_score(wheel, [], []).f == 0.0


def test_saying_everything_has_full_hits_but_little_precision(wheel: EmotionWheel) -> None:
    everything = list(wheel.tables.forms)
    labels = ["happy", "sad", "angry", "frightened"]
    assert hit_rate(wheel, [everything] * 4, labels) == 1.0
    assert hit_rate(wheel, [["happy"]] * 4, labels) < 0.5
    assert hit_rate(wheel, [[]] * 4, labels) == 0.0
    assert corpus_score(wheel, [everything] * 4, [[label] for label in labels]).precision < 0.4


def test_lists_of_different_lengths(wheel: EmotionWheel) -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        corpus_score(wheel, [["happy"]], [["happy"], ["sad"]])


def test_scores_carry_the_tables_hash(wheel: EmotionWheel) -> None:
    assert corpus_score(wheel, [], []).wheel_hash == wheel.tables.content_hash
