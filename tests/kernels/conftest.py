"""tests/kernels/ahead_of_time.py for the tests of Triton kernels; by path, because tests/ is no package."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def ahead_of_time() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ahead_of_time", Path(__file__).parent / "ahead_of_time.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
