"""What the engine over servers does when its own side or the router fails; servers are imitated."""

import asyncio
import logging
from typing import Any

import pytest
import torch

pytest.importorskip("aiohttp")

from omnigrpo.model.config import tiny
from omnigrpo.rollout import weight_publisher
from omnigrpo.rollout.admission import Admission, Need
from omnigrpo.rollout.decoder_shapes import decoder_shapes
from omnigrpo.rollout.interface import RolloutError, SamplingParams
from omnigrpo.rollout.server_client import ServerLostError
from omnigrpo.rollout.server_config import ServerConfig
from omnigrpo.rollout.server_engine import ServerEngine
from omnigrpo.rollout.server_pool import ServerPool
from omnigrpo.rollout.server_probe import ServerInfo
from omnigrpo.rollout.weight_buckets import WeightBuckets
from omnigrpo.rollout.weight_publisher import WeightPublisher, memory_tags

CONFIG = tiny(vocab_size=64, gate_vocab_size=50)
WEIGHTS = [(name, torch.zeros(shape)) for name, shape in decoder_shapes(CONFIG.decoder).items()]


def info(*, keeps_weights: bool = False) -> ServerInfo:
    return ServerInfo(
        url="http://a:1",
        devices=1,
        capacity_rows=99,
        input_rows=90,
        dtype=torch.float32,
        version="0",
        keeps_weights=keeps_weights,
        has_sessions=False,
    )


class Client:
    """Every server does what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, object]] = []

    async def post(self, url, content, *, timeout_seconds):
        self.asked.append((url, content))

    async def close(self) -> None:
        pass


class Pool:
    """One server, always in rotation."""

    servers = (info(),)

    def __init__(self) -> None:
        self.problem: Exception | None = None
        self.checked: list[str] = []

    async def returning(self) -> list[ServerInfo]:
        return []

    async def put_back(self, infos) -> None:
        if self.problem is not None:
            raise self.problem

    async def check(self, label: str) -> None:
        self.checked.append(label)

    async def watch(self, failures) -> None:
        if self.problem is not None:
            raise self.problem

    async def take_out(self, reasons) -> None:
        assert not reasons

    def close(self) -> None:
        pass


class Group:
    """A way to send weights that fails when it is told to."""

    error: BaseException | None = None
    left = 0

    def __init__(self, client, targets, **settings) -> None:
        self.servers = targets

    async def join(self):
        return {}

    async def send(self, bucket, *, label):
        if Group.error is not None:
            raise Group.error
        return {}

    async def leave(self) -> None:
        Group.left += 1


@pytest.fixture
def engine(monkeypatch):
    """With version 0, as servers have it that were just started."""

    async def opened(self: Any, servers) -> None:
        client: Any = Client()
        pool: Any = Pool()
        self._client, self._pool = client, pool
        self._publisher = WeightPublisher(client, pool, self._config)
        self._watching = asyncio.Lock()
        self._admission = Admission(Need(rows=9, media_bytes=0))
        self._dtype = torch.float32
        self._buckets = WeightBuckets(CONFIG.decoder, torch.float32, 1 << 20)
        self._version = 0

    monkeypatch.setattr(weight_publisher, "WeightGroup", Group)
    monkeypatch.setattr(ServerEngine, "_open", opened)
    monkeypatch.setattr(Group, "error", None)
    monkeypatch.setattr(Group, "left", 0)
    engine = ServerEngine(["http://a:1"], model=CONFIG)
    yield engine
    engine.close()


@pytest.mark.parametrize("error", [RolloutError("could not be sent"), RuntimeError("out of memory")])
def test_a_publication_that_breaks_off_here_leaves_nothing_to_generate_with(engine, monkeypatch, error):
    monkeypatch.setattr(Group, "error", error)
    with pytest.raises(type(error), match=str(error)):
        engine.publish(WEIGHTS, 1)
    assert Group.left == 1, "its group is of no use any more"
    for asked in (lambda: engine.generate([], SamplingParams()), lambda: engine.publish([], 2)):
        with pytest.raises(RolloutError, match="a publication that broke off"):
            asked()
    monkeypatch.setattr(Group, "error", None)
    engine.publish(WEIGHTS, 2)
    assert list(engine.generate([], SamplingParams())) == []


def test_a_router_that_is_lost_is_told_as_what_publish_promises(engine):
    engine._pool.problem = ServerLostError("gone")
    with pytest.raises(RolloutError, match="the router did not take the servers back: gone"):
        engine.publish(WEIGHTS, 1)


def test_a_version_alone_is_given_to_servers_that_hold_the_last_one(engine):
    engine.publish(WEIGHTS, 1)
    engine.publish([], 2)
    assert engine._pool.checked == [engine._label(1)]
    assert engine._client.asked[-1] == ("http://a:1/update_weight_version", {"new_version": engine._label(2)})


def test_only_what_can_be_restored_is_released(engine):
    engine.release_memory()
    engine.restore_memory()
    expected = ("release_memory_occupation", "resume_memory_occupation")
    assert [asked for asked in engine._client.asked if asked[0].endswith("_occupation")] == [
        (f"http://a:1/{name}", {"tags": ["kv_cache"]}) for name in expected
    ]
    assert memory_tags(info(keeps_weights=True)) == {}


@pytest.mark.parametrize("problem", [RolloutError("refused"), ServerLostError("gone")])
def test_the_watch_tells_what_goes_wrong_and_goes_on(engine, caplog, problem):
    engine._pool.problem = problem
    with caplog.at_level(logging.WARNING):
        engine._loop.run(engine._look({}))
    assert f"could not be looked after: {problem}" in caplog.text


@pytest.mark.parametrize("problem", [RolloutError("no such worker"), ServerLostError("gone")])
def test_a_router_that_does_not_let_go_of_a_server_is_told(caplog, problem):
    class Router:
        async def remove(self, url: str) -> None:
            raise problem

    client: Any = Client()
    pool: Any = ServerPool(client, ["http://a:1"], CONFIG.decoder, ServerConfig())
    pool._alive["http://a:1"] = info()
    pool._router = Router()
    with caplog.at_level(logging.WARNING):
        asyncio.run(pool.take_out({"http://a:1": "lost"}))
    assert pool.servers == ()
    assert f"did not let go of http://a:1: {problem}" in caplog.text
