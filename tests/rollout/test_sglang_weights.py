"""What is known of SGLang's weights after a transfer that failed; SGLang is imitated."""

import asyncio
from collections.abc import Callable

import pytest
import torch

from omnigrpo.model.config import tiny
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.sglang_weights import SGLangWeights, WeightsRefusedError
from omnigrpo.rollout.weight_buckets import WeightBuckets

NAMED = [(f"model.layers.{i}.weight", torch.zeros(4)) for i in range(3)]
"""Each a bucket of 16 bytes."""


class Receiver:
    """Fails at one bucket."""

    def __init__(self, fails_at: int | None = None, error: BaseException | None = None) -> None:
        self.fails_at, self.error = fails_at, error
        self.sent: list[int | None] = []

    async def send(self, bucket, version: int | None) -> None:
        if self.error is not None and len(self.sent) == self.fails_at:
            raise self.error
        self.sent.append(version)

    async def name_anew(self, version: int) -> None:
        self.sent.append(version)


def weights_of(receiver: Receiver, free_bytes: Callable[[], int] | None = None) -> SGLangWeights:
    buckets = WeightBuckets(tiny(vocab_size=64, gate_vocab_size=50).decoder, torch.float32, 16)
    return SGLangWeights(buckets, send=receiver.send, name_anew=receiver.name_anew, free_bytes=free_bytes)


def test_the_last_bucket_brings_the_version():
    receiver = Receiver()
    weights = weights_of(receiver)
    asyncio.run(weights.take(NAMED, 1))
    asyncio.run(weights.take([], 2))
    weights.check()
    assert (receiver.sent, weights.version) == ([None, None, 1, 2], 2)


@pytest.mark.parametrize("fails_at", [0, 2])
@pytest.mark.parametrize(
    "error", [RolloutError("no answer"), RuntimeError("no shared memory"), asyncio.CancelledError()]
)
def test_whatever_ends_a_transfer_leaves_a_mixture_until_a_whole_one(fails_at, error):
    receiver = Receiver(fails_at, error)
    weights = weights_of(receiver)
    with pytest.raises(type(error)):
        asyncio.run(weights.take(NAMED, 1))
    with pytest.raises(
        RolloutError, match=f"{fails_at + 1} of 3 buckets of version 1 .* publish all weights again"
    ):
        weights.check()
    receiver.error = None
    for part in ([], NAMED[1:]):
        with pytest.raises(RolloutError, match=r"1 are missing, model\.layers\.0|publish all weights again"):
            asyncio.run(weights.take(part, 2))
    asyncio.run(weights.take(NAMED, 2))
    weights.check()
    assert weights.version == 2


def test_a_first_bucket_that_is_refused_changes_nothing():
    weights = weights_of(Receiver(0, WeightsRefusedError("no such weight")))
    with pytest.raises(RolloutError, match="no such weight; SGLang goes on with version 0"):
        asyncio.run(weights.take(NAMED, 1))
    weights.check()


def test_a_later_bucket_that_is_refused_leaves_a_mixture():
    weights = weights_of(Receiver(1, WeightsRefusedError("no such weight")))
    with pytest.raises(RolloutError, match="no such weight; SGLang may hold 1 of 3 buckets"):
        asyncio.run(weights.take(NAMED, 1))
    with pytest.raises(RolloutError, match="publish all weights again"):
        weights.check()


def test_a_bucket_larger_than_the_shared_memory_is_not_sent():
    receiver = Receiver()
    weights = weights_of(receiver, lambda: 15)
    with pytest.raises(RolloutError, match=r"/dev/shm: .*lower sglang\.bucket_bytes"):
        asyncio.run(weights.take(NAMED, 1))
    weights.check()
    assert receiver.sent == []
