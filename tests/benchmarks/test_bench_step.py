"""Smoke runs of bench_step, and its arithmetic by hand."""

from pathlib import Path

import pytest
import torch

from omnigrpo.model.config import DecoderConfig
from omnigrpo.schema import Clip, ClipFeatures, PrefixInputs, Prompt, SharedPrefixLayout

TRAINING = [
    "prefill",
    "decode_tokens",
    "reward",
    "pack",
    "reference",
    "forward",
    "head",
    "backward",
    "optimizer",
    "publish",
]


@pytest.fixture
def work(bench_module):
    return bench_module("step_work")


@pytest.mark.slow
def test_smoke_on_clips(smoke):
    report = smoke("bench_step.py")
    phases = {cache: phases_of(report, f"step, {cache} feature cache") for cache in ("cold", "warm")}
    assert phases == {
        "cold": ["media_wait", "decode", "encode", *TRAINING],
        "warm": ["media_wait", *TRAINING],
    }
    assert_work_is_compared(report)


@pytest.mark.slow
def test_smoke_on_random_features(smoke):
    report = smoke("bench_step.py", "--geometry", "0.5b", "--prefix", "230", "--completion", "5")
    assert phases_of(report, "step") == TRAINING
    assert "random tower features instead of media" in report["notes"][0]
    assert all("P=230 G=3 R=5" in row["section"] for row in report["rows"])
    assert_work_is_compared(report)


def phases_of(report, section: str) -> list[str]:
    rows = [row for row in report["rows"] if row["section"].startswith(f"{section}, prompts=2 ")]
    whole, *phases = rows
    assert whole["name"] == "whole step"
    assert whole["figures"]["samples/s"] == pytest.approx(6000 / whole["ms"]["median"])
    shares = sum(row["figures"]["share of the step"] for row in phases)
    assert 0.8 < shares < 1.05
    (covered,) = (check for check in report["checks"] if check["name"] == f"{section}: phases / wall time")
    assert covered["target"] == ">= 0.97"
    assert covered["value"] <= 1
    return [row["name"] for row in phases]


def assert_work_is_compared(report) -> None:
    compared = [row["name"] for row in report["rows"] if row["section"].startswith(("update", "rollout"))]
    assert compared == ["packed", "dense", "packed", "dense", "shared prefill", "prefill per sample"]
    ratios = [row for row in report["rows"] if row["ratio"] is not None]
    assert len(ratios) == 3
    assert all(2 < row["ideal_ratio"] < 3 for row in ratios)
    exact = {check["name"]: check for check in report["checks"] if "wall time" not in check["name"]}
    assert exact.keys() == {"update: |packed - dense| log-prob", "rollout: prefills per prompt"}
    assert all(check["ok"] for check in exact.values())


def test_token_ratio_of_r1_omni(work):
    sizes = work.Sizes(prompts=1, prefix=976, samples=8, completion=160)
    assert work.token_ratio(sizes) == pytest.approx(9088 / 2256)
    assert round(work.token_ratio(sizes), 1) == 4.0


def test_flops_by_hand(work):
    config = DecoderConfig(
        vocab_size=10, width=4, num_layers=3, num_heads=2, num_kv_heads=1, ffn_width=5, max_positions=8
    )
    layout = SharedPrefixLayout(prefix_lengths=(2,), completion_lengths=((1, 2),))
    weights = 4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 5  # q, k and v, o, the three of the feed-forward network
    pairs = (1 + 2) + 3 + (3 + 4)  # keys that each row sees: the prefix's rows, one row of 3, rows of 3 and 4
    assert work.decoder_flops(config, layout) == 3 * (2 * weights * 5 + 4 * 4 * pairs)
    assert work.head_flops(config, 7) == 2 * 7 * 4 * 10


def test_shared_rollout_feeds_each_prefix_once(work):
    config = DecoderConfig(width=8, num_heads=2, num_kv_heads=1, num_layers=1, ffn_width=8, vocab_size=16)
    sizes = work.Sizes(prompts=2, prefix=10, samples=4, completion=3)
    alone = SharedPrefixLayout(prefix_lengths=(10,), completion_lengths=((2,),))
    one_sample = work.decoder_flops(config, alone) + work.head_flops(config, 3)
    assert work.rollout_flops(config, sizes, copies=4) == 2 * 4 * one_sample
    prefix_again = SharedPrefixLayout(prefix_lengths=(10,), completion_lengths=((),))
    saved = 3 * (work.decoder_flops(config, prefix_again) + work.head_flops(config, 1))
    assert work.rollout_flops(config, sizes, copies=1) == 2 * (4 * one_sample - saved)


def test_dense_packs_hold_the_same_completions_in_the_same_order(work):
    prompt = Prompt(
        prompt_id="p", clip=Clip(path=Path("c.mp4")), question="?", modalities=(), solution="happy"
    )
    features = ClipFeatures(vision_FND=None, audio_AD=None)
    inputs = [
        PrefixInputs(
            prompt=prompt,
            token_ids_P=torch.arange(rows),
            question_ids=torch.tensor([1]),
            features=features,
        )
        for rows in (4, 4)
    ]
    sizes = work.Sizes(prompts=2, prefix=4, samples=3, completion=2)
    groups = work.random_groups(inputs, sizes, 50, torch.Generator().manual_seed(0))
    (packed,) = work.training_packs(groups, budget_rows=100)
    dense = work.training_packs(work.each_alone(groups), budget_rows=20)
    assert packed.pack.num_rows == 2 * (4 + 3 * 2)
    assert [item.pack.num_rows for item in dense] == [18, 18]
    assert torch.cat([item.pack.completion_ids_C for item in dense]).equal(packed.pack.completion_ids_C)
    assert torch.cat([item.batch.weight_C for item in dense]).equal(packed.batch.weight_C)
    assert float(packed.batch.weight_C.sum()) == pytest.approx(1)
