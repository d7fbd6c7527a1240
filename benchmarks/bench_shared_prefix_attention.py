"""Attention over a prefix and its completions, forward and backward, against plain PyTorch and other engines' ways.

FLOPs counted are the useful ones: 4 H a pair and head forward, 10 H backward, for the pairs of a query and a key that
must meet, P^2 / 2 + G R P + G R^2 / 2. What is computed twice, or masked, is not. Dense rows have a prefix for each
sequence, so their ideal is the ratio of the pairs: what is left when attention alone is compared.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attention_peers import CUDA_PEERS, PEERS, Group, Peer, ours
from harness import Bench, Variant, arguments, parse, require_green
from report import Check, paired_ratio

OWN_TESTS = ("tests/kernels/test_shared_prefix_attention.py",)
OURS = Peer(name="ours", attend=ours)

Size = tuple[int, int, int, int, int, int]
"""P, R, G, N query heads, K key/value heads, H."""

HEADS_05B, HEADS_7B = (14, 2, 64), (28, 4, 128)
"""Of Qwen2's 0.5B and 7B models."""
SIZES: Mapping[str, Sequence[Size]] = {
    "cpu": [
        (*size, *HEADS_05B)
        for size in ((976, 160, 8), (976, 32, 8), (976, 160, 2), (4500, 300, 8), (64, 512, 8))
    ],
    "cuda": [
        *((2048, 512, 16, *heads) for heads in (HEADS_05B, HEADS_7B)),
        *((*size, *HEADS_05B) for size in ((1024, 256, 8), (4096, 1000, 16), (4500, 300, 8), (64, 512, 8))),
    ],
}
PROMISED: Mapping[str, tuple[Sequence[Size], Sequence[str]]] = {
    "cpu": (SIZES["cpu"], ("dense",)),
    "cuda": (SIZES["cuda"][:2], ("flex", "three-flash", "prefix-grouper", "dense-flash")),
}
"""Where ours is never slower than which peers."""
SMOKE_SIZES: Sequence[Size] = ((24, 5, 3, 4, 2, 16),)
ERROR_SHAPE = (300, 40, 5)
"""P, R and G, at most, of the group whose results are compared with float64."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sizes", type=_size, nargs="+", default=None, metavar="P,R,G,N,K,H")
    parser.add_argument(
        "--peers", choices=(*PEERS, *CUDA_PEERS), nargs="+", help="beside ours (default: all)"
    )
    args = parse(parser, argv)
    available = PEERS | (CUDA_PEERS if args.device == "cuda" else {})
    args.peers = args.peers or list(available)
    if missing := [name for name in args.peers if name not in available]:
        parser.error(f"--peers: {', '.join(missing)} need --device cuda")
    args.sizes = args.sizes or (SMOKE_SIZES if args.smoke else SIZES[args.device])
    require_green(OWN_TESTS)
    bench = Bench("shared_prefix_attention", args, dtype=getattr(torch, args.dtype))
    bench.notes.append(
        "errors are relative, against dense attention in float64 on a small group, over those of dense SDPA"
    )
    peers = {"ours": OURS} | {name: available[name] for name in args.peers}
    for size in args.sizes:
        prefix, completion, count, num_heads, num_kv_heads, width = size
        group = Group(
            prefix=prefix,
            completion=completion,
            size=count,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_width=width,
            device=bench.device,
        )
        promised_sizes, promised = PROMISED[args.device]
        compare(bench, peers, group, promised if args.smoke or size in promised_sizes else ())
    return bench.report()


def compare(bench: Bench, peers: Mapping[str, Peer], group: Group, never_slower_than: Iterable[str]) -> None:
    """Measure all peers on one group, with gradients and without, and check what ours promises."""
    bounds = zip((group.prefix, group.completion, group.size), ERROR_SHAPE, strict=True)
    prefix, completion, count = (min(mine, bound) for mine, bound in bounds)
    small = replace(group, prefix=prefix, completion=completion, size=count)
    errors = _errors(bench, peers, small)
    both = f"forward + backward, {group}"
    timings = bench.compare(
        both,
        [
            Variant(name=peers[name].name, run=_update(peers[name], group, bench), flops=_flops(group, 14))
            for name in errors
        ],
        ideal_ratios=_ideal(peers.values(), group),
    )
    _add_figures(bench, both, {peers[name].name: found for name, found in errors.items()})
    alone = f"forward alone, {group}"
    able = [name for name in peers if name in errors or _runs_forward(bench, peers[name], small)]
    bench.compare(
        alone,
        [
            Variant(name=peers[name].name, run=_forward(peers[name], group, bench), flops=_flops(group, 4))
            for name in able
        ],
        ideal_ratios=_ideal(peers.values(), group),
    )
    _add_figures(bench, alone, {})
    bench.checks += [
        Check.at_most(f"{what} / dense SDPA's, {group}", error, 2) for what, error in errors["ours"].items()
    ]
    bench.checks += [
        Check.at_least(
            f"{peers[name].name}'s time / ours, {group}",
            paired_ratio(timings[peers[name].name].seconds, timings["ours"].seconds),
            1,
        )
        for name in never_slower_than
        if name in errors
    ]


def _errors(bench: Bench, peers: Mapping[str, Peer], group: Group) -> dict[str, dict[str, float]]:
    """Of output and gradients, over dense SDPA's; a peer that refuses to run gets a note instead."""
    leaves = _leaves(group, bench, group.layout.num_rows)
    exact = _results(PEERS["dense"], [leaf.detach().double().requires_grad_() for leaf in leaves], group)
    base = _relative_errors(_results(PEERS["dense"], leaves, group), exact)
    found: dict[str, dict[str, float]] = {}
    for name, peer in peers.items():
        try:
            results = _results(peer, leaves, group)
        except refusals() as error:
            if name == "ours":
                raise
            _note(bench, f"{peer.name} has no backward here: {_first_line(error)}")
            continue
        if peer.note:
            _note(bench, f"{peer.name}: {peer.note}")
        ratios = [mine / dense for mine, dense in zip(_relative_errors(results, exact), base, strict=True)]
        found[name] = dict(zip(("output error", "dQ error", "dK error", "dV error"), ratios, strict=True))
    return found


def refusals() -> tuple[type[Exception], ...]:
    """What a peer raises on a device, a compiler or a version that it does not support."""
    return RuntimeError, NotImplementedError, ValueError


def _runs_forward(bench: Bench, peer: Peer, group: Group) -> bool:
    try:
        with torch.no_grad():
            q_TNH, k_TKH, v_TKH = _inputs(group, bench, group.layout.num_rows)
            peer.attend_packed(q_TNH, k_TKH, v_TKH, group)
    except refusals() as error:
        _note(bench, f"{peer.name} is left out, it does not run here: {_first_line(error)}")
        return False
    return True


def _results(peer: Peer, leaves: Sequence[Tensor], group: Group) -> list[Tensor]:
    q_TNH, k_TKH, v_TKH = leaves
    out_TNH = peer.attend_packed(q_TNH, k_TKH, v_TKH, group)
    upstream_TNH = torch.randn(out_TNH.shape, generator=torch.Generator().manual_seed(1)).to(out_TNH)
    return [out_TNH.detach(), *torch.autograd.grad(out_TNH, leaves, upstream_TNH)]


def _relative_errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [float((mine - truth).norm() / truth.norm()) for mine, truth in zip(results, exact, strict=True)]


def _update(peer: Peer, group: Group, bench: Bench) -> partial[None]:
    """Forward and backward on leaves of the peer's own rows."""
    leaves = _leaves(group, bench, _num_rows(peer, group))
    return partial(_run_update, peer, leaves, torch.randn_like(leaves[0]), group)


def _run_update(peer: Peer, leaves: Sequence[Tensor], upstream_TNH: Tensor, group: Group) -> None:
    q_TNH, k_TKH, v_TKH = leaves
    torch.autograd.grad(peer.attend(q_TNH, k_TKH, v_TKH, group), leaves, upstream_TNH)


def _forward(peer: Peer, group: Group, bench: Bench) -> partial[Tensor]:
    q_TNH, k_TKH, v_TKH = _inputs(group, bench, _num_rows(peer, group))
    return partial(torch.no_grad()(peer.attend), q_TNH, k_TKH, v_TKH, group)


def _num_rows(peer: Peer, group: Group) -> int:
    return len(group.dense_rows) if peer.is_dense else group.layout.num_rows


def _leaves(group: Group, bench: Bench, num_rows: int) -> list[Tensor]:
    return [x.requires_grad_() for x in _inputs(group, bench, num_rows)]


def _inputs(group: Group, bench: Bench, num_rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(num_rows, heads, group.head_width, generator=generator).to(bench.device, bench.dtype)
        for heads in (group.num_heads, group.num_kv_heads, group.num_kv_heads)
    ]


def _flops(group: Group, per_element: int) -> float:
    """4 forward, 10 backward."""
    return per_element * group.head_width * group.num_heads * group.pairs


def _ideal(peers: Iterable[Peer], group: Group) -> dict[str, float]:
    return {peer.name: group.dense_pairs / group.pairs for peer in peers if peer.is_dense}


def _add_figures(bench: Bench, section: str, figures: Mapping[str, Mapping[str, float]]) -> None:
    """The rate of each row of a section, and its own figures."""
    for at, row in enumerate(bench.rows):
        if row.section == section:
            assert row.flops is not None
            rate = row.flops / row.median_seconds / 1e12
            bench.rows[at] = replace(row, figures={"useful TFLOP/s": rate, **figures.get(row.name, {})})


def _note(bench: Bench, text: str) -> None:
    if text not in bench.notes:
        bench.notes.append(text)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _size(text: str) -> Size:
    prefix, completion, count, num_heads, num_kv_heads, width = (int(part) for part in text.split(","))
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise argparse.ArgumentTypeError(
            f"{num_heads} query heads: give a multiple of the {num_kv_heads} others"
        )
    return prefix, completion, count, num_heads, num_kv_heads, width


if __name__ == "__main__":
    raise SystemExit(main())
