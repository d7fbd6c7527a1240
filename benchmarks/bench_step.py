"""One GRPO step by phase; the packed update against the dense one; rollout with a shared prefill against one a sample.

`--geometry tiny` is the demo's model on generated clips, with an empty and with a filled feature cache. `--geometry
0.5b` has Qwen2.5-0.5B's widths, `--layers` decoder layers, random weights, and random tower features instead of media.

"Dense" is each of the G sequences alone with its prefix repeated: the same decoder and objective, and the head on
completion rows only, so that the shared prefix is the whole difference. FLOPs are those of the matrix products of
decoder and head and of causal attention.
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from harness import Bench, Variant, arguments, parse, require_green
from omnigrpo.algorithm.policy import completion_logprobs
from omnigrpo.algorithm.token_metrics import TokenMetrics
from omnigrpo.group_sampler import embed
from omnigrpo.rollout.interface import GroupRequest, SamplingParams, collect
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.runtime.spans import SpanRecorder
from omnigrpo.trainer import TrainingPack
from report import Check
from step_job import Job, clips_job, random_features_job
from step_phases import measure_steps
from step_work import (
    Sizes,
    decoder_flops,
    each_alone,
    head_flops,
    random_groups,
    rollout_flops,
    token_ratio,
    training_packs,
)

OWN_TESTS = (
    "tests/algorithm/test_packing.py",
    "tests/integration/test_packed_equals_dense.py",
    "tests/rollout/test_native_engine.py",
    "-k",
    "test_packing or inside or prefilled_once or trainers",
)
SIZES = {
    "tiny": Sizes(prompts=16, prefix=None, samples=8, completion=80),
    "0.5b": Sizes(prompts=1, prefix=976, samples=8, completion=160),
}
SMOKE_SIZES = Sizes(prompts=2, prefix=None, samples=3, completion=6)
LOGPROB_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    args = _arguments(argv)
    bench = Bench("step", args, dtype=getattr(torch, args.dtype))
    require_green(OWN_TESTS)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        sizes = Sizes(
            prompts=args.prompts, prefix=args.prefix, samples=args.samples, completion=args.completion
        )
        if args.geometry == "tiny":
            job = clips_job(Path(directory), sizes, bench.device)
        else:
            job = random_features_job(sizes, bench.device, bench.dtype, layers=args.layers, smoke=args.smoke)
        bench.notes.append(job.description)
        (prefix,) = {len(item.token_ids_P) for item in job.inputs}
        sizes = replace(sizes, prefix=prefix)
        measure_steps(bench, job, sizes)
        compare_updates(bench, job, sizes)
        compare_rollouts(bench, job, sizes)
        job.trainer.sampler.source.close()
    return bench.report()


def compare_updates(bench: Bench, job: Job, sizes: Sizes) -> None:
    """Forward and backward of the policy, and of its decoder alone, packed and dense, over the same completions."""
    trainer, decoder = job.trainer, job.trainer.policy.decoder
    generator = torch.Generator().manual_seed(0)
    groups = random_groups(job.inputs, sizes, decoder.config.vocab_size, generator)
    packs = {
        name: training_packs(members, budget_rows=trainer.config.budget_rows)
        for name, members in {"packed": groups, "dense": each_alone(groups)}.items()
    }

    def train(packed: Sequence[TrainingPack]) -> None:
        for item in packed:
            trainer.accumulate(item, TokenMetrics())

    def train_decoder(packed: Sequence[TrainingPack]) -> None:
        for pack in (item.pack for item in packed):
            shape = (pack.num_rows, decoder.config.width)
            rows_TD = torch.randn(shape, device=bench.device, dtype=bench.dtype, requires_grad=True)
            hidden_TD = decoder(rows_TD, pack.positions_T.to(bench.device), pack.layout)
            hidden_TD.backward(torch.ones_like(hidden_TD))

    @torch.no_grad()
    def logprobs(packed: Sequence[TrainingPack]) -> Tensor:
        return torch.cat([completion_logprobs(trainer.policy, item.pack).logprob_T for item in packed])

    rho = token_ratio(sizes)
    head = head_flops(decoder.config, sizes.prompts * sizes.samples * sizes.completion)
    for title, work, extra in (("update", train, head), ("update, decoder alone", train_decoder, 0.0)):
        flops = {
            name: 3 * (extra + sum(decoder_flops(decoder.config, item.pack.layout) for item in packed))
            for name, packed in packs.items()
        }
        variants = [
            Variant(name=name, run=partial(work, packed), prepare=trainer.policy.zero_grad, flops=flops[name])
            for name, packed in packs.items()
        ]
        bench.compare(f"{title}, {sizes}", variants, ideal_ratios={"dense": rho})
        ratio = flops["dense"] / flops["packed"]
        bench.notes.append(
            f"{title}: dense / packed in decoder tokens (ideal) {rho:.3f}, in FLOPs {ratio:.3f}"
        )
    trainer.policy.zero_grad()
    difference = float((logprobs(packs["packed"]) - logprobs(packs["dense"])).abs().max())
    bench.checks.append(
        Check.at_most("update: |packed - dense| log-prob", difference, LOGPROB_TOLERANCE[bench.dtype])
    )


def compare_rollouts(bench: Bench, job: Job, sizes: Sizes) -> None:
    """R tokens of every sample, from one prefix with G seeds and from G prefixes with one seed each."""
    config = job.trainer.policy.decoder.config
    spans = SpanRecorder(synchronize_cuda=bench.device.type == "cuda")
    engine = NativeEngine(job.trainer.policy, spans=spans)
    sampling = SamplingParams(max_new_tokens=sizes.completion)
    with torch.no_grad():
        prefixes = embed(job.trainer.policy, job.inputs)
    phases: dict[str, list[dict[str, float]]] = defaultdict(list)
    prefilled: dict[str, int] = {}

    def generate(name: str, copies: int) -> None:
        repeated = [prefix for prefix in prefixes for _ in range(copies)]
        each = sizes.samples // copies
        requests = [
            GroupRequest(prefix=prefix, seeds=tuple(range(index * each, (index + 1) * each)))
            for index, prefix in enumerate(repeated)
        ]
        before = engine.counters
        collect(engine.generate(requests, sampling), len(requests))
        prefilled[name] = engine.counters.since(before).prefixes_prefilled
        phases[name].append(spans.drain())

    copies_of = {"shared prefill": 1, "prefill per sample": sizes.samples}
    variants = [
        Variant(name=name, run=partial(generate, name, copies), flops=rollout_flops(config, sizes, copies))
        for name, copies in copies_of.items()
    ]
    rho = token_ratio(sizes)
    bench.compare(f"rollout, {sizes}", variants, ideal_ratios={"prefill per sample": rho})
    for index, name in zip((-2, -1), copies_of, strict=True):
        timed = phases[name][-len(bench.rows[index].seconds) :]
        parts = {f"{phase} ms": 1e3 * statistics.median(t[phase] for t in timed) for phase in timed[0]}
        bench.rows[index] = replace(bench.rows[index], figures=parts)
    bench.checks.append(
        Check.at_most("rollout: prefills per prompt", prefilled["shared prefill"] / sizes.prompts, 1)
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--geometry", choices=tuple(SIZES), default="tiny")
    parser.add_argument("--layers", type=int, help="decoder layers of 0.5b (default 2 of its 24)")
    parser.add_argument("--prompts", type=int, help="groups of one step")
    parser.add_argument("--prefix", type=int, help="P; the question is lengthened to it")
    parser.add_argument("--samples", type=int, help="G")
    parser.add_argument("--completion", type=int, help="R, at most")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of 0.5b; tiny is float32")
    args = parse(parser, argv)
    if args.geometry == "tiny" and (args.layers or args.dtype):
        parser.error("--layers and --dtype belong to --geometry 0.5b")
    default = SMOKE_SIZES if args.smoke else SIZES[args.geometry]
    for name in ("prompts", "prefix", "samples", "completion"):
        setattr(args, name, getattr(default, name) if getattr(args, name) is None else getattr(args, name))
    on_accelerator = args.device == "cuda" and args.geometry == "0.5b"
    args.dtype = args.dtype or ("bfloat16" if on_accelerator else "float32")
    if args.geometry == "0.5b":
        args.layers = args.layers or 2
    return args


if __name__ == "__main__":
    raise SystemExit(main())
