"""Prompt strings, to the letter, and token rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from omnigrpo.model.checkpoint_format import Tokenizers
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.model.tiny_tokenizer import SPECIAL_TOKENS
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Clip, ClipFeatures, Modality, Prompt

RL = PromptTemplate()
INFERENCE = PromptTemplate(vision_tokens=False)
SFT = PromptTemplate(vision_tokens=False, sft_newlines=True)
BOTH = ("video", "audio")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
END = "<|im_end|>\n<|im_start|>assistant\n"
QUESTION = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is "
    "the most obvious to you?\n"
    "Output the thinking process in <think> </think> and final emotion in <answer> </answer> tags."
)


@pytest.mark.parametrize(
    ("template", "modalities", "user"),
    [
        (
            RL,
            BOTH,
            "<|vision_start|><|video_pad|><|vision_end|><vi_start><video><vi_end>\n<au_start><audio><au_end>\n",
        ),
        (RL, ("video",), "<|vision_start|><|video_pad|><|vision_end|><vi_start><video><vi_end>\n"),
        (RL, ("audio",), "<au_start><audio><au_end>\n"),
        (RL, (), "\n"),
        (INFERENCE, BOTH, "<vi_start><video><vi_end>\n<au_start><audio><au_end>\n"),
        (SFT, BOTH, "<vi_start><video><vi_end>\n<au_start><audio><au_end>\n\n\n"),
        (SFT, ("video",), "<vi_start><video><vi_end>\n\n"),
    ],
    ids=["rl", "rl-video", "rl-audio", "rl-none", "inference", "sft", "sft-video"],
)
def test_prompt_text(template: PromptTemplate, modalities: tuple[Modality, ...], user: str) -> None:
    assert template.text(QUESTION, modalities) == SYSTEM + user + QUESTION + END


def test_system_text_can_be_another() -> None:
    template = PromptTemplate(
        system_text="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )
    assert template.text("q", ()).startswith(
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You"
    )


def test_bert_reads_the_bare_question_or_the_residue() -> None:
    assert RL.gate_text(QUESTION, BOTH) == QUESTION
    residue = replace(SFT, gate_tag_residue=True).gate_text("a\nb", BOTH)
    assert residue == "<vi_start><vi_end><au_start><audio><au_end>ab"


def test_a_subtitle_has_a_line_of_its_own_where_it_is_wanted_and_there() -> None:
    with_subtitle = replace(RL, subtitle=True)
    user = RL.text(QUESTION, BOTH)
    assert with_subtitle.text(QUESTION, BOTH, "{Oh} no!") == user.replace(
        QUESTION, f"The subtitle of this clip is: {{Oh}} no!\n{QUESTION}"
    )
    assert with_subtitle.text(QUESTION, BOTH, None) == user
    assert RL.text(QUESTION, BOTH, "Oh no!") == user


def test_a_prompts_subtitle_reaches_its_rows_but_not_the_gate(
    tokenizers: Tokenizers, small_config: HumanOmniConfig
) -> None:
    prompt = Prompt(
        prompt_id="p", clip=Clip(path=Path("a")), question="q", modalities=(), solution="s", subtitle="oh"
    )
    none = ClipFeatures(vision_FND=None, audio_AD=None)
    encoders = [
        PromptEncoder(tokenizers.text, tokenizers.gate, small_config, replace(RL, subtitle=switch))
        for switch in (True, False)
    ]
    shown, hidden = (encoder.encode(prompt, none) for encoder in encoders)
    bare = encoders[0].encode(replace(prompt, subtitle=None), none)
    assert "The subtitle of this clip is: oh\nq" in encoders[0].decode(shown.token_ids_P.tolist())
    assert hidden.token_ids_P.equal(bare.token_ids_P)
    assert shown.question_ids.equal(bare.question_ids)


def test_rows_of_a_prompt(encoder: PromptEncoder, tokenizers: Tokenizers, make_inputs) -> None:
    item = make_inputs("which emotion?")
    ids = item.token_ids_P.tolist()
    encode = lambda text: tokenizers.text.encode(text, add_special_tokens=False)  # noqa: E731
    assert ids == [
        *encode(SYSTEM + "<|vision_start|><|video_pad|><|vision_end|><vi_start>"),
        *[VIDEO_ROW] * 8,
        *encode("<vi_end>\n<au_start>"),
        *[AUDIO_ROW] * 16,
        *encode("<au_end>\nwhich emotion?" + END),
    ]
    for token in ("<|im_start|>", "<|vision_start|>", "<|video_pad|>", "<|vision_end|>"):
        assert ids.count(SPECIAL_TOKENS.index(token)) == (3 if token == "<|im_start|>" else 1)
    assert item.token_ids_P.dtype == item.question_ids.dtype == torch.int64
    assert item.question_ids.tolist() == tokenizers.gate.encode("which emotion?")
    assert (item.question_ids[0], item.question_ids[-1]) == (2, 3)


def test_end_of_text_ends_an_answer_unless_it_is_switched_off(
    encoder: PromptEncoder, tokenizers: Tokenizers
) -> None:
    end_of_turn, end_of_text = (
        tokenizers.text.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")
    )
    assert encoder.stop_token_ids == (end_of_turn, end_of_text)
    encoder.template = PromptTemplate(stop_at_end_of_text=False)
    assert encoder.stop_token_ids == (end_of_turn,)


def test_tags_are_plain_text(tokenizers: Tokenizers) -> None:
    for tag in ("<think>", "<answer>", "<vi_start>", "<au_end>"):
        assert len(tokenizers.text.encode(tag)) > 1


def test_missing_modalities_have_no_rows(make_inputs) -> None:
    assert (make_inputs(modalities=("video",)).token_ids_P == AUDIO_ROW).sum() == 0
    assert (make_inputs(modalities=("audio",)).token_ids_P == VIDEO_ROW).sum() == 0
    assert make_inputs(modalities=()).token_ids_P.min() >= 0


def test_features_must_match_the_prompt(encoder: PromptEncoder) -> None:
    prompt = Prompt(
        prompt_id="p7", clip=Clip(path=Path("a.mp4")), question="q", modalities=("audio",), solution="sad"
    )
    with pytest.raises(ValueError, match="'p7' asks for audio, but its clip gave no features"):
        encoder.encode(prompt, ClipFeatures(vision_FND=None, audio_AD=None))
    with pytest.raises(ValueError, match=r"shape \(15, 16\), this model needs \(16, 16\)"):
        encoder.encode(prompt, ClipFeatures(vision_FND=None, audio_AD=torch.zeros(15, 16)))


def test_a_long_question_keeps_its_separator(encoder: PromptEncoder, make_inputs) -> None:
    ids = make_inputs("which emotion? " * 40).question_ids
    assert (len(ids), ids[0], ids[-1]) == (48, 2, 3)


@pytest.mark.parametrize(
    "text", ["<think>a b</think>\n<answer>happy</answer>", " spaced  out ", "naïve 你好 😀\n"]
)
def test_responses_round_trip_with_an_end_of_turn(encoder: PromptEncoder, text: str) -> None:
    ids = encoder.encode_response(text)
    assert ids[-1] == encoder.stop_token_ids[0] == SPECIAL_TOKENS.index("<|im_end|>")
    assert encoder.stop_token_ids[1] == SPECIAL_TOKENS.index("<|endoftext|>")
    assert encoder.decode(ids) == text


def test_a_tokenizer_without_the_special_tokens_is_refused(
    tokenizers: Tokenizers, small_config: HumanOmniConfig
) -> None:
    with pytest.raises(ValueError, match=r"lacks the special tokens <\|im_start\|>"):
        PromptEncoder(tokenizers.gate, tokenizers.gate, small_config, RL)
