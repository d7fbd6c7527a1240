"""Smoke runs of bench_rollout, and its arithmetic by hand."""

import pytest
import torch

from omnigrpo.model.config import DecoderConfig


@pytest.fixture
def bench(bench_module):
    return bench_module("bench_rollout")


def test_smoke(run):
    report = run("--samples", "2", "3", "--completion", "4")
    names = ["native", "transformers.generate", "transformers, prefill shared"]
    assert [row["name"] for row in report["rows"]] == names * 2
    for row in report["rows"]:
        figures = row["figures"]
        samples = 2 if "G=2" in row["section"] else 3
        copies = samples if row["name"] == "transformers.generate" else 1
        assert figures["prefix rows computed"] == 40 * copies
        assert figures["tokens/s"] == pytest.approx(samples * 4 / (row["ms"]["median"] / 1e3))
        assert figures["ideal ms"] > 0
        assert row["peak_bytes"] > 0
    assert [check["target"] for check in report["checks"]] == ["<= 1"] * 2
    assert all(check["ok"] for check in report["checks"])
    assert any("bandwidth ceiling" in note for note in report["notes"])


def test_targets_belong_to_the_promised_sizes(bench):
    def promised(*options: str) -> bool:
        args = bench._arguments(options)
        return bench.is_promised(args, args.samples[0])

    assert promised()
    assert not promised("--layers", "2")
    assert not promised("--prefix", "100")
    assert not promised("--samples", "4")
    assert not promised("--dtype", "float32")
    assert promised("--device", "cuda")
    assert not promised("--device", "cuda", "--layers", "4")


def test_ceiling_is_prefill_at_gemm_speed_and_decode_at_the_speed_of_memory(bench, bench_module):
    sizes = bench_module("step_work").Sizes(prompts=1, prefix=10, samples=8, completion=33)
    config = DecoderConfig(
        vocab_size=100, width=8, num_layers=1, num_heads=2, num_kv_heads=1, ffn_width=16, max_positions=64
    )
    ceiling = bench.Ceiling(config=config, weight_bytes=1000, bandwidth=1e6, gemm_flops=1e9)
    assert ceiling.decode_bytes(sizes) == 32_000
    weights = 8 * (2 * 2 + 2 * 1) * 4 + 3 * 8 * 16
    flops = 2 * weights * 10 + 4 * 2 * 4 * 55 + 2 * 8 * 100
    assert ceiling.seconds(sizes) == pytest.approx(flops / 1e9 + 0.032)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_all_weights_but_an_untied_embedding(bench, bench_module, tied: bool):
    config = DecoderConfig(
        vocab_size=50,
        width=8,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        ffn_width=16,
        max_positions=64,
        tie_word_embeddings=tied,
    )
    policy = bench_module("update_work").TextPolicy(config, device=torch.device("cpu"), dtype=torch.bfloat16)
    decoder = sum(p.numel() for p in policy.decoder.parameters())
    assert bench.read_bytes(policy) == 2 * decoder


def test_peers_draw_from_the_same_distribution(bench, bench_module):
    """Log-probs of the native samples under transformers' logits: their mean is what transformers' own would have."""
    torch.manual_seed(0)
    policy = bench_module("update_work").TextPolicy(
        bench.SMOKE_CONFIG, device=torch.device("cpu"), dtype=torch.float32
    )
    policy.eval()
    native, generate, _ = bench.make_peers(policy, bench.make_prefix(policy, 12))
    request = bench_module("rollout_peers").GroupRequest(prefix=native.prefix, seeds=(1, 2))
    sampling = bench_module("rollout_peers").SamplingParams(max_new_tokens=5)
    (group,) = bench_module("rollout_peers").collect(native.engine.generate([request], sampling), 1)
    for completion in group:
        ids = torch.tensor(completion.token_ids)
        with torch.no_grad():
            embeddings = torch.cat([generate.embeddings_PD, policy.embed_tokens(ids)])
            logits = generate.model(inputs_embeds=embeddings[None]).logits[0]
        logprob = logits[11:-1].float().log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(completion.logprobs), logprob, rtol=0, atol=1e-4)


def test_bandwidth_is_a_plausible_rate(bench):
    assert 1e8 < bench.measured_bandwidth(torch.device("cpu"), 1 << 24) < 1e13
