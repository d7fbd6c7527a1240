"""Which weights are sent, and in which portions."""

import pytest
import torch

from omnigrpo.model.config import DecoderConfig, tiny
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.decoder_shapes import decoder_shapes
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.weight_buckets import WeightBuckets

CONFIG = tiny(vocab_size=64, gate_vocab_size=50)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return HumanOmni(CONFIG).state_dict()


def test_the_decoders_weights_are_chosen(state):
    chosen = dict(WeightBuckets(CONFIG.decoder, torch.float32, 1).choose(state.items()))
    assert {name: tuple(tensor.shape) for name, tensor in chosen.items()} == decoder_shapes(CONFIG.decoder)
    assert not [name for name in chosen if "tower" in name or "projector" in name or "bert" in name]


def test_an_untied_head_is_a_weight():
    tied, untied = (
        DecoderConfig(vocab_size=8, width=4, num_layers=1, num_heads=2, tie_word_embeddings=tie)
        for tie in (True, False)
    )
    assert decoder_shapes(untied).keys() - decoder_shapes(tied).keys() == {"lm_head.weight"}


@pytest.mark.parametrize("bucket_bytes", [1, 30_000, 1 << 30])
def test_buckets_hold_every_weight_once_and_keep_to_their_size(state, bucket_bytes):
    buckets = WeightBuckets(CONFIG.decoder, torch.bfloat16, bucket_bytes)
    chosen = buckets.choose(state.items())
    planned = list(buckets.plan(chosen))
    assert [name for bucket in planned for name, _ in bucket] == [name for name, _ in chosen]
    sizes = [sum(2 * tensor.numel() for _, tensor in bucket) for bucket in planned]
    assert all(size <= bucket_bytes or len(bucket) == 1 for size, bucket in zip(sizes, planned, strict=True))
    assert {tensor.dtype for bucket in planned for _, tensor in buckets.cast(bucket)} == {torch.bfloat16}


def test_what_does_not_fit_is_named(state):
    wrong = dict(state) | {"model.norm.weight": torch.ones(3), "lm_head.weight": torch.ones(64, 128)}
    with pytest.raises(
        RolloutError, match=r"2 of \d+ weights do not fit .*shape \(3,\).*its head is the embedding"
    ):
        WeightBuckets(CONFIG.decoder, torch.float32, 1).choose(wrong.items())
