"""The GRPO head, from hidden states to loss and gradients, against plain PyTorch and the peers on the same inputs.

Every head returns the gradients of hidden and weight for an upstream gradient of 1: ours the weight's in float32, the
others in the weight's dtype. FLOPs counted are the useful ones, three GEMMs, or one for the log-prob alone; what is
computed twice is not. Peak MiB is above the inputs; extra MiB is above inputs and both gradients.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from harness import Bench, Timing, Variant, arguments, parse, require_green
from head_peers import HEADS, NUM_SEQUENCES, Head, HeadProblem, naive, random_problem, refusals
from report import Check, paired_ratio

OWN_TESTS = tuple(
    f"tests/kernels/test_{op}.py"
    for op in (
        "grpo_head",
        "grpo_objective",
        "grpo_objective_cuda",
        "linear_logprob",
        "linear_token_loss",
        "vocabulary_head",
        "vocabulary_head_cuda",
        "vocabulary_rows_cuda",
    )
)
PRODUCTS = "three products"
SAMPLED_ROWS = 64
"""Rows whose log-prob is compared with float64."""

Size = tuple[int, int, int]
"""T rows, D width, V vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What our head must reach at one size."""

    products: float | None = None
    """At most: time over that of the three bare products."""
    speedups: Mapping[str, float] = field(default_factory=dict)
    """At least: time of a head over ours."""
    milliseconds: float | None = None
    """At most."""
    logits_share: float | None = None
    """At most: memory above inputs and gradients over that of the float32 logits."""
    extra_gib: float | None = None
    """At most: memory above inputs and gradients."""


CPU_SPEEDUPS = {"naive": 2.1, "chunked": 3.3}
CUDA_SPEEDUPS = {"trl": 1.4, "liger": 4.0}
TARGETS: Mapping[str, Mapping[Size, Targets]] = {
    "cpu": {
        (256, 896, 151936): Targets(products=1.0, logits_share=0.35),
        (1024, 896, 151936): Targets(products=0.9, logits_share=0.35, speedups=CPU_SPEEDUPS),
    },
    "cuda": {
        (8192, 896, 151936): Targets(milliseconds=12.5, extra_gib=1, speedups=CUDA_SPEEDUPS),
        (8192, 3584, 152064): Targets(milliseconds=43, extra_gib=1, speedups=CUDA_SPEEDUPS),
    },
}
"""By device; the sizes are the heads of Qwen2's 0.5B and 7B models."""
SMOKE_SIZES: tuple[Size, ...] = ((32, 16, 301),)
GRADIENT_ROWS, GRADIENT_VOCABULARY = 512, 4096
"""Of the problem whose gradients are compared with float64."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sizes", type=_size, nargs="+", default=None, metavar="T,D,V")
    parser.add_argument(
        "--heads", choices=HEADS, nargs="+", default=tuple(HEADS), help="beside ours (default: all)"
    )
    args = parse(parser, argv)
    targets = TARGETS[args.device]
    args.sizes = args.sizes or (SMOKE_SIZES if args.smoke else tuple(targets))
    require_green(OWN_TESTS)
    bench = Bench("grpo_head", args, dtype=getattr(torch, args.dtype))
    bench.notes.append(
        "errors are against float64: the largest of the log-prob's over sampled rows, the gradients' relative one over "
        "the naive head's on a small problem; extra MiB are above inputs and both gradients"
    )
    heads = _installed(bench, dict.fromkeys(("ours", *args.heads)))
    for size in args.sizes:
        num_rows, width, vocabulary = size
        shape = (min(num_rows, GRADIENT_ROWS), width, min(vocabulary, GRADIENT_VOCABULARY))
        errors = gradient_errors(bench, heads, shape)
        promised = tuple(targets.values())[-1] if args.smoke else targets.get(size, Targets())
        compare(bench, {name: heads[name] for name in errors}, errors, size, promised)
    return bench.report()


def compare(
    bench: Bench,
    heads: Mapping[str, Head],
    gradient_errors: Mapping[str, tuple[float, float]],
    size: Size,
    targets: Targets,
) -> None:
    """Measure every head at one size, with gradients and the log-prob alone, and check what ours promises."""
    torch.compiler.reset()  # Else compiled heads are compiled again, for any shape, and Liger's then fails.
    problem = random_problem(*size, device=bench.device, dtype=bench.dtype)
    label = "T={} D={} V={}".format(*size)
    timings = _compare_updates(bench, heads, problem, f"forward + backward, {label}")
    extra = {
        name: timings[head.name].peak_bytes - _gradient_bytes(problem, head) for name, head in heads.items()
    }
    logprob_errors = _logprob_errors(heads, problem)
    for name, head in heads.items():
        figures = {
            "extra MiB": extra[name] / 2**20,
            "log-prob error": logprob_errors[name],
            "dX error": gradient_errors[name][0],
            "dW error": gradient_errors[name][1],
        }
        _add_figures(bench, f"forward + backward, {label}", head.name, figures)
    _compare_logprobs(bench, heads, problem, f"log-prob alone, {label}")
    bench.checks += [
        Check.at_most(f"log-prob error, {label}", logprob_errors["ours"], 1e-5),
        *(
            Check.at_most(f"{what} error / naive's, {label}", error, 2)
            for what, error in zip(("dX", "dW"), gradient_errors["ours"], strict=True)
        ),
        *_time_checks(
            label, {name: timings[head.name] for name, head in heads.items()}, timings[PRODUCTS], targets
        ),
        *_memory_checks(label, extra["ours"], 4 * size[0] * size[2], targets),
    ]


def gradient_errors(bench: Bench, heads: Mapping[str, Head], size: Size) -> dict[str, tuple[float, float]]:
    """Relative errors of dX and dW against float64, over the naive head's; a head that refuses gets a note instead."""
    problem = random_problem(*size, device=bench.device, dtype=bench.dtype)
    exact = _gradients(naive(), problem.on_own_leaves(dtype=torch.float64))
    base = _relative_errors(_gradients(naive(), problem), exact)
    found: dict[str, tuple[float, float]] = {}
    for name, head in heads.items():
        try:
            gradients = _gradients(head, problem.on_own_leaves(grad_dtype=head.grad_dtype))
        except refusals() as error:
            if name == "ours":
                raise
            _note(bench, f"{head.name} is left out, it does not run here: {_first_line(error)}")
            continue
        errors = _relative_errors(gradients, exact)
        found[name] = (errors[0] / base[0], errors[1] / base[1])
        if head.note:
            _note(bench, f"{head.name}: {head.note}")
    return found


def _compare_updates(
    bench: Bench, heads: Mapping[str, Head], problem: HeadProblem, section: str
) -> dict[str, Timing]:
    problems = {name: problem.on_own_leaves(grad_dtype=head.grad_dtype) for name, head in heads.items()}

    def drop_gradients() -> None:
        for each in problems.values():
            each.drop_gradients()

    flops = 3 * _gemm_flops(problem)
    variants = [
        Variant(
            name=head.name, run=partial(_update, head, problems[name]), prepare=drop_gradients, flops=flops
        )
        for name, head in heads.items()
    ]
    logits_TV = torch.randn(problem.num_rows, problem.vocabulary, device=bench.device, dtype=bench.dtype)
    products = partial(_products, problem.hidden_TD.detach(), problem.weight_VD.detach(), logits_TV)
    variants.append(Variant(name=PRODUCTS, run=products, prepare=drop_gradients, flops=flops))
    timings = bench.compare(section, variants)
    _add_figures(bench, section, PRODUCTS, {})
    return timings


def _compare_logprobs(bench: Bench, heads: Mapping[str, Head], problem: HeadProblem, section: str) -> None:
    variants = [
        Variant(name=head.name, run=partial(_logprob, head, problem), flops=_gemm_flops(problem))
        for head in heads.values()
    ]
    bench.compare(section, variants)
    for head in heads.values():
        _add_figures(bench, section, head.name, {})


def _update(head: Head, problem: HeadProblem) -> None:
    head.loss(problem).backward()


@torch.no_grad()
def _logprob(head: Head, problem: HeadProblem) -> Tensor:
    return head.logprob(problem)


def _products(hidden_TD: Tensor, weight_VD: Tensor, logits_TV: Tensor) -> None:
    """The yardstick: the matrix products that no head can do without."""
    torch.mm(hidden_TD, weight_VD.T)
    torch.mm(logits_TV, weight_VD)
    torch.mm(logits_TV.T, hidden_TD)


def _gradients(head: Head, problem: HeadProblem) -> tuple[Tensor, Tensor]:
    problem.drop_gradients()
    _update(head, problem)
    assert problem.hidden_TD.grad is not None
    assert problem.weight_VD.grad is not None
    return problem.hidden_TD.grad, problem.weight_VD.grad


def _relative_errors(gradients: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    hidden, weight = (
        float((mine - truth).norm() / truth.norm()) for mine, truth in zip(gradients, exact, strict=True)
    )
    return hidden, weight


def _logprob_errors(heads: Mapping[str, Head], problem: HeadProblem) -> dict[str, float]:
    """Largest error over a few rows, by head."""
    rows = torch.linspace(0, problem.num_rows - 1, min(SAMPLED_ROWS, problem.num_rows)).long()
    rows = rows.to(problem.targets_T.device)
    exact = _exact_logprob(problem.hidden_TD[rows], problem.weight_VD, problem.targets_T[rows])
    return {name: float((_logprob(head, problem)[rows] - exact).abs().max()) for name, head in heads.items()}


@torch.no_grad()
def _exact_logprob(hidden_RD: Tensor, weight_VD: Tensor, targets_R: Tensor) -> Tensor:
    """In float64; the weight is never a float64 whole."""
    blocks = [hidden_RD.double() @ block.double().T for block in weight_VD.split(1 << 14)]
    return torch.cat(blocks, dim=1).log_softmax(dim=-1).gather(1, targets_R[:, None]).squeeze(1)


def _gradient_bytes(problem: HeadProblem, head: Head) -> int:
    weight_dtype = head.grad_dtype or problem.weight_VD.dtype
    return problem.hidden_TD.nbytes + problem.weight_VD.numel() * weight_dtype.itemsize


def _add_figures(bench: Bench, section: str, name: str, figures: Mapping[str, float]) -> None:
    """Put figures, and the rate that every row has, on the row of one head."""
    (at,) = (at for at, row in enumerate(bench.rows) if (row.section, row.name) == (section, name))
    row = bench.rows[at]
    assert row.flops is not None
    rate = row.flops / row.median_seconds / 1e12
    bench.rows[at] = replace(row, figures={"useful TFLOP/s": rate, **figures})


def _time_checks(
    label: str, timings: Mapping[str, Timing], products: Timing, targets: Targets
) -> list[Check]:
    mine = timings["ours"].seconds
    checks = [
        Check.at_least(f"{name}'s time / ours, {label}", paired_ratio(timings[name].seconds, mine), bound)
        for name, bound in targets.speedups.items()
        if name in timings
    ]
    if targets.products is not None:
        ratio = paired_ratio(mine, products.seconds)
        checks.append(Check.at_most(f"time / {PRODUCTS}, {label}", ratio, targets.products))
    if targets.milliseconds is not None:
        checks.append(Check.at_most(f"ms, {label}", 1e3 * statistics.median(mine), targets.milliseconds))
    return checks


def _memory_checks(label: str, extra_bytes: int, logits_bytes: int, targets: Targets) -> list[Check]:
    checks: list[Check] = []
    if targets.logits_share is not None:
        share = extra_bytes / logits_bytes
        checks.append(Check.at_most(f"extra memory / float32 logits, {label}", share, targets.logits_share))
    if targets.extra_gib is not None:
        checks.append(Check.at_most(f"extra GiB, {label}", extra_bytes / 2**30, targets.extra_gib))
    return checks


def _installed(bench: Bench, names: Iterable[str]) -> dict[str, Head]:
    """The heads of those names; a peer that is not installed gets a note instead."""
    heads: dict[str, Head] = {}
    for name in names:
        try:
            heads[name] = HEADS[name]()
        except ImportError as error:
            _note(
                bench,
                f"{name} is left out, it is not installed: {_first_line(error)} (pip install -e '.[peers]')",
            )
    return heads


def _note(bench: Bench, text: str) -> None:
    if text not in bench.notes:
        bench.notes.append(text)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _gemm_flops(problem: HeadProblem) -> float:
    return 2.0 * problem.weight_VD.numel() * problem.num_rows


def _size(text: str) -> Size:
    num_rows, width, vocabulary = (int(part) for part in text.split(","))
    if num_rows < 1 or num_rows % NUM_SEQUENCES:
        raise argparse.ArgumentTypeError(
            f"T is {num_rows}: give a multiple of {NUM_SEQUENCES}, the sequences"
        )
    return num_rows, width, vocabulary


if __name__ == "__main__":
    raise SystemExit(main())
