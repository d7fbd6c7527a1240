"""What is refused before anything is generated."""

import dataclasses

import pytest
import torch
from sglang_rig import group

from omnigrpo.rollout import sglang_engine
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.schema import Prefix


def changed(prefix: Prefix, rows: torch.Tensor) -> Prefix:
    return dataclasses.replace(prefix, embeddings_PD=rows)


def test_a_prompt_longer_than_the_context(rig):
    prefix = rig.prefix("long")
    rows, new = len(prefix.embeddings_PD), 1024 - len(prefix.embeddings_PD) - 1
    message = rf"{rows} rows, and with {new} new tokens it does not fit a context of 1024"
    with pytest.raises(ValueError, match=message):
        rig.engine.generate([group(prefix)], rig.sampling(max_new_tokens=new))


def test_the_longest_completion_that_fits_is_not_shortened(rig):
    prefix = rig.prefix("long")
    longest = 1024 - len(prefix.embeddings_PD) - 2
    (samples,) = rig.draw([group(prefix, 2)], rig.sampling(max_new_tokens=longest, stop_token_ids=()))
    assert [len(sample.token_ids) for sample in samples] == [longest, longest]


def test_embeddings_of_another_width(rig):
    prefix = rig.prefix("narrow")
    with pytest.raises(ValueError, match=r"shape \(\d+, 64\) for \d+ rows; expected \[P, 128\]"):
        rig.engine.generate([group(changed(prefix, prefix.embeddings_PD[:, :64]))], rig.sampling())


def test_fewer_embeddings_than_rows(rig):
    prefix = rig.prefix("few")
    rows = len(prefix.embeddings_PD)
    with pytest.raises(ValueError, match=rf"shape \({rows - 1}, 128\) for {rows} rows"):
        rig.engine.generate([group(changed(prefix, prefix.embeddings_PD[1:]))], rig.sampling())


def test_a_stop_token_outside_the_vocabulary(rig):
    vocabulary = rig.policy.config.decoder.vocab_size
    with pytest.raises(ValueError, match=f"stop token {vocabulary} is outside the vocabulary"):
        rig.engine.generate([group(rig.prefix("stop"))], rig.sampling(stop_token_ids=(0, 2, vocabulary)))


def test_stop_tokens_without_the_checkpoints_own(rig):
    with pytest.raises(ValueError, match=r"also ends a completion at the checkpoint's own end tokens \[2\]"):
        rig.engine.generate([group(rig.prefix("stop"))], rig.sampling(stop_token_ids=(5,)))


def test_no_room_in_shared_memory(rig, monkeypatch):
    monkeypatch.setattr(sglang_engine, "free_shared_memory", lambda: 100_000)
    with pytest.raises(RolloutError, match=r"needs 0.2 MiB of /dev/shm .* but 0.1 MiB are free"):
        rig.engine.generate([group(rig.prefix("shared"))], rig.sampling())


def test_one_bad_request_of_many_stops_them_all(rig):
    prefix = rig.prefix("bad")
    before = rig.engine.server_counters()
    with pytest.raises(ValueError, match="expected"):
        rig.engine.generate(
            [group(rig.prefix("good")), group(changed(prefix, prefix.embeddings_PD[1:]))], rig.sampling()
        )
    assert rig.engine.server_counters() == before
