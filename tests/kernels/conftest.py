"""What tests of kernels share: each instruction set, and tests/kernels/ahead_of_time.py, by path: no package here."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from omnigrpo_kernels import extension

ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline")


def available_isas() -> list[str]:
    """Instruction sets that this CPU has, from the widest on."""
    module = extension.load()
    before, found = module.cpu_isa(), []
    for isa in ISAS:
        try:
            module.use_cpu_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    module.use_cpu_isa(before)
    return found


@pytest.fixture(params=available_isas())
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The extension on one instruction set; afterwards it is what it was."""
    module = extension.load()
    before = module.cpu_isa()
    module.use_cpu_isa(request.param)
    yield request.param
    module.use_cpu_isa(before)


@pytest.fixture(scope="session")
def ahead_of_time() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ahead_of_time", Path(__file__).parent / "ahead_of_time.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
