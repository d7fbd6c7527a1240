"""Which sentences cite what is seen or heard."""

import pytest

from omnigrpo.data.synthetic.reasoning import response
from omnigrpo.reward.modality_claims import Lexicon, find_claims


def cited(text: str, lexicon: Lexicon | None = None):
    return [(claim.modality, text[slice(*claim.span)]) for claim in find_claims(text, lexicon or Lexicon())]


def test_sentences_of_the_reasoning_by_modality() -> None:
    thought = "The mouth turns down and the brows are lowered. I hear a shaky voice! So the emotion is sad."
    assert cited(response(thought, "sad")) == [
        ("video", "The mouth turns down and the brows are lowered."),
        ("audio", "I hear a shaky voice!"),
    ]


def test_a_sentence_may_cite_both() -> None:
    text = "<think>He smiles while speaking loudly.</think><answer>happy</answer>"
    assert cited(text) == [(m, "He smiles while speaking loudly.") for m in ("video", "audio")]


@pytest.mark.parametrize(
    "text",
    ["The voice shakes.", "<answer>The voice</answer>", "<think>It is sad.</think> The voice shakes.", ""],
)
def test_only_the_reasoning_counts(text) -> None:
    assert cited(text) == []


def test_an_open_block_reaches_to_the_answer_or_the_end() -> None:
    assert cited("<think>The voice shakes.\nIt <answer>voice</answer>") == [("audio", "The voice shakes.")]
    assert cited("<think>A voice") == [("audio", "A voice")]


def test_terms_are_whole_words_of_any_case() -> None:
    assert cited("<think>FACES surface. The handle. Sayings.</think>") == [("video", "FACES surface.")]


def test_terms_can_be_added() -> None:
    lexicon = Lexicon().extended(video=["dimple*"], audio=["out loud"])
    text = "<think>Dimples show. Out loud.</think>"
    assert cited(text, lexicon) == [("video", "Dimples show."), ("audio", "Out loud.")]
    assert cited(text) == [("audio", "Out loud.")]


@pytest.mark.parametrize("term", ["", "*", "a*b", "(voice"])
def test_an_unusable_term_is_refused(term) -> None:
    with pytest.raises(ValueError, match="a term must be a word"):
        Lexicon().extended(audio=[term])
