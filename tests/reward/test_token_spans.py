"""Tokens and the characters they write, with the tiny model's byte-level tokenizer."""

import pytest

from omnigrpo.model.tiny_tokenizer import build_tokenizer
from omnigrpo.reward.token_spans import token_spans, tokens_inside

TEXTS = ["<think>The voice shakes.</think>\n<answer>fear</answer>", "naïve 你好 😀!", " two  blanks "]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["<think>The voice", "</think>\n<answer>"], vocab_size=300)


def decode_with(tokenizer):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_spans_are_those_of_the_tokenizer(tokenizer, text) -> None:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = token_spans(encoded["input_ids"], decode_with(tokenizer))
    written = "".join(text[slice(*span)] for span in dict.fromkeys(spans))
    assert written == text
    if text.isascii():
        assert list(spans) == [tuple(offsets) for offsets in encoded["offset_mapping"]]


def test_bytes_of_one_character_share_its_span(tokenizer) -> None:
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert len(ids) == 6
    assert token_spans(ids, decode_with(tokenizer)) == ((0, 1), *[(1, 2)] * 4, (2, 3))


def test_special_tokens_write_nothing(tokenizer) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert token_spans([*tokenizer.encode("a"), end], decode_with(tokenizer)) == ((0, 1), (1, 1))


def test_a_cut_character_at_the_end_is_kept(tokenizer) -> None:
    ids = tokenizer.encode("a😀")[:-1]
    spans = token_spans(ids, decode_with(tokenizer))
    assert len(spans) == len(ids)
    assert spans[-1][1] == len(decode_with(tokenizer)(ids))


def test_a_token_across_the_border_is_inside() -> None:
    assert tokens_inside([(0, 2), (2, 5), (5, 5), (5, 7)], (4, 6)) == [1, 3]
    assert tokens_inside([(0, 2)], (2, 4)) == []
