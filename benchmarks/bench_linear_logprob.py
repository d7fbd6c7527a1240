"""`linear_logprob` against the same through `log_softmax` of all logits, eager and compiled.

The work is a head's: forward alone (reference policy, rollout check), and forward with the gradients of hidden and
weight. FLOPs counted are the useful ones, one GEMM forward and three with gradients; what is computed twice is not.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from harness import Bench, Variant, arguments, parse, require_green
from omnigrpo_kernels.linear_logprob import LogProbs, linear_logprob, linear_logprob_reference
from report import Check

OWN_TESTS = ("tests/kernels/test_linear_logprob.py",)
SIZES = ((256, 896, 151936), (1024, 896, 151936))
"""(T rows, H width, V vocabulary): the head of a 0.5B Qwen2."""
SMOKE_SIZES = ((8, 16, 301),)
SAMPLED_ROWS = 32
"""Rows whose error is taken against float64."""

Head = Callable[[Tensor, Tensor, Tensor], LogProbs]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=None)
    parser.add_argument("--sizes", type=_size, nargs="+", default=None, metavar="T,H,V")
    args = parse(parser, argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.sizes = args.sizes or (SMOKE_SIZES if args.smoke else SIZES)
    require_green(OWN_TESTS)
    bench = Bench("linear_logprob", args, dtype=getattr(torch, args.dtype))
    heads: dict[str, Head] = {"ours": linear_logprob, "log_softmax": linear_logprob_reference}
    compiled = _compiled(bench, *args.sizes[0])
    if compiled is not None:
        heads["torch.compile"] = compiled
    for num_rows, width, vocabulary in args.sizes:
        compare(bench, heads, num_rows, width, vocabulary)
    return bench.report()


def compare(bench: Bench, heads: dict[str, Head], num_rows: int, width: int, vocabulary: int) -> None:
    """Measure every head at one size, without and with gradients, and check that ours is as exact."""
    torch.manual_seed(0)
    like = {"device": bench.device, "dtype": bench.dtype}
    hidden_TD = torch.randn(num_rows, width, **like).requires_grad_()
    weight_VD = (torch.randn(vocabulary, width, **like) * width**-0.5).requires_grad_()
    targets_T = torch.randint(vocabulary, (num_rows,), device=bench.device)
    advantage_T = torch.randn(num_rows, device=bench.device)

    def forward(head: Head) -> None:
        with torch.no_grad():
            head(hidden_TD, weight_VD, targets_T)

    def with_gradients(head: Head) -> None:
        result = head(hidden_TD, weight_VD, targets_T)
        torch.autograd.grad(result.logprob_T, (hidden_TD, weight_VD), advantage_T)

    size, gemm_flops = f"T={num_rows} H={width} V={vocabulary}", 2.0 * num_rows * width * vocabulary
    for what, work, gemms in (("forward", forward, 1), ("forward + backward", with_gradients, 3)):
        variants = [
            Variant(name=name, run=lambda head=head, work=work: work(head), flops=gemms * gemm_flops)
            for name, head in heads.items()
        ]
        bench.compare(f"{what}, {size}", variants)
    errors = [
        _error(heads[name], hidden_TD, weight_VD, targets_T[:SAMPLED_ROWS])
        for name in ("ours", "log_softmax")
    ]
    bench.checks.append(
        Check.at_most(f"log-prob error against float64 / log_softmax's own, {size}", errors[0] / errors[1], 2)
    )


@torch.no_grad()
def _error(head: Head, hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> float:
    """Root mean square over a few rows."""
    hidden_TD = hidden_TD[: len(targets_T)]
    exact = linear_logprob_reference(hidden_TD.double(), weight_VD.double(), targets_T).logprob_T
    return float((head(hidden_TD, weight_VD, targets_T).logprob_T - exact).square().mean().sqrt())


def _compiled(bench: Bench, num_rows: int, width: int, vocabulary: int) -> Head | None:
    """The reference under torch.compile, or None and a note where it does not compile."""
    head = torch.compile(linear_logprob_reference, dynamic=False)
    zeros = partial(torch.zeros, device=bench.device)
    targets_T = zeros(num_rows, dtype=torch.int64)
    try:
        with torch.no_grad():
            head(
                zeros(num_rows, width, dtype=bench.dtype),
                zeros(vocabulary, width, dtype=bench.dtype),
                targets_T,
            )
    except RuntimeError as error:  # What dynamo and inductor raise, a missing compiler included.
        bench.notes.append(f"torch.compile is left out: {str(error).strip().splitlines()[0]}")
        return None
    return head


def _size(text: str) -> tuple[int, int, int]:
    num_rows, width, vocabulary = (int(part) for part in text.split(","))
    return num_rows, width, vocabulary


if __name__ == "__main__":
    raise SystemExit(main())
