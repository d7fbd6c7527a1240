"""What is sent to SGLang and how its answers are read, without it."""

import dataclasses

import pytest
import torch

from omnigrpo.rollout.interface import GroupRequest, RolloutError, SamplingParams
from omnigrpo.rollout.sglang_requests import (
    Generated,
    MediaKeys,
    OtherWeightsError,
    check_sharing,
    completion_of,
    media_bytes,
    media_of,
    prompt_ids,
    room_of,
    sampling_of,
    version_label,
)
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Completion, Prefix, VersionSpan

WIDTH = 6
SAMPLING = SamplingParams(max_new_tokens=10, stop_token_ids=(4,), token_budget=3)


@pytest.fixture
def prefix(builders) -> Prefix:
    """Rows 2-4 and 6 are video, row 5 is audio."""
    inputs = dataclasses.replace(
        builders.inputs("prompt"),
        token_ids_P=torch.tensor([7, 8, VIDEO_ROW, VIDEO_ROW, VIDEO_ROW, AUDIO_ROW, VIDEO_ROW, 9]),
    )
    return Prefix(inputs=inputs, embeddings_PD=torch.arange(8 * WIDTH, dtype=torch.float32).view(8, WIDTH))


def generated(**changed) -> Generated:
    settings = {"token_ids": (1, 2, 3), "logprobs": (-1.0, -2.0, -3.0), "finish": "length", "matched": None}
    settings |= {"cached_tokens": 7, "retractions": 0, "version": 2}
    return Generated(**(settings | changed))


def begun(num_tokens: int, version: int = 1) -> Completion:
    return Completion(
        token_ids=(5,) * num_tokens,
        logprobs=(-0.5,) * num_tokens,
        finish_reason="budget",
        version_spans=(VersionSpan(version=version, num_tokens=num_tokens),),
        cached_tokens=7,
    )


def test_rows_of_each_modality_and_their_places(prefix):
    media = media_of(prefix, dtype=torch.bfloat16, keys=MediaKeys(), version=1)
    (video,), (audio,) = media["video_data"], media["audio_data"]
    assert (video["modality"], video["offsets"]) == ("VIDEO", [(2, 4), (6, 6)])
    assert (audio["modality"], audio["offsets"]) == ("AUDIO", [(5, 5)])
    assert video["precomputed_embeddings"].equal(prefix.embeddings_PD[[2, 3, 4, 6]].bfloat16())
    assert prompt_ids(prefix) == (7, 8, 0, 0, 0, 0, 0, 9)
    assert media_bytes(prefix, torch.bfloat16) == 5 * WIDTH * 2


def test_a_key_stands_for_content_modality_and_version():
    rows = torch.randn(4, WIDTH)
    keys = MediaKeys()
    key = keys.key(rows, "VIDEO", 1)
    assert key == keys.key(rows.clone(), "VIDEO", 1)
    assert (
        len({key, keys.key(rows + 1, "VIDEO", 1), keys.key(rows, "AUDIO", 1), keys.key(rows, "VIDEO", 2)})
        == 4
    )


def test_two_media_never_share_the_bits_that_sglang_keeps():
    rows, keys = torch.randn(4, WIDTH), MediaKeys()
    key = keys.key(rows, "VIDEO", 1)
    keys._owner[key % 2**30] = b"another medium"
    moved = keys.key(rows, "VIDEO", 1)
    assert moved == key + 1
    assert keys.key(rows, "VIDEO", 1) == moved
    keys.clear()
    assert keys.key(rows, "VIDEO", 1) == key


def test_sampling_parameters():
    assert sampling_of(SamplingParams(), 5)["ignore_eos"]
    assert sampling_of(SamplingParams(top_k=0), 5)["top_k"] == -1
    named = sampling_of(SAMPLING, 3)
    assert (named["stop_token_ids"], named["ignore_eos"], named["max_new_tokens"]) == ([4], False, 3)


def test_room_is_what_budget_and_length_leave():
    assert room_of(SAMPLING, None) == 3
    assert room_of(SAMPLING, begun(8)) == 2
    assert room_of(dataclasses.replace(SAMPLING, token_budget=None), begun(8)) == 2


def test_a_completion_goes_on_after_what_it_had():
    completion = completion_of(generated(), begun(3), SAMPLING)
    assert completion.token_ids == (5, 5, 5, 1, 2, 3)
    assert completion.logprobs == (-0.5, -0.5, -0.5, -1.0, -2.0, -3.0)
    assert completion.finish_reason == "budget"
    assert completion.version_spans == (
        VersionSpan(version=1, num_tokens=3),
        VersionSpan(version=2, num_tokens=3),
    )
    joined = completion_of(generated(), begun(3, version=2), SAMPLING)
    assert joined.version_spans == (VersionSpan(version=2, num_tokens=6),)
    assert completion_of(generated(), begun(7), SAMPLING).finish_reason == "length"
    assert completion_of(generated(finish="stop", matched=3), begun(7), SAMPLING).finish_reason == "stop"


@pytest.mark.parametrize(
    ("samples", "had", "cached", "is_shared"),
    [
        (1, 0, 0, True),
        (2, 0, 7, True),
        (2, 0, 6, False),
        (2, 0, 8, False),
        (2, 4, 8, True),
        (2, 4, 11, True),
        (2, 4, 7, False),
    ],
)
def test_sharing_is_checked(prefix, samples, had, cached, is_shared):
    parts = (begun(had) if had else None, *(None,) * (samples - 1))
    request = GroupRequest(prefix=prefix, seeds=tuple(range(samples)), begun=parts)
    if is_shared:
        check_sharing(request, 0, generated(cached_tokens=cached))
        return
    with pytest.raises(RolloutError, match=f"found {cached} rows of its prompt in SGLang's cache, not the"):
        check_sharing(request, 0, generated(cached_tokens=cached))
    check_sharing(request, 0, generated(cached_tokens=cached, retractions=1))


def answer(**changed) -> dict:
    meta = {
        "finish_reason": {"type": "stop", "matched": 4},
        "output_token_logprobs": [(-1.0, 3, None), (-2.0, 4, None)],
        "cached_tokens": 7,
        "num_retractions": 0,
        "weight_version": "12",
    }
    return {"output_ids": [3, 4], "meta_info": meta | changed}


def test_an_answer_is_read():
    found = Generated.from_output(answer())
    assert found == generated(
        token_ids=(3, 4), logprobs=(-1.0, -2.0), finish="stop", matched=4, version=12, cached_tokens=7
    )


def test_a_version_is_read_from_its_runs_label_only():
    label = version_label(12, run="ab12")
    assert Generated.from_output(answer(weight_version=label), run="ab12").version == 12
    for other in ("default", "0", "12", version_label(12, run="cd34"), "ab12."):
        with pytest.raises(OtherWeightsError, match="which this run did not publish"):
            Generated.from_output(answer(weight_version=other), run="ab12")
    with pytest.raises(OtherWeightsError):
        Generated.from_output(answer(weight_version="default"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"finish_reason": {"type": "abort", "message": "no memory"}},
            "ended a sample after 2 tokens: .*no memory",
        ),
        ({"finish_reason": None}, "ended a sample after 2 tokens: None"),
        ({"output_token_logprobs": [(-1.0, 3, None)]}, "2 tokens with log-probs of 1 others"),
    ],
)
def test_an_answer_that_does_not_fit(changed, message):
    with pytest.raises(RolloutError, match=message):
        Generated.from_output(answer(**changed))
