"""Tokens by inverse CDF: by hand, against float64, at the edges, on every instruction set."""

import math

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels.draw_tokens import draw_tokens, draw_tokens_reference

NEAR = 1e-5
"""Of a uniform to a token's end, where roundings may choose the neighbour."""


def draw(
    logits: list[float], uniform: list[float], temperature: float = 1.0
) -> tuple[list[int], list[float]]:
    rows = torch.tensor([logits]).expand(len(uniform), -1)
    token, logprob = draw_tokens(rows, torch.tensor(uniform, dtype=torch.float64), temperature=temperature)
    return token.tolist(), logprob.tolist()


def test_a_case_by_hand(each_isa: str):
    quarters = [math.log(p) for p in (0.25, 0.5, 0.25)]
    token, logprob = draw(quarters, [0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2**-53])
    assert token == [0, 0, 1, 1, 2, 2]
    assert logprob == pytest.approx([quarters[t] for t in token], abs=1e-6)


def test_temperature_sharpens(each_isa: str):
    token, logprob = draw([0.0, math.log(3.0)], [0.05, 0.2], temperature=0.5)
    assert token == [0, 1]
    assert logprob == pytest.approx([math.log(0.1), math.log(0.9)], abs=1e-6)


def test_impossible_tokens_at_both_ends_are_never_drawn(each_isa: str):
    row = [-math.inf] * 3000
    row[1500] = 2.0
    token, logprob = draw(row, [0.0, 0.5, 1 - 2**-53])
    assert token == [1500] * 3
    assert logprob == pytest.approx([0.0] * 3, abs=1e-6)
    assert max(logprob) <= 0


@pytest.mark.parametrize("vocabulary", [1, 5, 16, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_tokens_and_logprobs_equal_the_reference(each_isa: str, vocabulary: int, temperature: float):
    generator = torch.Generator().manual_seed(vocabulary)
    logits_SV = torch.randn(64, vocabulary, generator=generator) * 4
    uniform_S = torch.rand(64, generator=generator, dtype=torch.float64)
    token_S, logprob_S = draw_tokens(logits_SV, uniform_S, temperature=temperature)
    expected_S, _ = draw_tokens_reference(logits_SV.double(), uniform_S, temperature=temperature)
    is_clear_S = far_from_ends(logits_SV, uniform_S, temperature)
    assert int(is_clear_S.sum()) > 50
    assert torch.equal(token_S[is_clear_S], expected_S[is_clear_S])
    exact_SV = (logits_SV.double() / temperature).log_softmax(-1)
    exact_S = exact_SV.gather(1, token_S[:, None]).squeeze(1)
    torch.testing.assert_close(logprob_S.double(), exact_S, rtol=0, atol=2e-5)


def far_from_ends(logits_SV: Tensor, uniform_S: Tensor, temperature: float) -> Tensor:
    cumulative_SV = (logits_SV.double() / temperature).softmax(-1).cumsum(-1)
    return ((cumulative_SV[:, :-1] - uniform_S[:, None]).abs() > NEAR).all(dim=1)


@pytest.mark.parametrize("shift", [-5e4, -200.0, 300.0, 7e4])
def test_large_logits_lose_nothing_but_their_own_digits(each_isa: str, shift: float):
    logits_SV = torch.tensor([[0.0, 4.0, 8.0, 2.0]]) + shift
    exact = logits_SV.double().log_softmax(-1)
    token, logprob = draw_tokens(logits_SV, torch.tensor([0.5], dtype=torch.float64), temperature=1.0)
    assert int(token) == 2
    assert float(logprob) == pytest.approx(float(exact[0, 2]), abs=1e-6 * max(1, abs(shift)))


def test_nan_makes_the_rows_logprob_nan(each_isa: str):
    logits_SV = torch.zeros(3, 40)
    logits_SV[1, 7] = math.nan
    token, logprob = draw_tokens(logits_SV, torch.full((3,), 0.5, dtype=torch.float64), temperature=1.0)
    assert logprob.isnan().tolist() == [False, True, False]
    assert bool(((token >= 0) & (token < 40)).all())


def test_a_row_does_not_depend_on_its_neighbours(each_isa: str):
    generator = torch.Generator().manual_seed(0)
    logits_SV = torch.randn(5, 3001, generator=generator)
    uniform_S = torch.rand(5, generator=generator, dtype=torch.float64)
    token_S, logprob_S = draw_tokens(logits_SV, uniform_S, temperature=0.8)
    for row in range(5):
        alone = draw_tokens(logits_SV[row : row + 1], uniform_S[row : row + 1], temperature=0.8)
        assert (int(alone[0]), float(alone[1])) == (int(token_S[row]), float(logprob_S[row]))


def test_wrong_arguments_are_refused():
    logits, uniform = torch.zeros(2, 3), torch.zeros(2, dtype=torch.float64)
    for wrong in ((logits.double(), uniform, 1.0), (logits, uniform[:1], 1.0), (logits, uniform, 0.0)):
        with pytest.raises(RuntimeError, match="draw_tokens"):
            torch.ops.omnigrpo.draw_tokens(*wrong)


def test_fake_tensors_have_the_real_shapes():
    with torch._subclasses.FakeTensorMode():
        token, logprob = torch.ops.omnigrpo.draw_tokens(
            torch.empty(4, 9), torch.empty(4, dtype=torch.float64), 1.0
        )
    assert (token.shape, token.dtype, logprob.shape, logprob.dtype) == (
        (4,),
        torch.int64,
        (4,),
        torch.float32,
    )
