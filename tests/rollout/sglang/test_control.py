"""Pause, memory, abort, and the end of an engine."""

import time

import pytest
from sglang_rig import assert_same, group

from omnigrpo.rollout.interface import RolloutError, collect

LONG = {"max_new_tokens": 300, "stop_token_ids": ()}


def test_pause_stops_drawing_and_resume_goes_on(rig):
    requests = [group(rig.prefix("pause"), 2)]
    expected = rig.draw(requests, rig.sampling(**LONG))
    stream = rig.engine.generate(requests, rig.sampling(**LONG))
    rig.engine.pause()
    time.sleep(2.0)
    under_way = rig.engine._admission.num_inside
    with pytest.raises(RolloutError, match="the engine is paused"):
        rig.publish()
    rig.version -= 1
    rig.engine.resume()
    (drawn,) = collect(stream, 1)
    assert under_way == 1
    assert [sample.token_ids for sample in drawn] == [sample.token_ids for sample in expected[0]]


def test_weights_are_taken_while_paused_and_idle(rig):
    rig.engine.pause()
    version = rig.publish()
    rig.engine.resume()
    (samples,) = rig.draw([group(rig.prefix("paused"))], rig.sampling())
    assert samples[0].version_spans[0].version == version


def test_release_and_restore_leave_a_working_engine(rig):
    requests = [group(rig.prefix("memory"))]
    before = rig.draw(requests, rig.sampling())
    rig.engine.release_memory()
    rig.engine.restore_memory()
    assert_same(rig.draw(requests, rig.sampling()), before)


def test_memory_is_not_released_under_way(rig):
    stream = rig.engine.generate([group(rig.prefix("busy"))], rig.sampling(**LONG))
    time.sleep(0.5)
    with pytest.raises(RolloutError, match="under way"):
        rig.engine.release_memory()
    stream.close()


def test_closing_a_stream_aborts_it_and_begins_nothing_that_waits_for_room(rig):
    stream = rig.engine.generate(
        [group(rig.prefix(f"abort {i}"), 4) for i in range(12)], rig.sampling(**LONG)
    )
    time.sleep(0.5)
    inside = rig.engine._admission.num_inside
    begun = time.monotonic()
    stream.close()
    assert 0 < inside < 12
    assert time.monotonic() - begun < 9, "it waits 10 s for groups that do not end"
    assert list(stream) == []
    assert rig.engine._admission.num_inside == 0
    rig.engine.release_memory()  # Refused by SGLang while it runs anything.
    assert rig.draw([group(rig.prefix("afterwards"))], rig.sampling())


def test_a_stream_that_takes_too_long_is_an_error(rig):
    stream = rig.engine.generate([group(rig.prefix("slow"))], rig.sampling(**LONG))
    stream._owner = type(stream._owner)(
        timeout_seconds=0.05,
        is_paused=stream._owner.is_paused,
        error=stream._owner.error,
        abort=stream._owner.abort,
    )
    with pytest.raises(RolloutError, match=r"within 0.05 s; 1 are missing, prompt 'slow' among them"):
        next(stream)
    assert rig.engine._admission.num_inside == 0
