import pytest

from omnigrpo.reward.aliases import (
    DFEW_LABELS,
    EMOTION_ALIASES,
    MAFW_LABELS,
    RAVDESS_LABELS,
    canonical_label,
)
from omnigrpo.reward.tagged_answer import Accuracy, Format, Preset, first_answer, only_answer

TAGGED = "<think>a smile</think>\n<answer>happy</answer>"


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        (TAGGED, "happy", True),
        (TAGGED, "sad", False),
        ("<answer>  happy </answer>", "happy", True),
        ("<answer>Happy</answer>", "happy", False),
        ("<answer>happiness</answer>", "happy", False),
        ("happy", "happy", True),
        ("  happy\n", "happy", True),
        ("I see: happy", "happy", False),
        ("<answer>\nhappy\n</answer>", "happy", False),
        ("<answer>sad\n</answer> <answer>happy</answer>", "happy", True),
        ("<answer>happy</answer><answer>sad</answer>", "happy", True),
        ("<answer>sad</answer><answer>happy</answer>", "happy", False),
        ("<answer>happy", "happy", False),
        ("", "happy", False),
        ("", "", True),
    ],
)
def test_reference_accuracy_keeps_the_quirks(text: str, label: str, expected: bool) -> None:
    assert Accuracy(preset=Preset.REFERENCE).is_right(text, label) is expected


@pytest.mark.parametrize(
    ("text", "label", "expected"),
    [
        (TAGGED, "happy", True),
        ("<answer>\n Happy.\n</answer>", "happy", True),
        ("<answer>happiness</answer>", "happy", True),
        ("<answer>anger</answer>", "Anger", True),
        ("<answer>joy</answer>", "happy", False),
        ("<answer>not happy</answer>", "happy", False),
        ("happy", "happy", False),
        ("<answer>happy</answer><answer>happy</answer>", "happy", False),
        ("<answer>happy</answer></answer>", "happy", False),
        ("</answer>happy<answer>", "happy", False),
        ("<answer>happy", "happy", False),
        ("", "happy", False),
    ],
)
def test_robust_accuracy_reads_the_one_answer(text: str, label: str, expected: bool) -> None:
    assert Accuracy(preset=Preset.ROBUST).is_right(text, label) is expected


@pytest.mark.parametrize(
    ("text", "reference", "robust"),
    [
        (TAGGED, True, True),
        ("<think>two\nlines</think>\n\n<answer>sad\n</answer>", True, True),
        (" " + TAGGED, False, True),
        (TAGGED + "\n", False, True),
        ("<think></think><answer></answer>", True, False),
        ("<think>a</think><answer> </answer>", True, False),
        ("<think>a</think>text<think>b</think><answer>sad</answer>", True, False),
        ("<think>a</think><answer>sad</answer><answer>happy</answer>", True, False),
        ("<think>a<think>b</think><answer>sad</answer>", True, False),
        ("<think>a</think> so <answer>sad</answer>", False, False),
        ("<answer>sad</answer><think>a</think>", False, False),
        ("<answer>sad</answer>", False, False),
        ("", False, False),
    ],
)
def test_format_of_both_presets(text: str, reference: bool, robust: bool) -> None:
    assert Format(preset=Preset.REFERENCE).is_right(text) is reference
    assert Format(preset=Preset.ROBUST).is_right(text) is robust


def test_answers_are_extracted() -> None:
    assert only_answer("<answer> a\nb </answer>") == " a\nb "
    assert first_answer("<answer> a </answer><answer>b</answer>") == "a"
    assert first_answer(" sad \n") == "sad"


@pytest.mark.parametrize(
    ("form", "label"),
    [
        ("anger", "angry"), ("disgust", "disgust"), ("fear", "fear"), ("happiness", "happy"),
        ("neutral", "neutral"), ("sadness", "sad"), ("surprise", "surprise"), ("contempt", "contemptuous"),
        ("anxiety", "anxious"), ("helplessness", "helpless"), ("disappointment", "disappointed"),
        ("fearful", "fear"), ("surprised", "surprise"), ("calm", "calm"), ("  **Anger**. ", "angry"),
    ],
)  # fmt: skip
def test_names_of_all_three_datasets_reach_their_label(form: str, label: str) -> None:
    assert canonical_label(form) == label


def test_aliases_lead_to_labels_and_never_away_from_one() -> None:
    labels = {*DFEW_LABELS, *MAFW_LABELS, *RAVDESS_LABELS}
    assert set(EMOTION_ALIASES.values()) <= labels
    assert not labels & set(EMOTION_ALIASES)
