"""Builds the tokenizers of the tiny model: byte-level BPE for the decoder, WordPiece for the gate."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
)
"""The subset of Qwen2-VL's special tokens that the prompts use."""
GATE_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""How Qwen2 cuts text into words before BPE."""


def build_tokenizer(texts: Sequence[str], *, vocab_size: int = 512) -> "PreTrainedTokenizerFast":
    """Train the decoder's tokenizer; every byte has a token, so any text round-trips."""
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise ValueError(
            f"a byte-level vocabulary needs at least {256 + len(SPECIAL_TOKENS)} ids, got {vocab_size}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def build_gate_tokenizer(texts: Sequence[str], *, vocab_size: int = 256) -> "PreTrainedTokenizerFast":
    """Make the gate's lower-casing WordPiece tokenizer, which frames a text in [CLS] and [SEP]."""
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    words = Counter(
        word
        for text in texts
        for word, _ in pieces.pre_tokenizer.pre_tokenize_str(pieces.normalizer.normalize_str(text))
    )
    pieces.model = models.WordPiece(_word_piece_vocabulary(words, vocab_size), unk_token="[UNK]")
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, GATE_SPECIAL_TOKENS.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _word_piece_vocabulary(words: "Counter[str]", vocab_size: int) -> dict[str, int]:
    """Special tokens, every letter at the start of and inside a word, then the most frequent words.

    The tokenizers library's own WordPiece trainer numbers its pieces differently in every process.
    """
    letters = sorted({letter for word in words for letter in word})
    by_frequency = sorted(words, key=lambda word: (-words[word], word))
    pieces = [*GATE_SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters)]
    if len(pieces) > vocab_size:
        raise ValueError(
            f"the texts have {len(letters)} letters, which need {len(pieces)} ids, got {vocab_size}"
        )
    distinct = dict.fromkeys([*pieces, *by_frequency])
    return {piece: index for index, piece in enumerate(list(distinct)[:vocab_size])}
