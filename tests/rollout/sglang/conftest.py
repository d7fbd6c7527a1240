"""One SGLang for the whole session.

Skipped where SGLang is not installed; an error when OMNIGRPO_REQUIRE_SGLANG=1, as ``make test`` sets in SGLang's
environment.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from sglang_rig import Rig, open_rig

from omnigrpo.demo import build_base


def pytest_runtest_setup(item: pytest.Item) -> None:
    if importlib.util.find_spec("sglang") is not None:
        return
    if os.environ.get("OMNIGRPO_REQUIRE_SGLANG") == "1":
        pytest.fail("OMNIGRPO_REQUIRE_SGLANG=1, but SGLang is not installed", pytrace=False)
    pytest.skip("needs SGLang's environment: make sglang")


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A checkpoint of the demo's tiny model with random decoder."""
    directory = tmp_path_factory.mktemp("base") / "model"
    build_base(directory, seed=0)
    return directory


@pytest.fixture(scope="session")
def session_rig(base) -> Iterator[Rig]:
    """Float32."""
    rig = open_rig(base, torch.float32)
    yield rig
    rig.engine.close()


@pytest.fixture
def rig(session_rig) -> Iterator[Rig]:
    """The session's, whose engine has the policy's own weights again after each test."""
    version = session_rig.version
    yield session_rig
    if session_rig.version != version:
        session_rig.publish()
