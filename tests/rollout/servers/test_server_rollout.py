"""Groups drawn by two real SGLang servers, behind the router: tokens, log-probs, weights, control."""

import time
from dataclasses import replace

import pytest
import torch
from server_rig import free_port

from omnigrpo.model.config import tiny
from omnigrpo.rollout.interface import GroupRequest, RolloutError, SamplingParams, collect
from omnigrpo.rollout.server_config import ServerConfig
from omnigrpo.rollout.server_engine import ServerEngine
from omnigrpo.schema import VersionSpan


def test_groups_spread_over_the_servers_and_share_their_prefix_there(make_engine, servers, policy):
    engine = make_engine()
    before = [server.counters() for server in servers]
    requests = policy.requests(6, samples=4)
    rows = [len(request.prefix.embeddings_PD) for request in requests]

    groups = collect(engine.generate(requests, policy.greedy()), 6)

    done = [
        [n - b for n, b in zip(server.counters(), old, strict=True)]
        for server, old in zip(servers, before, strict=True)
    ]
    assert all(calls > 0 for calls, _, _ in done), "both servers took some of the groups"
    # A group on one server: its P rows once, less the text before the clips that groups share, and a row per sample.
    heads = [int((r.prefix.inputs.token_ids_P < 0).nonzero()[0]) for r in requests]
    most = sum(rows) + 6 * 4
    assert most - sum(heads) <= sum(prefilled for _, prefilled, _ in done) <= most
    assert [c.cached_tokens for group in groups for c in group] == [r - 1 for r in rows for _ in range(4)]
    assert engine.counters.prefix_rows == sum(rows)


@pytest.mark.parametrize("media", ["rows", "path", "bytes"])
def test_greedy_tokens_are_the_native_engines(make_engine, policy, media):
    engine = make_engine(media=media)
    requests = policy.requests(3)

    groups = collect(engine.generate(requests, policy.greedy()), 3)

    expected = policy.natively(requests, policy.greedy())
    assert [[c.token_ids for c in group] for group in groups] == [[c.token_ids for c in g] for g in expected]
    assert policy.largest_difference(requests, groups) < 1e-4


def test_a_clip_is_encoded_once_per_group(make_engine, servers, policy):
    engine = make_engine(media="path")
    before = sum(server.counters()[2] for server in servers)

    collect(engine.generate(policy.requests(4, samples=5), policy.greedy()), 4)

    assert sum(server.counters()[2] for server in servers) - before == 4 * 2, "once its video, once its audio"


@pytest.mark.parametrize("media", ["rows", "path"])
def test_generation_follows_published_weights(make_engine, servers, policy, media):
    engine = make_engine(media=media)
    sampling = SamplingParams(temperature=1.0, max_new_tokens=8)
    old = collect(engine.generate(policy.requests(2), sampling), 2)
    policy.change()

    engine.publish(policy.weights(), 3)
    requests = policy.requests(2)
    new = collect(engine.generate(requests, sampling), 2)

    assert policy.largest_difference(requests, new) < 1e-4
    assert policy.largest_difference(requests, old) > 1e-2, "the weights did change what is drawn"
    assert new[0][0].version_spans == (VersionSpan(version=3, num_tokens=8),)
    assert [server.get("model_info")["weight_version"] for server in servers] == [engine._label(3)] * 2


def test_begun_samples_go_on_where_they_stopped(make_engine, policy):
    engine = make_engine()
    requests = policy.requests(2)
    part = SamplingParams(temperature=0.0, max_new_tokens=10, token_budget=4)
    begun = collect(engine.generate(requests, part), 2)
    assert {c.finish_reason for group in begun for c in group} == {"budget"}

    engine.publish([], 1)
    rest = [
        GroupRequest(prefix=r.prefix, seeds=r.seeds, begun=b) for r, b in zip(requests, begun, strict=True)
    ]
    groups = collect(engine.generate(rest, SamplingParams(temperature=0.0, max_new_tokens=10)), 2)

    expected = policy.natively(requests, SamplingParams(temperature=0.0, max_new_tokens=10))
    assert [c.token_ids for g in groups for c in g] == [c.token_ids for g in expected for c in g]
    spans = (VersionSpan(version=0, num_tokens=4), VersionSpan(version=1, num_tokens=6))
    assert {c.version_spans for g in groups for c in g} == {spans}


def test_a_server_with_weights_of_nobodys_publication_is_not_drawn_from(make_engine, servers, policy):
    engine = make_engine()
    servers[1].post("update_weight_version", {"new_version": "0"})  # What one that was started anew says.
    groups = collect(engine.generate(policy.requests(4), policy.greedy()), 4)
    assert len(groups) == 4
    assert engine.servers == (servers[0].url,)
    engine.publish(policy.weights(), 1)
    assert set(engine.servers) == {server.url for server in servers}


def test_weights_that_do_not_fit_change_nothing(make_engine, policy):
    engine = make_engine()
    with pytest.raises(RolloutError, match=r"model\.norm\.weight has shape \(3,\)"):
        engine.publish([("model.norm.weight", torch.zeros(3))], 1)
    (group,) = collect(engine.generate(policy.requests(1), policy.greedy()), 1)
    assert group[0].version_spans[0].version == 0


def test_nothing_is_drawn_while_paused(make_engine, policy):
    engine = make_engine()
    engine.pause()
    stream = engine.generate(policy.requests(2), SamplingParams(temperature=1.0, max_new_tokens=8))
    time.sleep(1.0)
    assert engine.counters.tokens_generated == 0
    with pytest.raises(RolloutError, match="paused"):
        engine.publish([], 1)
    engine.resume()
    assert len(collect(stream, 2)) == 2


def test_closed_stream_leaves_the_servers_idle(make_engine, servers, policy):
    engine = make_engine()
    stream = engine.generate(policy.requests(4), SamplingParams(temperature=1.0, max_new_tokens=600))
    time.sleep(1.0)
    stream.close()
    begun = time.monotonic()
    engine.publish([], 1)  # Waits until no request is under way.
    engine.release_memory()
    with pytest.raises(RolloutError, match="released"):
        engine.generate(policy.requests(1), policy.greedy())
    engine.restore_memory()
    assert time.monotonic() - begun < 10
    assert len(collect(engine.generate(policy.requests(1), policy.greedy()), 1)) == 1


def test_a_clip_that_is_gone_is_named(make_engine, policy, tmp_path):
    engine = make_engine(media="path")
    (request,) = policy.requests(1)
    missing = tmp_path / "gone.mp4"
    prompt = request.prefix.inputs.prompt
    moved = _with_clip(request, missing)
    with pytest.raises(RolloutError, match=r"gone\.mp4 cannot be sent"):
        collect(engine.generate([moved], policy.greedy()), 1)
    missing.write_bytes(prompt.clip.path.read_bytes()[:2000])
    with pytest.raises(RolloutError, match="cannot be used"):
        collect(engine.generate([moved], policy.greedy()), 1)


def test_servers_that_cannot_be_used_are_named(servers, policy):
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(RolloutError, match=f"{nobody}.*cannot be reached"):
        ServerEngine([servers[0].url, nobody], model=policy.model.config)
    with pytest.raises(
        RolloutError, match=r"serves another model: its decoder is vocab=555 .* the policy's vocab=77"
    ):
        ServerEngine([servers[0].url], model=tiny(vocab_size=77, gate_vocab_size=50))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "rollout.servers is empty"),
        (["127.0.0.1:3"], "an address reads"),
        (["http://a:1", "http://a:1"], "more than once"),
    ],
)
def test_addresses_are_checked(given, message, policy):
    with pytest.raises(ValueError, match=message):
        ServerEngine(given, ServerConfig(), model=policy.model.config)


def _with_clip(request: GroupRequest, path) -> GroupRequest:
    inputs = request.prefix.inputs
    prompt = replace(inputs.prompt, clip=replace(inputs.prompt.clip, path=path))
    return replace(request, prefix=replace(request.prefix, inputs=replace(inputs, prompt=prompt)))
