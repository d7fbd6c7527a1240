"""Weights that reach SGLang, and those that do not."""

import copy
import os
import resource
from pathlib import Path

import pytest
import torch
from sglang_rig import assert_same, group

from omnigrpo.rollout import sglang_commands
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.schema import VersionSpan


@pytest.fixture(scope="module")
def changed(session_rig):
    """Another policy."""
    policy = copy.deepcopy(session_rig.policy)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return policy


def test_new_weights_are_generated_with(rig, changed):
    sampling = rig.sampling()
    before = rig.draw([group(rig.prefix("news"))], sampling)

    version = rig.publish(changed)

    requests = [group(rig.prefix("news", policy=changed))]
    after, expected = rig.draw(requests, sampling), rig.draw_natively(requests, sampling, changed)
    assert after[0][0].token_ids != before[0][0].token_ids
    assert_same(after, expected)
    assert {sample.version_spans for sample in after[0]} == {(VersionSpan(version=version, num_tokens=12),)}


def test_a_version_without_changed_decoder_weights(rig):
    rig.version += 1
    projectors = [item for item in rig.policy.state_dict().items() if "projector" in item[0]]
    rig.engine.publish(projectors, rig.version)
    (samples,) = rig.draw([group(rig.prefix("same"))], rig.sampling())
    assert samples[0].version_spans[0].version == rig.version


@pytest.mark.parametrize("problem", ["unknown name", "wrong shape"])
def test_weights_that_do_not_fit_change_nothing(rig, changed, problem):
    requests = [group(rig.prefix("fit"))]
    before = rig.draw(requests, rig.sampling())
    weights = dict(changed.state_dict())
    name = "model.layers.9.mlp.up_proj.weight" if problem == "unknown name" else "model.norm.weight"
    weights[name] = torch.zeros(5)
    with pytest.raises(RolloutError, match=f"keeps its old ones: {name}"):
        rig.engine.publish(weights.items(), rig.version + 1)
    assert_same(rig.draw(requests, rig.sampling()), before)


def test_sglang_itself_refuses_a_bucket_that_does_not_fit(rig, changed):
    requests = [group(rig.prefix("refused"))]
    before = rig.draw(requests, rig.sampling())
    bucket = [
        ("model.norm.weight", changed.state_dict()["model.norm.weight"]),
        ("model.nothing", torch.ones(3)),
    ]
    update = sglang_commands.update_weights(rig.engine._host.manager, bucket, ranks=1, version=99)
    with pytest.raises(RolloutError, match=r"model\.nothing is none of its weights"):
        rig.engine._run(update, what="take a wrong bucket")
    assert_same(rig.draw(requests, rig.sampling()), before)


def test_half_a_publication_stops_generation_until_a_whole_one(rig, changed, monkeypatch):
    chosen = rig.engine._buckets.choose
    wrong = ("model.nothing", torch.ones(300_000))
    monkeypatch.setattr(rig.engine._buckets, "choose", lambda weights: [*chosen(weights), wrong])
    with pytest.raises(RolloutError, match="publish all weights again"):
        rig.engine.publish(changed.state_dict().items(), rig.version + 1)
    monkeypatch.undo()
    with pytest.raises(
        RolloutError, match=rf"buckets of version {rig.version + 1} and the rest of version {rig.version}:"
    ):
        rig.engine.generate([group(rig.prefix("half"))], rig.sampling())
    rig.publish()
    assert rig.draw([group(rig.prefix("half"))], rig.sampling())


def test_publish_waits_for_what_is_under_way(rig, changed):
    stream = rig.engine.generate(
        [group(rig.prefix("under way"), 2)], rig.sampling(max_new_tokens=150, stop_token_ids=())
    )
    old = rig.version
    rig.publish(changed)
    (finished,) = list(stream)
    assert {span.version for sample in finished.completions for span in sample.version_spans} == {old}


@pytest.mark.slow
def test_200_steps_leave_memory_and_shared_memory_as_they_were(rig):
    prefix, sampling = rig.prefix("long run", ("video",)), rig.sampling(max_new_tokens=2)
    processes = [Path(f"/proc/{pid}") for pid in (os.getpid(), *rig.engine.process_ids)]

    def step() -> None:
        rig.publish()
        rig.draw([group(prefix, 2)], sampling)

    def used() -> tuple[int, int, int]:
        pages = sum(int((process / "statm").read_text().split()[1]) for process in processes)
        descriptors = sum(len(list((process / "fd").iterdir())) for process in processes)
        return pages * resource.getpagesize(), len(list(Path("/dev/shm").iterdir())), descriptors

    for _ in range(40):
        step()
    rss, segments, descriptors = used()
    for _ in range(200):
        step()
    rss_after, segments_after, descriptors_after = used()
    assert segments_after <= segments
    assert descriptors_after <= descriptors + 4
    assert rss_after - rss < 24 << 20
