"""Completions whose log-probs are wanted, and which of their tokens are reasoning, answer, or a claim."""

from dataclasses import dataclass

from omnigrpo.model.prompting import PromptEncoder
from omnigrpo.reward.modality_claims import reasoning_span
from omnigrpo.reward.tagged_answer import answer_span
from omnigrpo.reward.token_spans import Span, token_spans, tokens_inside
from omnigrpo.schema import Completion, VersionSpan

_ANSWER_TAG = "<answer>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Spoken:
    """Tokens to be scored after a prefix."""

    token_ids: tuple[int, ...]
    text: str
    spans: tuple[Span, ...]
    """Characters of ``text`` by token."""

    @classmethod
    def of(cls, encoder: PromptEncoder, token_ids: tuple[int, ...]) -> "Spoken":
        """These tokens."""
        text, spans = encoder.decode(token_ids), token_spans(token_ids, encoder.decode)
        return cls(token_ids=token_ids, text=text, spans=spans)

    @property
    def answer_tokens(self) -> list[int]:
        """Those that write a character inside the first answer block; none without one."""
        span = answer_span(self.text)
        return [] if span is None else self.tokens(span)

    @property
    def reasoning_tokens(self) -> list[int]:
        """Those inside the think block; none without one."""
        span = reasoning_span(self.text)
        return [] if span is None else self.tokens(span)

    def tokens(self, span: Span) -> list[int]:
        """Those that write a character of the span."""
        return tokens_inside(self.spans, span)

    def completion(self) -> Completion:
        """As packing wants it; there are no rollout log-probs."""
        return Completion(
            token_ids=self.token_ids,
            logprobs=(0.0,) * len(self.token_ids),
            finish_reason="stop",
            version_spans=(VersionSpan(version=0, num_tokens=len(self.token_ids)),),
            cached_tokens=0,
        )


def with_answer(encoder: PromptEncoder, text: str, label: str) -> Spoken:
    """What ``text`` says before its answer, and then ``label`` as the answer.

    A text without an answer block is kept whole and the block put after it. The whole is tokenised anew, since BPE may
    join a tag's last character to the label.
    """
    before, tag, _ = text.partition(_ANSWER_TAG)
    if not tag:
        before = f"{text.rstrip()}\n"
    return Spoken.of(encoder, tuple(encoder.encode_response(f"{before}{_ANSWER_TAG}{label}</answer>")))
