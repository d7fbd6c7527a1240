"""What a benchmark reports: rows and checks, as tables and as JSON, with the machine and the versions they hold for."""

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("", "ms (quartiles)", "times the first", "ideal", "ideal ms", "of ceiling", "peak MiB", "more")
"""Times the first: this row's time over that of the table's first row. Ideal ms: its FLOPs at the measured ceiling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the report."""

    section: str
    name: str
    seconds: tuple[float, ...]
    """One per round."""
    ratio: float | None = None
    """Time of this row / time of its section's first row: the median over rounds of the ratio within a round."""
    ideal_ratio: float | None = None
    """What ``ratio`` would be if only the work that must be done took time."""
    flops: float | None = None
    """Floating-point operations that one run needs."""
    peak_bytes: int | None = None
    """Largest sum of live tensors that one run allocated, above what was live before it."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Further numbers by name."""

    @property
    def median_seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    def ideal_seconds(self, ceiling_flops: float) -> float | None:
        """Time of the row's FLOPs at the machine's ceiling."""
        return None if self.flops is None else self.flops / ceiling_flops


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """A promised figure and whether it holds."""

    name: str
    value: float
    target: str
    ok: bool

    @classmethod
    def at_least(cls, name: str, value: float, bound: float) -> "Check":
        """``value >= bound``; a NaN fails."""
        return cls(name=name, value=value, target=f">= {bound:g}", ok=value >= bound)

    @classmethod
    def at_most(cls, name: str, value: float, bound: float) -> "Check":
        """``value <= bound``; a NaN fails."""
        return cls(name=name, value=value, target=f"<= {bound:g}", ok=value <= bound)


def paired_ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round, which a change of load between rounds leaves alone."""
    return statistics.median(mine / other for mine, other in zip(seconds, base, strict=True))


def quartiles_of(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, inclusive; one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def row_json(row: Row, ceiling_flops: float) -> dict[str, object]:
    """One row as JSON; what is not known is null."""
    low, median, high = (1e3 * value for value in quartiles_of(row.seconds))
    ideal = row.ideal_seconds(ceiling_flops)
    return {
        "section": row.section,
        "name": row.name,
        "ms": {"q1": low, "median": median, "q3": high, "rounds": len(row.seconds)},
        "ratio": row.ratio,
        "ideal_ratio": row.ideal_ratio,
        "ideal_ms": None if ideal is None else 1e3 * ideal,
        "share_of_ceiling": None if ideal is None else ideal / row.median_seconds,
        "peak_bytes": row.peak_bytes,
        "figures": dict(row.figures),
    }


def section_table(title: str, rows: Sequence[Row], ceiling_flops: float) -> Table:
    """One section as a table, without the columns that it leaves empty."""
    lines = [_cells(row, ceiling_flops) for row in rows]
    table = Table(title=title, title_justify="left")
    used = [at for at in range(len(COLUMNS)) if any(line[at] for line in lines)]
    for at in used:
        table.add_column(COLUMNS[at], justify="left" if COLUMNS[at] in ("", "more") else "right")
    for line in lines:
        table.add_row(*(line[at] for at in used))
    return table


def machine(device: torch.device) -> dict[str, str | int | float]:
    """What the hardware is, and nothing that names this one."""
    found: dict[str, str | int | float] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str | None]:
    """Of what the figures depend on; the commit is None outside a git checkout."""
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"python": platform.python_version(), **packages, "commit": _commit()}


def _cells(row: Row, ceiling_flops: float) -> tuple[str, ...]:
    low, median, high = (f"{1e3 * value:.4g}" for value in quartiles_of(row.seconds))
    ideal = row.ideal_seconds(ceiling_flops)
    return (
        row.name,
        f"{median} ({low}-{high})",
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.ideal_ratio is None else f"{row.ideal_ratio:.2f}x",
        "" if ideal is None else f"{1e3 * ideal:.4g}",
        "" if ideal is None else f"{ideal / row.median_seconds:.0%}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items()),
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
