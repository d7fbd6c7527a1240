"""Sampling: counter-based uniforms, inverse CDF, truncation, and what the log-probs mean."""

import math
from dataclasses import replace

import pytest
import torch

from omnigrpo.rollout.interface import SamplingParams
from omnigrpo.rollout.sampling import mix64, sample_tokens, uniforms

_MASK = (1 << 64) - 1


def _splitmix64(state: int) -> int:
    """The published algorithm on Python's integers, which do not overflow."""
    bits = (state + 0x9E3779B97F4A7C15) & _MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)


def _draw(probabilities: list[float], sampling: SamplingParams, num_draws: int) -> torch.Tensor:
    logits_SV = torch.tensor([probabilities]).log().expand(num_draws, -1)
    token_S, _ = sample_tokens(logits_SV, sampling, torch.arange(num_draws), position=0)
    return token_S.bincount(minlength=len(probabilities)) / num_draws


def test_mix64_gives_the_published_first_output_of_seed_0():
    assert int(mix64(torch.tensor(0))) & _MASK == 0xE220A8397B1DCDAF


def test_mix64_equals_arbitrary_precision_arithmetic():
    values = [0, 1, -1, 2**63 - 1, -(2**63), 123456789, -987654321]
    expected = [_splitmix64(value & _MASK) for value in values]
    assert [int(bits) & _MASK for bits in mix64(torch.tensor(values))] == expected


def test_uniforms_are_in_range_and_fill_it_evenly():
    uniform = torch.cat([uniforms(torch.arange(20_000), position) for position in (0, 1, 511)])
    assert 0 <= float(uniform.min()) < 1e-3
    assert 1 - 1e-3 < float(uniform.max()) < 1
    counts = (uniform * 20).long().bincount(minlength=20).double()
    chi_square = float(((counts - 3000) ** 2 / 3000).sum())
    assert chi_square < 43.8  # 99.9 % quantile at 19 degrees of freedom


def test_uniforms_of_neighbouring_seeds_and_positions_are_uncorrelated():
    table = torch.stack([uniforms(torch.arange(5000), position) for position in range(8)])
    assert float((table.corrcoef() - torch.eye(8)).abs().max()) < 0.06
    shifted = torch.stack([table[0, 1:], table[1, :-1]])  # seed s+1 at 0 against seed s at 1
    assert abs(float(shifted.corrcoef()[0, 1])) < 0.06
    assert not bool((shifted[0] == shifted[1]).any())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float):
    base = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    expected = base ** (1 / temperature) / (base ** (1 / temperature)).sum()
    frequency = _draw(base.tolist(), SamplingParams(temperature=temperature), 20_000)
    chi_square = float((20_000 * (frequency - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 99.9 % quantile at 4 degrees of freedom


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (SamplingParams(top_k=2), {1, 3}),
        (SamplingParams(top_k=1), {3}),
        (SamplingParams(top_k=50), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.39), {3}),
        (SamplingParams(top_p=0.41), {1, 3}),
        (SamplingParams(top_p=0.71), {0, 1, 3}),
        (SamplingParams(top_k=2, top_p=0.56), {3}),  # 0.4 is 0.571 of what top-k leaves
        (SamplingParams(top_k=2, top_p=0.58), {1, 3}),
    ],
)
def test_truncation_keeps_the_most_probable_and_renormalises(sampling: SamplingParams, kept: set[int]):
    probabilities = [0.15, 0.3, 0.1, 0.4, 0.05]
    frequency = _draw(probabilities, sampling, 20_000)
    assert {token for token, share in enumerate(frequency.tolist()) if share > 0} == kept
    total = sum(probabilities[token] for token in kept)
    for token in kept:
        assert float(frequency[token]) == pytest.approx(probabilities[token] / total, abs=0.015)


def test_ties_at_the_threshold_are_all_kept():
    frequency = _draw([0.4, 0.2, 0.2, 0.2], SamplingParams(top_k=2), 4000)
    assert bool((frequency > 0.15).all())


def test_impossible_tokens_are_never_drawn():
    logits_SV = torch.full((2000, 1000), -math.inf)
    logits_SV[:, [17, 600]] = 0.0
    tokens, logprob = sample_tokens(logits_SV, SamplingParams(), torch.arange(2000), position=3)
    assert set(tokens.tolist()) == {17, 600}
    torch.testing.assert_close(logprob, torch.full_like(logprob, math.log(0.5)))


def test_logprob_is_tempered_and_ignores_the_truncation():
    logits_SV = torch.randn(6, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampling = SamplingParams(temperature=0.7, top_k=5, top_p=0.8)
    token_S, logprob_S = sample_tokens(logits_SV, sampling, torch.arange(6), position=0)
    expected = (logits_SV / 0.7).log_softmax(-1)[torch.arange(6), token_S]
    torch.testing.assert_close(logprob_S, expected, rtol=0, atol=1e-14)


def test_greedy_takes_the_largest_and_reports_temperature_1():
    logits_SV = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    token_S, logprob_S = sample_tokens(logits_SV, SamplingParams(temperature=0), torch.tensor([7, 7]), 0)
    assert token_S.tolist() == [1, 0]
    torch.testing.assert_close(logprob_S, logits_SV.log_softmax(-1).amax(-1))


def test_a_row_is_drawn_alike_alone_and_in_a_batch():
    logits_SV = torch.randn(9, 50, generator=torch.Generator().manual_seed(1)) * 3
    seed_S = torch.randint(-(2**62), 2**62, (9,), generator=torch.Generator().manual_seed(2))
    sampling = SamplingParams(temperature=1.3, top_k=20, top_p=0.9)
    token_S, logprob_S = sample_tokens(logits_SV, sampling, seed_S, position=5)
    for row in range(9):
        alone, alone_logprob = sample_tokens(logits_SV[row : row + 1], sampling, seed_S[row : row + 1], 5)
        assert alone.tolist() == [int(token_S[row])]
        assert float(alone_logprob[0]) == float(logprob_S[row])


def test_rows_may_be_at_positions_of_their_own():
    logits_SV = torch.randn(5, 50, generator=torch.Generator().manual_seed(1)) * 3
    seed_S, position_S = torch.arange(5), torch.tensor([0, 3, 511, 3, 70])
    token_S, logprob_S = sample_tokens(logits_SV, SamplingParams(), seed_S, position_S)
    for row, position in enumerate(position_S.tolist()):
        alone = sample_tokens(logits_SV[row : row + 1], SamplingParams(), seed_S[row : row + 1], position)
        assert [int(alone[0]), float(alone[1])] == [int(token_S[row]), float(logprob_S[row])]


def test_bfloat16_logits_are_sampled_in_float32():
    logits_SV = torch.randn(4, 30, generator=torch.Generator().manual_seed(3)).bfloat16()
    token_S, logprob_S = sample_tokens(logits_SV, SamplingParams(), torch.arange(4), 0)
    assert logprob_S.dtype == torch.float32
    torch.testing.assert_close(logprob_S, logits_SV.float().log_softmax(-1)[torch.arange(4), token_S])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("max_new_tokens", 0),
        ("stop_token_ids", (-1,)),
    ],
)
def test_invalid_parameters_are_named(field: str, value: object):
    with pytest.raises(ValueError, match=field):
        replace(SamplingParams(), **{field: value})
