"""Which calls draw a group, and what is asked of their answers; SGLang's cache is imitated."""

import asyncio

import pytest
import torch

from omnigrpo.rollout.group_calls import draw_group
from omnigrpo.rollout.interface import GroupRequest, RolloutError, SamplingParams
from omnigrpo.rollout.sglang_requests import Generated, check_sharing, missing_samples
from omnigrpo.schema import Completion, FinishReason, Prefix, VersionSpan

SAMPLING = SamplingParams(max_new_tokens=8)


@pytest.fixture
def prefix(builders) -> Prefix:
    inputs = builders.inputs("prompt")
    return Prefix(inputs=inputs, embeddings_PD=torch.zeros(len(inputs.token_ids_P), 2))


def begun(num_tokens: int, finish: FinishReason) -> Completion:
    span = VersionSpan(version=0, num_tokens=num_tokens)
    return Completion(
        token_ids=(5,) * num_tokens,
        logprobs=(-1.0,) * num_tokens,
        finish_reason=finish,
        version_spans=(span,),
        cached_tokens=0,
    )


class Cache:
    """Draws as SGLang does after its cache was emptied: a prompt with n > 1 is computed once before its samples."""

    def __init__(self, rows: int) -> None:
        self.rows, self.is_known = rows, False

    async def __call__(self, tokens: tuple[int, ...], num_samples: int, room: int) -> list[Generated]:
        cached = self.rows + (-1 if not tokens else 0) if self.is_known or num_samples > 1 else 0
        self.is_known = True
        one = Generated(
            token_ids=(1,) * room,
            logprobs=(-1.0,) * room,
            finish="length",
            matched=None,
            cached_tokens=cached,
            retractions=0,
            version=1,
        )
        return [one] * num_samples


@pytest.mark.parametrize(
    "had",
    [
        (begun(3, "budget"), begun(2, "stop"), begun(4, "stop")),
        (begun(3, "budget"), begun(2, "budget"), begun(4, "stop")),
        (None, begun(2, "budget"), begun(4, "budget")),
        (None, None, begun(4, "budget")),
        (None, begun(2, "stop"), begun(4, "stop")),
    ],
    ids=["one goes on", "two go on", "one begins, two go on", "two begin, one goes on", "one begins"],
)
def test_what_an_empty_cache_leaves_to_compute_is_no_eviction(prefix, had):
    request = GroupRequest(prefix=prefix, seeds=(0, 1, 2), begun=had)
    missing = missing_samples(request)
    drawn = asyncio.run(draw_group(request, SAMPLING, missing, Cache(len(prefix.inputs.token_ids_P))))
    assert sorted(drawn) == missing
    for sample, generated in drawn.items():
        check_sharing(request, sample, generated)


def test_the_first_call_that_fails_ends_the_others(prefix):
    ended: list[int] = []

    async def draw(tokens: tuple[int, ...], num_samples: int, room: int) -> list[Generated]:
        if room == 0:
            return []
        if len(tokens) == 3:
            raise RolloutError("lost")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(len(tokens))
        return []

    request = GroupRequest(prefix=prefix, seeds=(0, 1), begun=(begun(2, "budget"), begun(3, "budget")))
    with pytest.raises(RolloutError, match="lost"):
        asyncio.run(draw_group(request, SAMPLING, [0, 1], draw))
    assert ended == [2]
