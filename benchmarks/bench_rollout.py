"""G samples of R tokens from one prefix of P rows: the native engine against transformers and SGLang.

Qwen2.5-0.5B's widths and vocabulary with `--layers` decoder layers, random weights, one prefix of P random embeddings.
All draw from softmax(logits) at temperature 1 to exactly R tokens: no token ends a sample. The first row of a table is
the native engine. ``time to first token`` is a call with R = 1. SGLang takes part where this runs in its environment
(`.venv-sglang/bin/python`), whose torch and transformers are older ones for all rows alike.

Ideal: the prefix's FLOPs at the GEMM ceiling (of this dtype or of float32, whichever is faster: a CPU without products
of bfloat16 can widen it), then R - 1 times all weights at the bandwidth ceiling, which is the best
rate at which this machine has summed (on CUDA copied) a large tensor during the run.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from harness import Bench, Variant, arguments, parse, require_green
from omnigrpo.model.config import DecoderConfig
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.schema import Prefix, SharedPrefixLayout
from report import Check
from rollout_peers import Generate, Native, Peer, SharedPrefill
from rollout_sglang import open_sglang
from step_work import Sizes, decoder_flops, head_flops
from update_work import TextPolicy, text_prefix, transformers_policy

OWN_TESTS = (
    "tests/kernels/test_skinny_linear.py",
    "tests/kernels/test_decode_attention.py",
    "tests/kernels/test_draw_tokens.py",
    "tests/rollout/test_native_engine.py",
    "-k",
    "not prefill_in_pieces",
)
TARGETS_CPU = {160: 3.0, 32: 4.5}
"""Tokens/s of native over transformers.generate, by R, at G = 8 of 0.5B with 4 layers and P = 976."""
TARGET_CUDA = 8.0
BANDWIDTH_BYTES = {"cpu": 1 << 29, "cuda": 1 << 32}
SMOKE_CONFIG = DecoderConfig(
    vocab_size=600, width=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_width=96, max_positions=512
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """What a rollout costs at least on this machine."""

    config: DecoderConfig
    weight_bytes: int
    """Of all weights that a decode step reads."""
    bandwidth: float
    """Bytes/s."""
    gemm_flops: float
    """FLOP/s."""

    def decode_bytes(self, sizes: Sizes) -> int:
        """Weights read by all decode steps of one group."""
        return self.weight_bytes * (sizes.completion - 1)

    def seconds(self, sizes: Sizes) -> float:
        """Prefill at the GEMM ceiling, decode at the bandwidth ceiling."""
        assert sizes.prefix is not None
        layout = SharedPrefixLayout(prefix_lengths=(sizes.prefix,), completion_lengths=((),))
        prefill = decoder_flops(self.config, layout) + head_flops(self.config, 1)
        return prefill / self.gemm_flops + self.decode_bytes(sizes) / self.bandwidth


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    bench = Bench("rollout", args, dtype=getattr(torch, args.dtype))
    require_green(OWN_TESTS)
    config = SMOKE_CONFIG if args.smoke else DecoderConfig(num_layers=args.layers)
    policy = TextPolicy(config, device=bench.device, dtype=bench.dtype).eval()
    widths = "toy widths" if args.smoke else "widths of Qwen2.5-0.5B"
    bench.notes.append(f"{widths}, {config.num_layers} decoder layers, random weights, {args.dtype}")
    bandwidth = measured_bandwidth(bench.device, BANDWIDTH_BYTES[args.device] >> (10 if args.smoke else 0))
    bench.notes.append(f"bandwidth ceiling {bandwidth / 1e9:.4g} GB/s")
    with ExitStack() as stack:
        prefix = make_prefix(policy, args.prefix)
        peers = [*make_peers(policy, prefix), *installed_sglang(bench, policy, prefix, stack)]
        for num_samples in args.samples:
            for num_tokens in args.completion:
                sizes = Sizes(prompts=1, prefix=args.prefix, samples=num_samples, completion=num_tokens)
                compare(bench, policy, peers, sizes, bandwidth, is_target=is_promised(args, num_samples))
    return bench.report()


def make_prefix(policy: TextPolicy, num_rows: int) -> Prefix:
    """A prefix of so many random tokens."""
    sizes = Sizes(prompts=1, prefix=num_rows, samples=1, completion=1)
    inputs = text_prefix(sizes, policy.decoder.config.vocab_size, torch.Generator().manual_seed(0))
    with torch.no_grad():
        return Prefix(inputs=inputs, embeddings_PD=policy.embed_prefixes([inputs]))


def make_peers(policy: TextPolicy, prefix: Prefix) -> tuple[Native, Generate, SharedPrefill]:
    """The native engine, and transformers in two ways."""
    theirs = transformers_policy(policy).eval()
    return (
        Native(engine=NativeEngine(policy), prefix=prefix),
        Generate(model=theirs, embeddings_PD=prefix.embeddings_PD),
        SharedPrefill(model=theirs, embeddings_PD=prefix.embeddings_PD),
    )


def installed_sglang(bench: Bench, policy: TextPolicy, prefix: Prefix, stack: ExitStack) -> list[Peer]:
    """SGLang, ended with the stack; none, and a note, where it is not installed."""
    try:
        return [stack.enter_context(open_sglang(policy, prefix))]
    except ImportError as error:
        bench.notes.append(f"SGLang is left out: {error}")
        return []


def compare(
    bench: Bench,
    policy: TextPolicy,
    peers: Sequence[Peer],
    sizes: Sizes,
    bandwidth: float,
    *,
    is_target: bool,
) -> None:
    """One table: all peers at one G and R, and the first token alone."""
    prefilled: dict[str, int] = {}

    def draw(peer: Peer, num_tokens: int) -> None:
        prefilled[peer.name] = peer.draw(sizes.samples, num_tokens)

    first = bench.measure([Variant(name=peer.name, run=partial(draw, peer, 1)) for peer in peers])
    title = f"rollout, P={sizes.prefix} G={sizes.samples} R={sizes.completion}"
    bench.compare(
        title, [Variant(name=peer.name, run=partial(draw, peer, sizes.completion)) for peer in peers]
    )
    ceiling = Ceiling(
        config=policy.decoder.config,
        weight_bytes=read_bytes(policy),
        bandwidth=bandwidth,
        gemm_flops=max(bench.ceiling_flops, float32_gemm_flops(bench.device)),
    )
    for index in range(-len(peers), 0):
        row = bench.rows[index]
        seconds = row.median_seconds
        prefill = statistics.median(first[row.name].seconds)
        steps = max(1, sizes.completion - 1)
        step = (seconds - prefill) / steps
        figures = {
            "tokens/s": sizes.samples * sizes.completion / seconds,
            "first token ms": 1e3 * prefill,
            "decode step ms": 1e3 * step,
            "of bandwidth": ceiling.weight_bytes / bandwidth / step,
            "ideal ms": 1e3 * ceiling.seconds(sizes),
            "prefix rows computed": float(prefilled[row.name]),
        }
        bench.rows[index] = replace(row, figures=figures)
    ratio = bench.rows[-len(peers) + 1].ratio
    assert ratio is not None
    target = TARGET_CUDA if bench.device.type == "cuda" else TARGETS_CPU.get(sizes.completion)
    if is_target and target is not None:
        bench.checks.append(
            Check.at_least(f"{title}: native / transformers.generate, tokens/s", ratio, target)
        )
    bench.checks.append(
        Check.at_most(f"{title}: prefix rows computed / P", prefilled["native"] / (sizes.prefix or 1), 1)
    )


def is_promised(args: argparse.Namespace, num_samples: int) -> bool:
    """Whether the sizes are those that the targets are for."""
    is_size = args.prefix == 976 and args.dtype == "bfloat16"
    if args.device == "cuda":
        return is_size and args.layers == 24
    return is_size and args.layers == 4 and num_samples == 8


def read_bytes(policy: TextPolicy) -> int:
    """Bytes of the weights that a decode step reads: all of them, but an untied embedding."""
    head = policy.head_weight_VD
    skipped = 0 if policy.lm_head is None else head.numel()
    return (sum(p.numel() for p in policy.parameters()) - skipped) * head.element_size()


def float32_gemm_flops(device: torch.device, side: int = 1024) -> float:
    """Best of five square products, FLOP/s."""
    matrix = torch.randn(side, side, device=device)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def measured_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Best of ten, bytes/s: reading a tensor on the CPU, reading and writing on CUDA."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source) if device.type == "cuda" else None
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        if target is None:
            source.sum()
        else:
            target.copy_(source)
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return num_bytes * (1 if target is None else 2) / best


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--layers", type=int, help="decoder layers (default 4 on the CPU, all 24 on CUDA)")
    parser.add_argument("--prefix", type=int, help="P, rows of the prefix (default 976)")
    parser.add_argument("--samples", type=int, nargs="+", help="G (default 8; on CUDA 4, 8, 16, 32 and 64)")
    parser.add_argument("--completion", type=int, nargs="+", help="R (default 32 and 160)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parse(parser, argv)
    on_cuda = args.device == "cuda"
    args.layers = args.layers or (24 if on_cuda else 4)
    args.prefix = args.prefix or (40 if args.smoke else 976)
    args.samples = args.samples or ([3] if args.smoke else [4, 8, 16, 32, 64] if on_cuda else [8])
    args.completion = args.completion or ([4] if args.smoke else [32, 160])
    return args


if __name__ == "__main__":
    raise SystemExit(main())
