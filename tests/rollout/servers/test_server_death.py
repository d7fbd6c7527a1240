"""Servers that freeze or are killed: groups arrive exactly once, or an error says which servers are gone."""

import os
import signal
import time

import pytest

from omnigrpo.rollout.interface import RolloutError, SamplingParams, collect

LONG = SamplingParams(temperature=1.0, max_new_tokens=100)


def under_way(server, calls: int) -> None:
    """Wait until it has begun to draw."""
    while server.counters()[0] < calls:
        time.sleep(0.05)


def test_a_frozen_server_is_given_up_and_returns_with_the_next_weights(make_engine, servers, policy):
    engine = make_engine(watch_seconds=0.5, probe_timeout_seconds=5.0)
    frozen = servers[1]
    calls = frozen.counters()[0]
    stream = engine.generate(policy.requests(6), LONG)
    under_way(frozen, calls + 1)
    frozen.signal(signal.SIGSTOP)
    try:
        indices = sorted(group.index for group in stream)
    finally:
        frozen.signal(signal.SIGCONT)
    assert indices == list(range(6))
    assert engine.servers == (servers[0].url,)

    policy.change()
    engine.publish(policy.weights(), 1)

    assert set(engine.servers) == {server.url for server in servers}
    assert frozen.get("model_info")["weight_version"] == engine._label(1)
    requests = policy.requests(4)
    assert policy.largest_difference(requests, collect(engine.generate(requests, LONG), 4)) < 1e-4


def test_a_server_that_freezes_before_new_weights_is_left_behind(make_engine, servers, policy):
    engine = make_engine(update_timeout_seconds=5.0, probe_timeout_seconds=5.0)
    frozen = servers[1]
    frozen.signal(signal.SIGSTOP)
    begun = time.monotonic()
    try:
        policy.change()
        engine.publish(policy.weights(), 1)
        assert engine.servers == (servers[0].url,)
        requests = policy.requests(2)
        assert policy.largest_difference(requests, collect(engine.generate(requests, LONG), 2)) < 1e-4
    finally:
        frozen.signal(signal.SIGCONT)
    assert time.monotonic() - begun < 60
    engine.publish(policy.weights(), 2)
    assert set(engine.servers) == {server.url for server in servers}


def test_a_router_that_ended_is_started_again(make_engine, servers, policy):
    engine = make_engine()
    calls = sum(server.counters()[0] for server in servers)
    stream = engine.generate(policy.requests(4), LONG)
    while sum(server.counters()[0] for server in servers) == calls:
        time.sleep(0.05)
    os.kill(engine.router_process_id, signal.SIGKILL)
    assert sorted(group.index for group in stream) == list(range(4))
    assert set(engine.servers) == {server.url for server in servers}


def test_a_killed_server_costs_no_group_and_no_weights_and_then_all_are_gone(make_engine, servers, policy):
    engine = make_engine()
    alive, killed = servers
    calls = killed.counters()[0]
    stream = engine.generate(policy.requests(6), LONG)
    under_way(killed, calls + 1)
    killed.kill()
    groups = list(stream)
    assert sorted(group.index for group in groups) == list(range(6))
    assert all(len(c.token_ids) == 100 for group in groups for c in group.completions)
    assert engine.counters.tokens_generated == 6 * 3 * 100, "nothing is counted twice"
    assert engine.servers == (alive.url,)

    policy.change()
    begun = time.monotonic()
    engine.publish(policy.weights(), 1)
    assert time.monotonic() - begun < 20
    requests = policy.requests(2)
    assert policy.largest_difference(requests, collect(engine.generate(requests, LONG), 2)) < 1e-4

    calls = alive.counters()[0]
    stream = engine.generate(policy.requests(4), LONG)
    under_way(alive, calls + 1)
    alive.kill()
    begun = time.monotonic()
    with pytest.raises(
        RolloutError, match=f"none of the 2 rollout servers is left.*{alive.url}.*{killed.url}"
    ):
        list(stream)
    with pytest.raises(RolloutError, match="none of the 2"):
        engine.generate(policy.requests(1), LONG)
    with pytest.raises(RolloutError, match="none of the 2"):
        engine.publish(policy.weights(), 2)
    assert time.monotonic() - begun < 20
