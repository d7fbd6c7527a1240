"""What every test sees: the rule of the ``gpu`` marker, torch's thread count as it was, shared builders."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    if os.environ.get("OMNIGRPO_REQUIRE_GPU") == "1":
        pytest.fail("OMNIGRPO_REQUIRE_GPU=1, but torch sees no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="module")
def _restored_threads() -> Iterator[None]:
    """A run sets torch's thread count (``run.threads``); no other module may see it."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def builders() -> ModuleType:
    """tests/builders.py; by path, because tests/ is no package."""
    spec = importlib.util.spec_from_file_location("builders", Path(__file__).parent / "builders.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
