"""Two real SGLang servers on the CPU for the whole session.

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

from server_rig import Policy, Server, load_policy, start_servers

from omnigrpo.data.synthetic.dataset import SyntheticConfig, generate_dataset
from omnigrpo.demo import build_base
from omnigrpo.rollout.server_config import ServerConfig
from omnigrpo.rollout.server_engine import ServerEngine


def pytest_runtest_setup(item: pytest.Item) -> None:
    if importlib.util.find_spec("sglang") is not None:
        return
    if os.environ.get("OMNIGRPO_REQUIRE_SGLANG") == "1":
        pytest.fail("OMNIGRPO_REQUIRE_SGLANG=1, but SGLang is not installed", pytrace=False)
    pytest.skip("needs SGLang's environment: make sglang")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What ends the servers comes last."""
    items.sort(key=lambda item: item.path.name == "test_server_death.py")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A checkpoint of the demo's tiny model with random decoder, and a few clips."""
    root = tmp_path_factory.mktemp("servers")
    build_base(root / "base", seed=0)
    sizes = SyntheticConfig(num_cold_start=7, num_rl=14, num_heldout=7, num_ood=7)
    generate_dataset(root / "data", sizes, num_workers=0)
    return root


@pytest.fixture(scope="session")
def servers(root) -> Iterator[tuple[Server, ...]]:
    """Two that hold the towers, in float32."""
    started = start_servers(root / "base", root, count=2)
    yield started
    for server in started:
        server.end()


@pytest.fixture(scope="session")
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def policy(root, _threads) -> Iterator[Policy]:
    """The checkpoint's model, and prompts over the clips."""
    loaded = load_policy(root)
    yield loaded
    loaded.source.close()


@pytest.fixture
def make_engine(servers, policy):
    """Engines over both servers that have the policy's weights, as version 0."""
    engines = []

    def make(**settings) -> ServerEngine:
        config = ServerConfig(
            **({"media": "rows", "update_timeout_seconds": 30.0, "bucket_mib": 1} | settings)
        )
        engine = ServerEngine([server.url for server in servers], config, model=policy.model.config)
        engines.append(engine)
        engine.publish(policy.weights(), 0)
        return engine

    yield make
    for engine in engines:
        engine.close()
