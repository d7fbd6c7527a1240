"""Qwen2-VL's tokenizer, built from the byte-pair ranks that the package dashscope ships."""

import base64
from importlib.metadata import PackageNotFoundError, distribution

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""Ids 151643 onwards."""


def read_ranks() -> dict[bytes, int]:
    try:
        path = distribution("dashscope").locate_file("dashscope/resources/qwen.tiktoken")
    except PackageNotFoundError:
        raise RuntimeError("the tests need dashscope for Qwen's vocabulary: make setup installs it") from None
    lines = path.read_text().splitlines()  # type: ignore[attr-defined] - a path
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def byte_letters() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = (byte for byte in range(256) if byte not in printable)
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    ranks, letters = read_ranks(), byte_letters()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges: list[tuple[int, int, int, str, str]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], written(left), written(right)))
    merges.sort()
    vocab = {written(token): rank for token, rank in ranks.items()}
    tokenizer = Tokenizer(BPE(vocab, [(left, right) for *_, left, right in merges], ignore_merges=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
