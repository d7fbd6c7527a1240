"""Access to benchmarks/, which is a folder of scripts and no package."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a module of benchmarks/ as its scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def smoke(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a benchmark script with ``--smoke`` and return its JSON."""

    def run(script: str, *options: str) -> dict[str, Any]:
        path = tmp_path / "report.json"
        result = subprocess.run(
            [sys.executable, BENCHMARKS / script, "--smoke", "--json", path, *options],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(path.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A smoke run of the module's own ``bench`` in this process, without the op's tests; returns its JSON."""
    monkeypatch.setattr(bench, "require_green", lambda tests: None)

    def in_process(*options: str) -> dict[str, Any]:
        path = tmp_path / "report.json"
        assert bench.main(["--smoke", "--json", str(path), *options]) == 0
        return json.loads(path.read_text(encoding="utf-8"))

    return in_process
