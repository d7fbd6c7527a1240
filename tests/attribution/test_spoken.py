"""Which tokens are reasoning and which are answer, and an answer put into another's mouth."""

import pytest

from omnigrpo.attribution.spoken import Spoken, with_answer

TEXT = "<think>The voice is low.</think>\n<answer>sad</answer>"


def spoken(rig, text: str) -> Spoken:
    return Spoken.of(rig.encoder, tuple(rig.encoder.encode_response(text)))


def written(words: Spoken, tokens) -> str:
    return "".join(words.text[slice(*words.spans[token])] for token in tokens)


@pytest.mark.parametrize("label", ["sad", "happy", "contemptuous"])
def test_an_answer_takes_the_place_of_the_own_one(rig, label) -> None:
    words = with_answer(rig.encoder, TEXT, label)
    assert words.text == TEXT.replace("sad", label)
    assert label in written(words, words.answer_tokens)
    assert len(written(words, words.answer_tokens)) <= len(label) + 2
    assert words.token_ids[-1] == rig.encoder.stop_token_ids[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>The voice is", "<think>The voice is\n<answer>sad</answer>"),
        ("sad", "sad\n<answer>sad</answer>"),
        ("<answer>happy</answer> or <answer>fear</answer>", "<answer>sad</answer>"),
        ("a <answer>hap", "a <answer>sad</answer>"),
    ],
)
def test_a_malformed_text_gets_an_answer_too(rig, text, expected) -> None:
    words = with_answer(rig.encoder, text, "sad")
    assert words.text == expected
    assert words.answer_tokens


def test_reasoning_and_answer_are_apart(rig) -> None:
    words = spoken(rig, TEXT)
    assert "The voice is low." in written(words, words.reasoning_tokens)
    assert not set(words.reasoning_tokens) & set(words.answer_tokens)
    assert spoken(rig, "sad").reasoning_tokens == spoken(rig, "<answer> </answer>").answer_tokens == []
