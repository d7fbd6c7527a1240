"""What SGLang generates, beside the native engine and the trainer's own pass."""

import dataclasses

import pytest
import torch
from sglang_rig import BOTH, assert_same, group, open_rig, policy_logprobs

from omnigrpo.schema import VersionSpan


@pytest.mark.parametrize("modalities", [BOTH, ("video",), ("audio",)], ids="+".join)
def test_greedy_tokens_are_the_native_engines(rig, modalities):
    requests = [group(rig.prefix(f"{name}-{modalities}", modalities)) for name in "abc"]
    sampling = rig.sampling(max_new_tokens=24)

    drawn, expected = rig.draw(requests, sampling), rig.draw_natively(requests, sampling)

    assert_same(drawn, expected)
    assert len({samples[0].token_ids for samples in drawn}) == 3
    for sample in (sample for samples in drawn for sample in samples):
        assert sample.version_spans == (VersionSpan(version=rig.version, num_tokens=len(sample.token_ids)),)


def test_a_prefix_is_prefilled_once_and_each_sample_adds_one_row(rig):
    prefixes = [rig.prefix("once"), rig.prefix("at once", ("video",))]
    rig.engine.release_memory()  # Forgets prefixes of other tests.
    before, ours = rig.engine.server_counters(), rig.engine.counters

    drawn = rig.draw([group(prefix, 5) for prefix in prefixes], rig.sampling())

    after, rows = rig.engine.server_counters(), [len(prefix.embeddings_PD) for prefix in prefixes]
    text = _common_text(prefixes)
    assert sum(rows) + 10 - text <= after.prefill_rows - before.prefill_rows <= sum(rows) + 10
    assert after.encoder_calls == before.encoder_calls == 0
    for row, samples in zip(rows, drawn, strict=True):
        assert [sample.cached_tokens for sample in samples] == [row - 1] * 5
    done = rig.engine.counters.since(ours)
    assert (done.prefixes_prefilled, done.prefix_rows) == (2, sum(rows))
    assert done.tokens_generated == sum(len(s.token_ids) for samples in drawn for s in samples)


def _common_text(prefixes) -> int:
    """Leading text that all prompts have, which whoever comes second may find in the cache."""
    first, second = (prefix.inputs.token_ids_P for prefix in prefixes)
    same = first[: len(second)] == second[: len(first)]
    return int((~same).nonzero()[0]) + 1


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_float32_logprobs_are_the_policys(rig, temperature):
    prefix = rig.prefix("float32")
    (samples,) = rig.draw([group(prefix, 6)], rig.sampling(temperature=temperature, max_new_tokens=20))
    assert len({sample.token_ids for sample in samples}) > 1
    for sample in samples:
        expected = policy_logprobs(rig.policy, prefix, sample, temperature)
        assert sample.logprobs == pytest.approx(expected, rel=0, abs=1e-4)


def test_logprobs_are_those_before_truncation(rig):
    prefix = rig.prefix("truncated")
    (greedy,) = rig.draw([group(prefix, 2)], rig.sampling())
    for truncation in ({"top_k": 1}, {"top_p": 1e-6}):
        (samples,) = rig.draw([group(prefix, 2)], rig.sampling(temperature=1.0, **truncation))
        for sample in samples:
            assert sample.token_ids == greedy[0].token_ids
            expected = policy_logprobs(rig.policy, prefix, sample, 1.0)
            assert sample.logprobs == pytest.approx(expected, rel=0, abs=1e-4)


def test_a_completion_ends_with_its_stop_token(rig):
    stops = (*rig.encoder.stop_token_ids, *range(3, 400, 4))
    (samples,) = rig.draw(
        [group(rig.prefix("stop"), 8)], rig.sampling(temperature=1.0, max_new_tokens=40, stop_token_ids=stops)
    )
    for sample in samples:
        assert not set(sample.token_ids[:-1]) & set(stops)
        assert (sample.finish_reason == "stop") == (sample.token_ids[-1] in stops)
        assert sample.finish_reason == "stop" or len(sample.token_ids) == 40
    assert {sample.finish_reason for sample in samples} == {"stop"}


def test_without_stop_tokens_nothing_ends_early(rig):
    (samples,) = rig.draw(
        [group(rig.prefix("endless"), 4)], rig.sampling(temperature=3.0, max_new_tokens=60, stop_token_ids=())
    )
    assert [(len(sample.token_ids), sample.finish_reason) for sample in samples] == [(60, "length")] * 4


def test_single_samples_and_empty_groups(rig):
    requests = [group(rig.prefix("one"), 1), group(rig.prefix("none"), 0), group(rig.prefix("one"), 1)]
    first, none, again = rig.draw(requests, rig.sampling())
    assert none == ()
    assert first[0].token_ids == again[0].token_ids


def test_media_that_differ_are_other_prefixes(rig):
    prefix = rig.prefix("one clip")
    rows = prefix.embeddings_PD.clone()
    rows[prefix.inputs.token_ids_P < 0] += 0.5
    other = dataclasses.replace(prefix, embeddings_PD=rows)
    requests = [group(prefix, 2), group(other, 2)]
    drawn, expected = rig.draw(requests, rig.sampling()), rig.draw_natively(requests, rig.sampling())
    assert drawn[0][0].token_ids != drawn[1][0].token_ids
    assert_same(drawn, expected)


def test_more_groups_than_the_cache_holds_at_once(rig):
    """Six of 138 rows and 8 times 300: three at a time in a cache of 8192."""
    requests = [group(rig.prefix(f"crowd {i}"), 8) for i in range(6)]
    stops = (*rig.encoder.stop_token_ids, *range(3, 500, 16))
    drawn = rig.draw(requests, rig.sampling(temperature=1.0, max_new_tokens=300, stop_token_ids=stops))
    assert [len(samples) for samples in drawn] == [8] * 6


def test_a_budget_leaves_the_rest_for_the_next_call(rig):
    prefix = rig.prefix("partial")
    whole_sampling = rig.sampling(max_new_tokens=30, stop_token_ids=())
    (whole,) = rig.draw([group(prefix, 2)], whole_sampling)
    budgeted = dataclasses.replace(whole_sampling, token_budget=11)
    first_version = rig.version

    (first,) = rig.draw([group(prefix, 2)], budgeted)
    version = rig.publish()
    (second,) = rig.draw([group(prefix, 2, *first)], budgeted)
    (third,) = rig.draw([group(prefix, 2, *second)], budgeted)
    (fourth,) = rig.draw([group(prefix, 2, *third)], budgeted)

    assert [c.finish_reason for c in (*first, *second, *third)] == ["budget"] * 4 + ["length"] * 2
    assert fourth == third
    for sample, expected in zip(third, whole, strict=True):
        assert sample.token_ids == expected.token_ids
        assert sample.logprobs == pytest.approx(expected.logprobs, rel=0, abs=1e-4)
        assert sample.version_spans == (
            VersionSpan(version=first_version, num_tokens=11),
            VersionSpan(version=version, num_tokens=19),
        )
    rows = len(prefix.embeddings_PD)
    assert all(rows <= sample.cached_tokens < rows + 11 for sample in second)


def test_the_only_unfinished_sample_of_a_group_goes_on_after_new_weights(rig):
    prefix, sampling = rig.prefix("only"), rig.sampling(stop_token_ids=())
    ((begun,), (done,)) = (
        rig.draw([group(prefix, 1)], dataclasses.replace(sampling, token_budget=budget))[0]
        for budget in (4, None)
    )
    rig.publish()
    (samples,) = rig.draw([group(prefix, 3, done, begun, done)], sampling)
    assert samples[1].token_ids == done.token_ids
    assert samples[1].cached_tokens < len(prefix.embeddings_PD), "its prefix was computed anew"
    assert (samples[0], samples[2]) == (done, done)


def test_begun_and_fresh_samples_of_one_group(rig):
    prefix, sampling = rig.prefix("mixed"), rig.sampling(max_new_tokens=9, stop_token_ids=())
    (begun,) = rig.draw([group(prefix, 1)], dataclasses.replace(sampling, token_budget=4))
    (samples,) = rig.draw([group(prefix, 3, None, begun[0], None)], sampling)
    assert len({sample.token_ids for sample in samples}) == 1
    assert samples[1].token_ids[:4] == begun[0].token_ids


def test_bfloat16_logprobs_are_the_policys(base):
    rig = open_rig(base, torch.bfloat16)
    try:
        prefix = rig.prefix("bfloat16")
        (samples,) = rig.draw([group(prefix, 8)], rig.sampling(temperature=1.0, max_new_tokens=24))
        worst = max(
            abs(ours - theirs)
            for sample in samples
            for ours, theirs in zip(
                sample.logprobs, policy_logprobs(rig.policy, prefix, sample, 1.0), strict=True
            )
        )
        assert worst <= 0.03
    finally:
        rig.engine.close()
