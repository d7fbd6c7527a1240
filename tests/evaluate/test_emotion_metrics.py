import math

import pytest

from omnigrpo.evaluate.emotion_metrics import (
    Matching,
    emotion_metrics,
    pair_recalls,
    predicted_label,
)

GOLDS = ["happy"] * 6 + ["sad"] * 3 + ["fear"]
PREDICTIONS = ["happy"] * 5 + ["sad"] + ["sad"] * 2 + ["rage"] + ["happy"]


def test_the_hand_computed_case() -> None:
    metrics = emotion_metrics(GOLDS, PREDICTIONS, matching=Matching.STRICT, labels=["happy", "sad", "fear"])
    assert metrics.confusion == ((5, 1, 0, 0), (0, 2, 0, 1), (1, 0, 0, 0))
    assert metrics.num_clips == 10
    assert metrics.war == 0.7
    assert metrics.recalls == {"happy": 5 / 6, "sad": 2 / 3, "fear": 0.0}
    assert metrics.uar == pytest.approx(0.5)
    assert metrics.war_standard_error == pytest.approx(math.sqrt(0.7 * 0.3 / 10))
    uar_variance = (5 / 6 * 1 / 6 / 6 + 2 / 3 * 1 / 3 / 3) / 9
    assert metrics.uar_standard_error == pytest.approx(math.sqrt(uar_variance))


def test_recalls_have_the_standard_errors_of_their_own_classes() -> None:
    metrics = emotion_metrics(GOLDS, PREDICTIONS, matching=Matching.STRICT, labels=["happy", "sad", "fear"])
    assert [metrics.class_size(label) for label in metrics.labels] == [6, 3, 1]
    assert metrics.recall_standard_error("happy") == pytest.approx(math.sqrt(5 / 6 * 1 / 6 / 6))
    assert metrics.recall_standard_error("fear") == 0.0


def test_uar_counts_only_classes_that_are_present_in_the_gold() -> None:
    metrics = emotion_metrics(["a", "b"], ["a", "c"], matching=Matching.STRICT, labels=["a", "b", "c"])
    assert metrics.uar == 0.5
    assert set(metrics.recalls) == {"a", "b"}
    assert metrics.confusion[1] == (0, 0, 1, 0)


def test_war_is_the_accuracy_and_uar_agrees_with_it_on_balanced_classes() -> None:
    golds = ["a", "b", "c"] * 4
    predictions = ["a", "c", "c"] * 4
    metrics = emotion_metrics(golds, predictions, matching=Matching.STRICT)
    assert metrics.war == pytest.approx(metrics.uar) == pytest.approx(2 / 3)
    assert metrics.labels == ("a", "b", "c")


def test_the_published_ravdess_standard_error() -> None:
    golds = ["a"] * 300
    metrics = emotion_metrics(golds, ["a"] * 129 + ["b"] * 171, matching=Matching.STRICT)
    assert 100 * metrics.war == 43.0
    assert 100 * metrics.war_standard_error == pytest.approx(2.9, abs=0.05)


def test_strict_compares_strings_and_alias_compares_labels() -> None:
    golds = ["angry", "Happy", "fear"]
    predictions = ["Anger.", "Happy", "terror"]
    strict = emotion_metrics(golds, predictions, matching=Matching.STRICT)
    alias = emotion_metrics(golds, predictions, matching=Matching.ALIAS)
    assert strict.war == pytest.approx(1 / 3)
    assert alias.war == pytest.approx(2 / 3)
    assert alias.labels == ("angry", "fear", "happy")


@pytest.mark.parametrize(
    ("text", "strict", "alias"),
    [
        ("<think>x</think>\n<answer>Anger</answer>", "Anger", "angry"),
        ("<answer>\nsad\n</answer>", "sad", "sad"),
        (" sad.", "sad.", "sad"),
        ("<answer>sad</answer><answer>happy</answer>", "sad", "sad"),
        ("", "", ""),
    ],
)
def test_the_label_of_a_completion(text: str, strict: str, alias: str) -> None:
    assert predicted_label(text, Matching.STRICT) == strict
    assert predicted_label(text, Matching.ALIAS) == alias


def test_gold_labels_that_are_not_listed_are_refused() -> None:
    with pytest.raises(ValueError, match="gold labels 'calm' are not among 'happy', 'sad'"):
        emotion_metrics(["calm"], ["sad"], matching=Matching.STRICT, labels=["happy", "sad"])


@pytest.mark.parametrize(("golds", "predictions"), [([], []), (["a"], [])])
def test_nothing_to_compare_is_refused(golds: list[str], predictions: list[str]) -> None:
    with pytest.raises(ValueError, match="one prediction per gold label"):
        emotion_metrics(golds, predictions, matching=Matching.STRICT)


def test_a_pair_is_read_among_its_own_clips() -> None:
    golds = ["surprise"] * 4 + ["fear"] * 2 + ["happy"]
    predictions = ["surprise", "surprise", "fear", "happy", "fear", "surprise", "fear"]
    (pair,) = pair_recalls(golds, predictions, [("surprise", "fear")], matching=Matching.STRICT)
    assert pair.recalls == (0.5, 0.5)
    assert pair.num_clips == (4, 2)
    assert pair.swapped == (1, 1)
    assert pair.mean_recall == 0.5


def test_a_pair_label_without_clips_has_no_recall() -> None:
    (pair,) = pair_recalls(["fear"], ["fear"], [("surprise", "fear")], matching=Matching.STRICT)
    assert pair.recalls == (None, 1.0)
    assert pair.mean_recall is None
