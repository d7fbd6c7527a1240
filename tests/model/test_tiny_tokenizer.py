"""The tiny model's tokenizers."""

import os
import subprocess
import sys

import pytest

from omnigrpo.model.tiny_tokenizer import (
    GATE_SPECIAL_TOKENS,
    SPECIAL_TOKENS,
    build_gate_tokenizer,
    build_tokenizer,
)

TEXTS = [
    f"<think>the voice is {a} and the mouth is {b}</think>\n"
    for a in ("high", "low")
    for b in ("open", "shut")
]
_BUILD = """
from omnigrpo.model.tiny_tokenizer import build_gate_tokenizer, build_tokenizer
import sys
texts = sys.argv[1:]
for build in (build_tokenizer, build_gate_tokenizer):
    print(build(texts).backend_tokenizer.to_str())
"""


def test_vocabularies_are_bounded_and_special_tokens_come_first() -> None:
    tokenizer, gate = build_tokenizer(TEXTS, vocab_size=300), build_gate_tokenizer(TEXTS, vocab_size=80)
    assert len(tokenizer) <= 300
    assert len(gate) <= 80
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(6))
    assert gate.convert_tokens_to_ids(list(GATE_SPECIAL_TOKENS)) == list(range(5))


def test_special_tokens_are_single_ids_inside_text() -> None:
    tokenizer = build_tokenizer(TEXTS)
    assert tokenizer.encode("a<|im_end|>\n<|video_pad|>").count(SPECIAL_TOKENS.index("<|im_end|>")) == 1


def test_training_words_get_short() -> None:
    tokenizer = build_tokenizer(TEXTS * 10)
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_gate_frames_and_lower_cases() -> None:
    gate = build_gate_tokenizer(TEXTS)
    assert gate.encode("The VOICE") == gate.encode("the voice")
    assert (gate.encode("the")[0], gate.encode("the")[-1]) == (2, 3)


def test_the_same_texts_give_the_same_tokenizers_in_another_process() -> None:
    builds = {
        subprocess.run(
            [sys.executable, "-c", _BUILD, *TEXTS],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    here = [build(TEXTS).backend_tokenizer.to_str() for build in (build_tokenizer, build_gate_tokenizer)]
    assert builds == {"".join(text + "\n" for text in here).encode()}


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 262 ids, got 200"):
        build_tokenizer(TEXTS, vocab_size=200)


def test_a_gate_vocabulary_below_the_letters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"letters, which need .* ids, got 20"):
        build_gate_tokenizer(TEXTS, vocab_size=20)
