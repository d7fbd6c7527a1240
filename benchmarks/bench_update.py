"""Forward and backward of the policy update on packed groups, against the dense computation and transformers' own.

"Decoder": embeddings to hidden states and back, packed, against the same layers over a batch of the G sequences with
causal SDPA. "Update": tokens to loss to every gradient, ours (packed, fused head) against transformers' Qwen2 on the G
sequences with all logits, as R1-Omni's trainer calls it. "Split": a group in micro-batches against the whole one.

The ideal is the ratio of useful FLOPs: two per weight and row, and four per head, head width and visible pair of rows,
three times over for forward and backward; the share of the ceiling is that of the same FLOPs.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from harness import Bench, Timing, Variant, arguments, parse, require_green
from omnigrpo.algorithm.policy import completion_logprobs
from omnigrpo.model.config import DecoderConfig
from omnigrpo.schema import SharedPrefixLayout
from omnigrpo.trainer import TrainingPack
from report import Check, paired_ratio
from step_work import Sizes, decoder_flops, head_flops, random_groups, token_ratio, training_packs
from update_work import (
    TextPolicy,
    dense_hidden,
    on_device,
    reference_logprobs,
    reference_update,
    text_prefix,
    transformers_policy,
    update,
)

OWN_TESTS = (
    "tests/kernels/test_shared_prefix_attention.py",
    "tests/algorithm/test_packing.py",
    "tests/algorithm/test_split_group.py",
    "tests/model/test_qwen2.py",
)
PARTS = ("decoder", "split", "update")
GEOMETRIES = {
    "0.5b": DecoderConfig(),
    "7b": DecoderConfig(
        vocab_size=152064,
        width=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        ffn_width=18944,
        tie_word_embeddings=False,
    ),
    "smoke": DecoderConfig(vocab_size=301, width=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=96),
}
"""Qwen2.5's 0.5B and 7B models, and a toy."""
CPU_LAYERS = 4
"""Of 0.5B's 24, where nothing else is asked for: all layers cost the same."""
SMALL_VOCABULARY = 1024
"""Where the vocabulary is not what is measured."""
LONG_ROWS, LONG_ROUNDS = 20_000, 2
"""A dense batch of more rows is timed in fewer rounds on a CPU, where each takes the better part of a minute."""
DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}
"""Largest relative difference of hidden states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What one size must reach."""

    speedup: float
    """At least: dense time over packed."""
    memory: float | None = None
    """At most: packed peak over dense."""


CPU_TARGETS: Mapping[tuple[int, int, int], Targets] = {
    (976, 160, 8): Targets(speedup=4.8, memory=0.35),
    (4500, 300, 8): Targets(speedup=6.0),
    (976, 32, 8): Targets(speedup=7.0),
    (64, 512, 8): Targets(speedup=1.0),
}
"""By (P, R, G); 0.5B's widths."""
TRANSFORMERS_SPEEDUP = 4.5
"""At least, on a CPU, at the first size."""
SMOKE_SIZES = ((24, 4, 3),)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    bench = Bench("update", args, dtype=getattr(torch, args.dtype))
    require_green(OWN_TESTS)
    config = replace(GEOMETRIES[args.geometry], num_layers=args.layers)
    bench.notes.append(f"{args.layers} decoder layers of the {args.geometry} geometry, random weights")
    sizes = [Sizes(prompts=1, prefix=p, completion=r, samples=g) for p, r, g in args.sizes]
    targets = CPU_TARGETS if args.device == "cpu" else {}
    smoke_target = next(iter(targets.values()), None)
    promised = [smoke_target if args.smoke else targets.get(size) for size in args.sizes]
    if "decoder" in args.parts:
        decoder = TextPolicy(replace(config, vocab_size=1), device=bench.device, dtype=bench.dtype)
        for size, target in zip(sizes, promised, strict=True):
            compare_decoders(bench, decoder, size, target)
    if "split" in args.parts:
        small = replace(config, vocab_size=min(SMALL_VOCABULARY, config.vocab_size))
        compare_splits(bench, TextPolicy(small, device=bench.device, dtype=bench.dtype), sizes[0])
    if "update" in args.parts:
        compare_updates(bench, TextPolicy(config, device=bench.device, dtype=bench.dtype), sizes[0])
    return bench.report()


def compare_decoders(bench: Bench, policy: TextPolicy, sizes: Sizes, targets: Targets | None) -> None:
    """The decoder alone, packed and dense, over the same rows."""
    decoder, shape = policy.decoder, _shape(sizes)
    packed, dense = _layouts(sizes)
    (prefix,), (lengths,) = packed.prefix_lengths, packed.completion_lengths
    positions_T = torch.cat(
        [torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in lengths)]
    ).to(bench.device)
    rows_TD, grad_TD = torch.randn(
        2, packed.num_rows, decoder.config.width, device=bench.device, dtype=bench.dtype
    )
    sequences_GL = _sequence_rows(sizes).to(bench.device)

    def run_packed(leaf_TD: Tensor) -> Tensor:
        return decoder(leaf_TD, positions_T, packed)

    def run_dense(leaf_GLD: Tensor) -> Tensor:
        return dense_hidden(decoder, leaf_GLD)

    variants = [
        Variant(
            name=name,
            run=partial(_forward_backward, run, inputs, grads),
            prepare=policy.zero_grad,
            flops=3 * decoder_flops(decoder.config, layout),
        )
        for name, run, inputs, grads, layout in (
            ("packed", run_packed, rows_TD, grad_TD, packed),
            ("dense", run_dense, rows_TD[sequences_GL], grad_TD[sequences_GL].flatten(0, 1), dense),
        )
    ]
    is_long = dense.num_rows > LONG_ROWS and bench.device.type == "cpu"
    timings = _compare(bench, f"decoder, {shape}", variants, rounds=LONG_ROUNDS if is_long else None)
    _add_figures(bench, f"decoder, {shape}", {"dense": {"token ratio": token_ratio(sizes)}})
    if "dense" not in timings:
        return
    with torch.no_grad():
        mine, theirs = run_packed(rows_TD)[sequences_GL], run_dense(rows_TD[sequences_GL])
    difference = float((mine.flatten(0, 1).float() - theirs.float()).norm() / theirs.float().norm())
    bench.checks.append(
        Check.at_most(f"|packed - dense| hidden states, {shape}", difference, DIFFERENCE[bench.dtype])
    )
    if targets is not None:
        bench.checks += _decoder_checks(shape, timings, targets)


def compare_splits(bench: Bench, policy: TextPolicy, sizes: Sizes) -> None:
    """A group whole, and in micro-batches of two completions; then one of twice the completions in the same budget."""
    assert sizes.prefix is not None
    budget_rows = sizes.prefix + 2 * sizes.completion
    config = policy.decoder.config
    twice = replace(sizes, samples=2 * sizes.samples)
    variants = []
    for name, members, budget in (
        ("whole", sizes, None),
        ("split", sizes, budget_rows),
        ("split, twice the completions", twice, budget_rows),
    ):
        item = _training_pack(bench, members, config.vocab_size)
        run = partial(update, policy, item, item.pack.num_rows if budget is None else budget)
        variants.append(
            Variant(name=name, run=run, prepare=policy.zero_grad, flops=_update_flops(config, item))
        )
    shape = f"{_shape(sizes)}, budget {budget_rows} rows"
    timings = _compare(bench, f"split, {shape}", variants)
    whole, split, larger = (timings[variant.name] for variant in variants)
    bench.notes.append(
        f"split, {shape}: peak memory of split / whole {split.peak_bytes / whole.peak_bytes:.3f}, "
        f"in rows {budget_rows / (sizes.prefix + sizes.samples * sizes.completion):.3f}"
    )
    growth = larger.peak_bytes / split.peak_bytes
    bench.checks.append(Check.at_most(f"split: peak of 2 G / peak of G, {shape}", growth, 1.05))


def compare_updates(bench: Bench, policy: TextPolicy, sizes: Sizes) -> None:
    """Tokens to gradients: the packed update and transformers' on the same completions."""
    config = policy.decoder.config
    item = _training_pack(bench, sizes, config.vocab_size)
    theirs = transformers_policy(policy)
    ids_GL = _sequence_ids(item).to(bench.device)
    by_sequence = (sizes.samples, sizes.completion)
    advantage_G = item.batch.advantage_C.view(by_sequence)[:, 0]
    assert item.batch.reference_C is not None
    reference_GR = item.batch.reference_C.view(by_sequence)
    _, dense = _layouts(sizes)
    flops = {
        "ours": _update_flops(config, item),
        "transformers": 3 * (decoder_flops(config, dense) + head_flops(config, dense.num_rows)),
    }
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": partial(update, policy, item, item.pack.num_rows),
        "transformers": partial(reference_update, theirs, ids_GL, advantage_G, reference_GR),
    }
    variants = [
        Variant(name=name, run=run, prepare=policy.zero_grad, flops=flops[name]) for name, run in runs.items()
    ]
    shape = _shape(sizes)
    timings = _compare(bench, f"update, {shape}", variants)
    if "transformers" not in timings:
        return
    with torch.no_grad():
        mine_C = completion_logprobs(policy, item.pack).logprob_T
        theirs_C = reference_logprobs(theirs, ids_GL, sizes.completion).flatten()
    difference = float((mine_C.float() - theirs_C.float()).abs().mean())
    bench.checks.append(Check.at_most(f"|ours - transformers'| mean log-prob, {shape}", difference, 0.05))
    if bench.device.type == "cpu":
        ratio = paired_ratio(timings["transformers"].seconds, timings["ours"].seconds)
        bench.checks.append(
            Check.at_least(f"transformers' time / ours, {shape}", ratio, TRANSFORMERS_SPEEDUP)
        )


def _compare(
    bench: Bench, section: str, variants: Sequence[Variant], *, rounds: int | None = None
) -> dict[str, Timing]:
    """Measure, the ratio of useful FLOPs beside the measured one; on a GPU without the memory, the first alone."""
    first, *others = variants
    assert first.flops is not None
    ideals = {other.name: other.flops / first.flops for other in others if other.flops is not None}
    try:
        timings = bench.compare(section, variants, ideal_ratios=ideals, rounds=rounds)
    except torch.OutOfMemoryError as error:
        bench.notes.append(
            f"{section}: {first.name} alone, the rest does not fit: {str(error).splitlines()[0]}"
        )
        torch.cuda.empty_cache()
        timings = bench.compare(section, [first])
    _add_figures(
        bench,
        section,
        {
            variant.name: {"useful TFLOP/s": variant.flops / 1e12}
            for variant in variants
            if variant.flops is not None
        },
        per_second=True,
    )
    return timings


def _add_figures(
    bench: Bench, section: str, figures: Mapping[str, Mapping[str, float]], *, per_second: bool = False
) -> None:
    """Put figures, or what is so many of each per run as a rate, on the rows of a section."""
    for at, row in enumerate(bench.rows):
        if row.section == section and row.name in figures:
            scale = 1 / row.median_seconds if per_second else 1.0
            added = {name: value * scale for name, value in figures[row.name].items()}
            bench.rows[at] = replace(row, figures={**row.figures, **added})


def _decoder_checks(shape: str, timings: Mapping[str, Timing], targets: Targets) -> list[Check]:
    packed, dense = timings["packed"], timings["dense"]
    speedup = paired_ratio(dense.seconds, packed.seconds)
    checks = [Check.at_least(f"dense / packed time, {shape}", speedup, targets.speedup)]
    if targets.memory is not None:
        share = packed.peak_bytes / dense.peak_bytes
        checks.append(Check.at_most(f"packed / dense peak memory, {shape}", share, targets.memory))
    return checks


def _forward_backward(run: Callable[[Tensor], Tensor], inputs: Tensor, grads: Tensor) -> None:
    run(inputs.detach().requires_grad_()).backward(grads)


def _training_pack(bench: Bench, sizes: Sizes, vocab_size: int) -> TrainingPack:
    """One group with random tokens, its constants on the device."""
    generator = torch.Generator().manual_seed(0)
    prefix = text_prefix(sizes, vocab_size, generator)
    groups = random_groups([prefix], sizes, vocab_size, generator)
    (item,) = training_packs(groups, budget_rows=1 << 30)
    return TrainingPack(pack=item.pack, batch=on_device(item.batch, bench.device))


def _update_flops(config: DecoderConfig, item: TrainingPack) -> float:
    return 3 * (
        decoder_flops(config, item.pack.layout) + head_flops(config, len(item.pack.predictor_rows_C.unique()))
    )


def _layouts(sizes: Sizes) -> tuple[SharedPrefixLayout, SharedPrefixLayout]:
    """One group packed, and its sequences each alone."""
    assert sizes.prefix is not None
    alone = (sizes.prefix + sizes.completion,) * sizes.samples
    return (
        SharedPrefixLayout(
            prefix_lengths=(sizes.prefix,), completion_lengths=((sizes.completion,) * sizes.samples,)
        ),
        SharedPrefixLayout(prefix_lengths=alone, completion_lengths=((),) * sizes.samples),
    )


def _sequence_rows(sizes: Sizes) -> Tensor:
    """Packed rows of each sequence ``[G, P + R]``."""
    assert sizes.prefix is not None
    prefix_GP = torch.arange(sizes.prefix).expand(sizes.samples, -1)
    own_GR = torch.arange(sizes.samples * sizes.completion).view(sizes.samples, -1) + sizes.prefix
    return torch.cat([prefix_GP, own_GR], dim=1)


def _sequence_ids(item: TrainingPack) -> Tensor:
    """Token ids of each sequence ``[G, P + R]``."""
    pack = item.pack
    own_GR = pack.completion_ids_C.view(pack.num_sequences, -1)
    return torch.cat([pack.inputs[0].token_ids_P.expand(pack.num_sequences, -1), own_GR], dim=1)


def _shape(sizes: Sizes) -> str:
    return f"P={sizes.prefix} R={sizes.completion} G={sizes.samples}"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--geometry", choices=("0.5b", "7b"), default="0.5b")
    parser.add_argument("--layers", type=int, help="decoder layers (default 4 on a CPU, all on a GPU)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--sizes", type=_size, nargs="+", metavar="P,R,G", help="the first is also the update's"
    )
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=PARTS, help="default: all")
    args = parse(parser, argv)
    args.sizes = args.sizes or (SMOKE_SIZES if args.smoke else tuple(CPU_TARGETS))
    if args.smoke:
        args.geometry = "smoke"
    whole = GEOMETRIES[args.geometry].num_layers
    args.layers = args.layers or (min(CPU_LAYERS, whole) if args.device == "cpu" else whole)
    return args


def _size(text: str) -> tuple[int, int, int]:
    prefix, completion, samples = (int(part) for part in text.split(","))
    if min(prefix, completion, samples) < 1:
        raise argparse.ArgumentTypeError(f"P,R,G is {text}: give three numbers of at least 1")
    return prefix, completion, samples


if __name__ == "__main__":
    raise SystemExit(main())
