"""How every benchmark runs: its own tests first, interleaved timing, peak memory, the GEMM ceiling, the report."""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from report import ROOT, Check, Row, machine, paired_ratio, row_json, section_table, versions

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt."""
GEMM_SIDES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the square product that measures the ceiling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to do the work that is measured."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None
    """Called before every run, untimed."""
    flops: float | None = None
    """Floating-point operations that one run needs; None where they are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Measurements of one variant."""

    seconds: tuple[float, ...]
    """One per round."""
    peak_bytes: int
    """Largest sum of live tensors that one run allocated, above what was live before it."""


class Bench:
    """One run of a benchmark on one device: measures, collects rows, checks and notes, and reports them."""

    def __init__(self, name: str, args: argparse.Namespace, *, dtype: torch.dtype = torch.float32) -> None:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise SystemExit(
                f"--device is cuda, but torch {torch.__version__} finds no CUDA device: use --device cpu"
            )
        self.device, self.dtype = torch.device(args.device), dtype
        if args.device == "cpu":
            _keep_freed_memory()
        self.rows: list[Row] = []
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.rounds: int = args.rounds
        self.ceiling_flops = 0.0
        """Best rate that a square GEMM in ``dtype`` has reached so far, FLOP/s; sampled before every round."""
        self._name, self._args = name, args
        self._load_at_start = os.getloadavg()[0]
        self._gemm_side = 256 if args.smoke else GEMM_SIDES[args.device]
        self._matrix = torch.randn(self._gemm_side, self._gemm_side, device=self.device).to(dtype)

    def measure(self, variants: Sequence[Variant], *, rounds: int | None = None) -> dict[str, Timing]:
        """Run every variant once to warm up, once for its memory, then in turn: ``--rounds`` times, ``rounds`` at most.

        Every other round goes backwards, so that a drift of the machine's speed falls on all variants alike.
        """
        if len({variant.name for variant in variants}) != len(variants):
            raise ValueError(f"variants must have different names, got {[v.name for v in variants]}")
        for variant in variants:
            self._run(variant)
        peaks = {variant.name: self._peak_bytes(variant) for variant in variants}
        seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
        for number in range(min(self.rounds, rounds or self.rounds)):
            self._sample_ceiling()
            for variant in variants if number % 2 == 0 else reversed(variants):
                seconds[variant.name].append(self._run(variant))
        return {name: Timing(seconds=tuple(seconds[name]), peak_bytes=peaks[name]) for name in seconds}

    def compare(
        self,
        section: str,
        variants: Sequence[Variant],
        *,
        ideal_ratios: Mapping[str, float] | None = None,
        rounds: int | None = None,
    ) -> dict[str, Timing]:
        """Measure, and add one row per variant, each in relation to the first."""
        timings = self.measure(variants, rounds=rounds)
        first, *others = (timings[variant.name].seconds for variant in variants)
        ratios = [None, *(paired_ratio(seconds, first) for seconds in others)]
        self.rows += [
            Row(
                section=section,
                name=variant.name,
                seconds=timings[variant.name].seconds,
                ratio=ratio,
                ideal_ratio=(ideal_ratios or {}).get(variant.name),
                flops=variant.flops,
                peak_bytes=timings[variant.name].peak_bytes,
            )
            for variant, ratio in zip(variants, ratios, strict=True)
        ]
        return timings

    def report(self) -> int:
        """Print tables and checks, write ``--json``, return the exit status: 1 when a full-size check fails."""
        console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
        for section in dict.fromkeys(row.section for row in self.rows):
            members = [row for row in self.rows if row.section == section]
            console.print(section_table(section, members, self.ceiling_flops))
        ceiling = f"{self.ceiling_flops / 1e9:.4g} GFLOP/s, {self.dtype} GEMM of side {self._gemm_side}"
        console.print(f"{self.device.type}; ceiling measured between the rounds: {ceiling}")
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        for check in self.checks:
            verdict = "[green]ok[/]" if check.ok else "[red]FAILED[/]"
            console.print(f"{verdict} {check.name}: {check.value:.4g} (target {check.target})")
        if self._args.json is not None:
            self._args.json.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return int(not self._args.smoke and not all(check.ok for check in self.checks))

    def to_json(self) -> dict[str, object]:
        """The whole report."""
        measured = {
            "load_at_start": round(self._load_at_start, 2),
            "gemm_gflops": self.ceiling_flops / 1e9,
            "gemm_side": self._gemm_side,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return {
            "benchmark": self._name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": {
                name: value
                for name, value in vars(self._args).items()
                if name != "json" and not isinstance(value, Path)
            },
            "notes": self.notes,
            "machine": machine(self.device) | measured,
            "versions": versions(),
            "rows": [row_json(row, self.ceiling_flops) for row in self.rows],
            "checks": [asdict(check) for check in self.checks],
        }

    def _run(self, variant: Variant) -> float:
        if variant.prepare is not None:
            variant.prepare()
        return self._seconds(variant.run)

    def _seconds(self, work: Callable[[], object]) -> float:
        self._synchronize()
        started = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _sample_ceiling(self) -> None:
        seconds = min(self._seconds(lambda: self._matrix @ self._matrix) for _ in range(4))
        self.ceiling_flops = max(self.ceiling_flops, 2 * self._gemm_side**3 / seconds)

    def _peak_bytes(self, variant: Variant) -> int:
        if variant.prepare is not None:
            variant.prepare()
        if self.device.type == "cpu":
            return _cpu_peak_bytes(variant.run)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.run()
        return torch.cuda.max_memory_allocated() - before


def arguments(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--smoke", action="store_true", help="toy sizes: shows that it runs, measures nothing"
    )
    parser.add_argument("--rounds", type=int, help="timed runs of each variant (default 5, with --smoke 2)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the report there")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, and settle the number of rounds."""
    args = parser.parse_args(argv)
    if args.rounds is None:
        args.rounds = 2 if args.smoke else 5
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json is {args.json}, but {args.json.parent} is no directory: create it first")
    return args


def require_green(tests: Sequence[str]) -> None:
    """Run the op's own tests (pytest arguments, paths from the root); SystemExit when they are red."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        tail = "\n".join((result.stdout + result.stderr).splitlines()[-30:])
        raise SystemExit(f"{tail}\n\nnothing was measured, for the op's own tests are red: fix them first")


def _keep_freed_memory() -> None:
    """Make glibc keep what is freed, as PyTorch does on a GPU: for every variant alike, the pages are there.

    A run would else begin with page faults on each large tensor: 0.1 s for 544 MB, and up to 0.9 s on a virtual
    machine that hands free pages back to its host, more than half of what some variants compute.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def _cpu_peak_bytes(work: Callable[[], object]) -> int:
    """Every allocation of a run through PyTorch's CPU allocator, from the profiler's trace."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))
