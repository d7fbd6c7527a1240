"""The work that bench_step compares: random completions packed and dense, and the FLOPs and tokens that each needs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from omnigrpo.algorithm.packing import pack, split_by_budget
from omnigrpo.model.config import DecoderConfig
from omnigrpo.schema import Completion, Group, PackedGroups, PrefixInputs, SharedPrefixLayout, VersionSpan
from omnigrpo.trainer import TrainingPack
from omnigrpo_kernels.grpo_objective import BatchCounts, TokenBatch, token_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much one step does."""

    prompts: int
    prefix: int | None
    """P, rows of every prefix; None leaves the prompts as they are."""
    samples: int
    """G, completions per prompt."""
    completion: int
    """R, tokens of a completion at most."""

    def __str__(self) -> str:
        """The letters of the design."""
        return f"prompts={self.prompts} P={self.prefix} G={self.samples} R={self.completion}"


def random_groups(
    inputs: Sequence[PrefixInputs], sizes: Sizes, vocab_size: int, generator: torch.Generator
) -> list[Group]:
    """One group per prompt whose completions are R uniformly random tokens each."""
    logprobs = (-math.log(vocab_size),) * sizes.completion

    def completion() -> Completion:
        ids = torch.randint(vocab_size, (sizes.completion,), generator=generator)
        return Completion(
            token_ids=tuple(ids.tolist()),
            logprobs=logprobs,
            finish_reason="length",
            version_spans=(VersionSpan(version=0, num_tokens=sizes.completion),),
            cached_tokens=0,
        )

    count = range(sizes.samples)
    return [
        Group(inputs=i, completions=tuple(completion() for _ in count), texts=("",) * sizes.samples)
        for i in inputs
    ]


def each_alone(groups: Sequence[Group]) -> list[Group]:
    """The same completions in the same order, each with a prefix of its own."""
    return [replace(group, completions=(c,), texts=("",)) for group in groups for c in group.completions]


def training_packs(groups: Sequence[Group], *, budget_rows: int) -> list[TrainingPack]:
    """Packs under the trainer's row budget with advantages of +1 and -1 in turn, and the rollout as reference."""
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    counts = BatchCounts(
        num_sequences=len(lengths), num_tokens=sum(lengths), max_tokens=max(lengths), num_packs=1
    )
    return [_training_pack(pack(run), counts) for run in split_by_budget(groups, budget_rows)]


def token_ratio(sizes: Sizes) -> float:
    """Decoder tokens of the dense computation over those of the packed one, rho = G(P+R) / (P+GR)."""
    assert sizes.prefix is not None, "the prefix is measured by now"
    dense = sizes.samples * (sizes.prefix + sizes.completion)
    return dense / (sizes.prefix + sizes.samples * sizes.completion)


def decoder_flops(config: DecoderConfig, layout: SharedPrefixLayout) -> float:
    """One forward pass: two per weight and row, and per head, query and key that it sees 4 H; norms left out."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_width
    weights = config.width * heads + 3 * config.width * config.ffn_width
    pairs = sum(
        prefix * (prefix + 1) / 2 + sum(length * (prefix + (length + 1) / 2) for length in lengths)
        for prefix, lengths in zip(layout.prefix_lengths, layout.completion_lengths, strict=True)
    )
    attention = 4 * config.num_heads * config.head_width * pairs
    return config.num_layers * (2.0 * weights * layout.num_rows + attention)


def head_flops(config: DecoderConfig, num_rows: int) -> float:
    """One forward pass of the vocabulary head."""
    return 2.0 * num_rows * config.width * config.vocab_size


def rollout_flops(config: DecoderConfig, sizes: Sizes, copies: int) -> float:
    """R tokens of every sample from ``copies`` prefixes per prompt.

    A sample's last token is drawn and not fed, and the last row of a prefix draws the first token of all its samples.
    """
    assert sizes.prefix is not None, "the prefix is measured by now"
    fed = ((sizes.completion - 1,) * (sizes.samples // copies),) * copies
    layout = SharedPrefixLayout(prefix_lengths=(sizes.prefix,) * copies, completion_lengths=fed)
    drawing_rows = copies + sizes.samples * (sizes.completion - 1)
    return sizes.prompts * (decoder_flops(config, layout) + head_flops(config, drawing_rows))


def _training_pack(packed: PackedGroups, counts: BatchCounts) -> TrainingPack:
    lengths_C = torch.bincount(packed.sequence_C)[packed.sequence_C]
    return TrainingPack(
        pack=packed,
        batch=TokenBatch(
            advantage_C=1.0 - 2.0 * (packed.sequence_C % 2),
            weight_C=token_weights("grpo", lengths_C, counts),
            sequence_C=packed.sequence_C,
            reference_C=packed.rollout_logprob_C,
        ),
    )
