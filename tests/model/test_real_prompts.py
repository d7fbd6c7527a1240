"""R1-Omni's prompts in Qwen's own vocabulary, at the real geometry."""

from pathlib import Path

import pytest
import torch
from tests.model.qwen_tokenizer import qwen_tokenizer
from transformers import PreTrainedTokenizerFast

from omnigrpo.data.dataset import INSTRUCTION
from omnigrpo.generate import INFERENCE_TEMPLATE, QUESTION
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.prompting import PromptEncoder, PromptTemplate
from omnigrpo.model.tiny_tokenizer import build_gate_tokenizer
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Clip, ClipFeatures, Modality, Prompt

ASKED = (
    "As an emotional recognition expert; throughout the video, which emotion conveyed by the characters is the most "
    "obvious to you?"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return qwen_tokenizer()


def rows(
    tokenizer: PreTrainedTokenizerFast,
    template: PromptTemplate,
    question: str,
    modalities: tuple[Modality, ...] = ("video", "audio"),
) -> list[int]:
    encoder = PromptEncoder(tokenizer, build_gate_tokenizer([ASKED]), HumanOmniConfig(), template)
    features = ClipFeatures(
        vision_FND=torch.zeros(8, 196, 768) if "video" in modalities else None,
        audio_AD=torch.zeros(500, 1280) if "audio" in modalities else None,
    )
    prompt = Prompt(
        prompt_id="0", clip=Clip(path=Path("clip.mp4")), question=question, modalities=modalities, solution=""
    )
    return encoder.encode(prompt, features).token_ids_P.tolist()


def test_special_tokens_have_qwens_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>", "<|vision_start|>")]
    assert ids == [151643, 151645, 151652]
    assert tokenizer.convert_tokens_to_ids(["<|video_pad|>", "<|vision_end|>"]) == [151656, 151653]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("<vi_start>", [27, 9971, 4906, 29]),
        ("<au_start>", [27, 2863, 4906, 29]),
        ("<vi_end>\n<au_start>", [27, 9971, 6213, 397, 27, 2863, 4906, 29]),
        ("<think>", [13708, 766, 29]),
        ("</think>", [522, 26865, 29]),
        ("<answer>", [27, 9217, 29]),
        ("</answer>", [522, 9217, 29]),
        ("</think>\n<answer>", [522, 26865, 397, 27, 9217, 29]),
    ],
)
def test_tags_are_plain_text(tokenizer: PreTrainedTokenizerFast, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids) == text


def test_the_rl_prompt_has_976_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = rows(tokenizer, PromptTemplate(), f"{ASKED}\n{INSTRUCTION}")
    assert (ids.count(VIDEO_ROW), ids.count(AUDIO_ROW), len(ids)) == (392, 500, 976)
    # <|im_start|>, <|vision_start|><|video_pad|><|vision_end|>, then the plain-text wrapper.
    assert ids[0] == 151644
    start = ids.index(151652)
    assert ids[start : start + 7] == [151652, 151656, 151653, 27, 9971, 4906, 29]
    assert ids[start + 7 : start + 7 + 392] == [VIDEO_ROW] * 392


def test_the_inference_prompt_has_974_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = rows(tokenizer, INFERENCE_TEMPLATE, QUESTION)
    assert len(ids) == 974
    assert not {151652, 151653, 151656} & set(ids)


def test_one_modality_alone_has_only_its_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    video = rows(tokenizer, INFERENCE_TEMPLATE, QUESTION, ("video",))
    audio = rows(tokenizer, INFERENCE_TEMPLATE, QUESTION, ("audio",))
    assert (video.count(VIDEO_ROW), video.count(AUDIO_ROW)) == (392, 0)
    assert (audio.count(VIDEO_ROW), audio.count(AUDIO_ROW)) == (0, 500)
