"""Chat text of a prompt, and its token rows with one placeholder row per modality embedding.

The strings are R1-Omni's. The wrappers ``<vi_start>`` ... ``<au_end>`` are plain text, not special tokens.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, ClipFeatures, Modality, PrefixInputs, Prompt

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

Segment = str | int
"""Text, or VIDEO_ROW / AUDIO_ROW where a modality goes."""

VISION_TOKENS = ("<|vision_start|>", "<|video_pad|>", "<|vision_end|>")
"""What Qwen2-VL's chat template puts before a video; to HumanOmni they are three ordinary tokens."""
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
SUBTITLE = "The subtitle of this clip is: {subtitle}"
"""The line of ``PromptTemplate.subtitle``."""
_START_OF_TURN = "<|im_start|>"
_TAGS = {VIDEO_ROW: "<video>", AUDIO_ROW: "<audio>"}
_MODALITY_ROWS: dict[Modality, tuple[str, int, str]] = {
    "video": ("<vi_start>", VIDEO_ROW, "<vi_end>"),
    "audio": ("<au_start>", AUDIO_ROW, "<au_end>"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTemplate:
    """How a question becomes chat text; the defaults are R1-Omni's RL prompt."""

    system_text: str = "You are a helpful assistant."
    vision_tokens: bool = True
    """Precede a video by Qwen2-VL's three vision tokens (RL: yes; inference and SFT: no)."""
    sft_newlines: bool = False
    """Put one more newline per modality before the question, as the reference's SFT does."""
    gate_tag_residue: bool = False
    """Let BERT read the wrapper text that the reference's SFT leaves before the question."""
    subtitle: bool = False
    """Put an item's subtitle, where it has one, in a line of its own before the question; BERT does not read it."""
    stop_at_end_of_text: bool = True
    """End an answer at <|endoftext|> too, not only at <|im_end|>. Without it all that follows up to <|im_end|> is
    sampled and trained on; the reference's mask of a completion also ends at <|im_end|> alone."""

    def segments(
        self, question: str, modalities: tuple[Modality, ...], subtitle: str | None = None
    ) -> list[Segment]:
        """Return the whole prompt up to the start of the answer."""
        before = f"{_START_OF_TURN}system\n{self.system_text}{END_OF_TURN}\n{_START_OF_TURN}user\n"
        after = f"{END_OF_TURN}\n{_START_OF_TURN}assistant\n"
        if self.subtitle and subtitle is not None:
            question = f"{SUBTITLE.format(subtitle=subtitle)}\n{question}"
        return _merge([before, *self._user(question, modalities), after])

    def gate_text(self, question: str, modalities: tuple[Modality, ...]) -> str:
        """Return what BERT reads."""
        if not self.gate_tag_residue:
            return question
        user = [s for s in self._user(question, modalities) if s != VIDEO_ROW and s not in VISION_TOKENS]
        return "".join(_TAGS[s] if isinstance(s, int) else s for s in user).replace("\n", "")

    def text(self, question: str, modalities: tuple[Modality, ...], subtitle: str | None = None) -> str:
        """Return the prompt as one string, with ``<video>`` and ``<audio>`` for the modality rows."""
        segments = self.segments(question, modalities, subtitle)
        return "".join(_TAGS[s] if isinstance(s, int) else s for s in segments)

    def _user(self, question: str, modalities: tuple[Modality, ...]) -> list[Segment]:
        wrapped: list[Segment] = []
        for index, modality in enumerate(modalities):
            wrapped += ["\n"] * (index > 0) + list(_MODALITY_ROWS[modality])
        tokens = VISION_TOKENS if self.vision_tokens and "video" in modalities else ()
        newlines = 1 + (len(modalities) if self.sft_newlines else 0)
        return [*tokens, *wrapped, "\n" * newlines, question]


class PromptEncoder:
    """Turns prompts into token rows, and answers into ids and back; safe to call from several threads."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        gate_tokenizer: "PreTrainedTokenizerFast",
        config: HumanOmniConfig,
        template: PromptTemplate,
    ) -> None:
        """Raises ValueError when the tokenizer lacks a special token that the template needs."""
        self._tokenizer = tokenizer
        self._gate_tokenizer = gate_tokenizer
        self._config = config
        self.template = template
        needed = (
            _START_OF_TURN,
            END_OF_TURN,
            END_OF_TEXT,
            *(VISION_TOKENS if template.vision_tokens else ()),
        )
        absent = [token for token in needed if token not in tokenizer.get_vocab()]
        if absent:
            raise ValueError(
                f"the tokenizer lacks the special tokens {', '.join(absent)}: use the tokenizer that belongs "
                "to the checkpoint, or set prompt.vision_tokens to false if only those are missing"
            )

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: end of turn and, unless the template says otherwise, end of text."""
        ends = (END_OF_TURN, END_OF_TEXT) if self.template.stop_at_end_of_text else (END_OF_TURN,)
        return tuple(self._id(token) for token in ends)

    def encode(self, prompt: Prompt, features: ClipFeatures) -> PrefixInputs:
        """Tokenise each stretch of text between modalities by itself, as the reference does.

        Raises:
            ValueError: a modality that the prompt asks for has no features, or features of another geometry.
        """
        self._check(prompt, features)
        counts = {VIDEO_ROW: self._config.vision.num_tokens, AUDIO_ROW: self._config.audio.num_tokens}
        ids: list[int] = []
        for segment in self.template.segments(prompt.question, prompt.modalities, prompt.subtitle):
            ids += [segment] * counts[segment] if isinstance(segment, int) else self._encode_text(segment)
        gate_text = self.template.gate_text(prompt.question, prompt.modalities)
        return PrefixInputs(
            prompt=prompt,
            token_ids_P=torch.tensor(ids, dtype=torch.int64),
            question_ids=torch.tensor(self._encode_question(gate_text), dtype=torch.int64),
            features=features,
        )

    def encode_response(self, text: str) -> list[int]:
        """Return the ids of an answer, the end of turn included."""
        return [*self._encode_text(text), self._id(END_OF_TURN)]

    def decode(self, token_ids: "Sequence[int]") -> str:
        """Return the text of generated ids without special tokens; nothing is stripped."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def _id(self, token: str) -> int:
        token_id = self._tokenizer.convert_tokens_to_ids(token)
        assert isinstance(token_id, int)
        return token_id

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _encode_question(self, text: str) -> list[int]:
        """Cut to BERT's positions, [SEP] kept; by hand, for a tokenizer's own truncation is shared state."""
        ids = self._gate_tokenizer.encode(text, add_special_tokens=True)
        limit = self._config.gate.max_positions
        return ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]

    def _check(self, prompt: Prompt, features: ClipFeatures) -> None:
        vision, audio = self._config.vision, self._config.audio
        expected = {
            "video": (features.vision_FND, (vision.num_frames, vision.grid**2, vision.width)),
            "audio": (features.audio_AD, (audio.num_tokens, audio.width)),
        }
        for modality in prompt.modalities:
            found, shape = expected[modality]
            if found is None:
                raise ValueError(
                    f"prompt {prompt.prompt_id!r} asks for {modality}, but its clip gave no features of it"
                )
            if tuple(found.shape) != shape:
                raise ValueError(
                    f"prompt {prompt.prompt_id!r}: {modality} features have shape {tuple(found.shape)}, "
                    f"this model needs {shape}; encode the clip with the same model"
                )


def _merge(segments: list[Segment]) -> list[Segment]:
    """Join neighbouring texts, so that tokens may span them."""
    merged: list[Segment] = []
    for segment in segments:
        if merged and isinstance(segment, str) and isinstance(merged[-1], str):
            merged[-1] += segment
        else:
            merged.append(segment)
    return merged
