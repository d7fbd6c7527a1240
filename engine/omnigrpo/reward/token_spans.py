"""Which characters of a completion's text each of its tokens wrote."""

from collections.abc import Callable, Sequence

Span = tuple[int, int]
"""First character, and the one after the last."""

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens left out."""

_UNFINISHED = "\ufffd"
"""What a decoder writes for the first bytes of a character whose last ones are still to come."""


def token_spans(token_ids: Sequence[int], decode: Decode) -> tuple[Span, ...]:
    """One span per token, in order; they cover ``decode(token_ids)``.

    Tokens that share a character (its bytes were split) have the same span; special tokens have empty ones. Decoding
    must be a concatenation wherever a character ends, as it is for byte-level BPE.
    """
    spans: list[Span] = []
    written = first = 0
    for end in range(1, len(token_ids) + 1):
        text = decode(token_ids[first:end])
        if text.endswith(_UNFINISHED) and end < len(token_ids):
            continue
        spans += [(written, written + len(text))] * (end - first)
        written += len(text)
        first = end
    return tuple(spans)


def tokens_inside(spans: Sequence[Span], wanted: Span) -> list[int]:
    """Indices of the tokens that write at least one character of ``wanted``."""
    return [index for index, (start, end) in enumerate(spans) if max(start, wanted[0]) < min(end, wanted[1])]
