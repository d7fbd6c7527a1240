import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels import linear_logprob as module
from omnigrpo_kernels.linear_logprob import LogProbs, linear_logprob, linear_logprob_reference

SIZES = {"1x1x1": (1, 1, 1), "3x4x2": (3, 4, 2), "prime": (7, 11, 1031), "past a block": (5, 16, 2049)}
each_size = pytest.mark.parametrize(("rows", "width", "vocabulary"), SIZES.values(), ids=SIZES.keys())


def random_head(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    hidden_TD = torch.randn(rows, width, dtype=torch.float64, generator=generator) * spread / math.sqrt(width)
    weight_VD = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    targets_T = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T


def as_tuple(result: LogProbs) -> tuple[Tensor, Tensor, Tensor]:
    return result.logprob_T, result.entropy_T, result.lse_T


def of_logits(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """A hidden state and a weight whose product is exactly these logits."""
    return torch.eye(logits_TV.shape[0], dtype=logits_TV.dtype), logits_TV.T.contiguous()


def exact_stats(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return as_tuple(linear_logprob_reference(*of_logits(logits_TV.double()), targets_T))


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, weight_VD: Tensor) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", rows * weight_VD.shape[0] * weight_VD.element_size())


@each_size
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
def test_float64_equals_the_reference(rows: int, width: int, vocabulary: int, temperature: float) -> None:
    hidden_TD, weight_VD, targets_T = random_head(rows, width, vocabulary)
    ours = as_tuple(linear_logprob(hidden_TD, weight_VD, targets_T, temperature=temperature))
    reference = as_tuple(linear_logprob_reference(hidden_TD, weight_VD, targets_T, temperature=temperature))
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    upstream = [torch.randn(rows, dtype=torch.float64) for _ in range(3)]
    grads = torch.autograd.grad(ours, (hidden_TD, weight_VD), upstream)
    expected = torch.autograd.grad(reference, (hidden_TD, weight_VD), upstream)
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_gradcheck(chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TD, weight_VD, targets_T = random_head(5, 4, 19)
    rows_per_chunk(monkeypatch, chunk_rows, weight_VD)

    def stats(hidden_TD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return as_tuple(linear_logprob(hidden_TD, weight_VD, targets_T, temperature=0.8))

    assert torch.autograd.gradcheck(stats, (hidden_TD, weight_VD))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk_rows", [3, 100], ids=["chunks", "one chunk"])
def test_low_precision_is_as_close_as_the_reference(
    dtype: torch.dtype, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_TD, weight_VD, targets_T = random_head(17, 48, 1531, dtype)
    rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(17, generator=generator) for _ in range(3)]

    def stats_and_grads(
        compute: Callable[..., LogProbs], hidden_TD: Tensor, weight_VD: Tensor
    ) -> tuple[Tensor, ...]:
        stats = as_tuple(compute(hidden_TD, weight_VD, targets_T, temperature=0.9))
        upstream_here = [grad.to(stat.dtype) for grad, stat in zip(upstream, stats, strict=True)]
        return *stats, *torch.autograd.grad(stats, (hidden_TD, weight_VD), upstream_here)

    ours = stats_and_grads(linear_logprob, hidden_TD, weight_VD)
    same_dtype = stats_and_grads(linear_logprob_reference, hidden_TD, weight_VD)
    exact = stats_and_grads(
        linear_logprob_reference,
        hidden_TD.detach().double().requires_grad_(),
        weight_VD.detach().double().requires_grad_(),
    )
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3 + [dtype] * 2
    for actual, peer, truth in zip(ours, same_dtype, exact, strict=True):
        error = (actual.double() - truth).abs().max()
        peer_error = (peer.double() - truth).abs().max()
        assert error <= 2 * peer_error + 4e-7 * truth.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunking_changes_no_statistic_and_only_rounds_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_TD, weight_VD, targets_T = random_head(16, 32, 257, dtype)
    results = []
    for chunk_rows in (16, 4):
        rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
        stats = as_tuple(linear_logprob(hidden_TD, weight_VD, targets_T))
        results.append((stats, torch.autograd.grad(stats[0].sum() + stats[1].sum(), (hidden_TD, weight_VD))))
    (stats, grads), (chunked_stats, chunked_grads) = results
    # oneDNN may order the sum over D by the number of rows.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(chunked_stats, stats, rtol=0, atol=tolerance)
    torch.testing.assert_close(chunked_grads, grads, rtol=tolerance, atol=tolerance)


def test_logits_of_all_rows_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_TD, weight_VD, targets_T = random_head(10, 4, 100)
    rows_per_chunk(monkeypatch, 3, weight_VD)
    sizes = [
        logits_CV.shape[0] for _, logits_CV in module._logit_chunks(hidden_TD.detach(), weight_VD.detach())
    ]
    assert sizes == [3, 3, 3, 1]
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    assert linear_logprob(hidden_TD, weight_VD, targets_T).logprob_T.shape == (10,)


def test_logits_all_far_below_exp_range() -> None:
    logits_TV = torch.randn(4, 333) - 500.0
    targets_T = torch.tensor([0, 5, 331, 332])
    stats = as_tuple(linear_logprob(*of_logits(logits_TV), targets_T))
    for actual, exact in zip(stats, exact_stats(logits_TV, targets_T), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("magnitude", [36.0, 80.0, 1e4])
def test_large_logits(magnitude: float) -> None:
    logits_TV = torch.linspace(-magnitude, magnitude, 777).repeat(3, 1)
    targets_T = torch.tensor([0, 388, 776])
    stats = as_tuple(linear_logprob(*of_logits(logits_TV), targets_T))
    for actual, exact in zip(stats, exact_stats(logits_TV, targets_T), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=5e-7, atol=1e-6)


@pytest.mark.parametrize("margin", [10.0, 18.0, 30.0, 60.0])
@pytest.mark.parametrize("target", [0, 1023, 1024, 1499])
def test_confident_rows_keep_relative_precision(margin: float, target: int) -> None:
    """log p of a token that is almost certain is far below float32's epsilon, and not 0."""
    logits_TV = torch.zeros(1, 1500)
    logits_TV[0, target] = margin
    hidden_TD, weight_VD = of_logits(logits_TV)
    weight_VD.requires_grad_()
    result = linear_logprob(hidden_TD, weight_VD, torch.tensor([target]))
    others = 1499 * math.exp(-margin)
    assert result.logprob_T.item() == pytest.approx(-math.log1p(others), rel=1e-6)
    assert result.entropy_T.item() == pytest.approx(
        math.log1p(others) + others * margin / (1 + others), rel=1e-6
    )
    result.logprob_T.sum().backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad[target].item() == pytest.approx(others / (1 + others), rel=1e-6)
    assert weight_VD.grad.sum().item() == pytest.approx(0, abs=1e-6 * others)


def test_peaked_row_with_ragged_vocabulary_counts_no_column_beyond_it() -> None:
    """With every logit at -60 but one at -90 as target, a stray exp(0) would dominate."""
    logits_TV = torch.full((1, 1031), -60.0)
    logits_TV[0, 7] = -90.0
    result = linear_logprob(*of_logits(logits_TV), torch.tensor([7]))
    assert result.logprob_T.item() == pytest.approx(-30 - math.log(1030), rel=1e-6)
    assert result.entropy_T.item() == pytest.approx(math.log(1030), rel=1e-6)


def test_uniform_row_by_hand() -> None:
    result = linear_logprob(torch.zeros(1, 3), torch.ones(8, 3), torch.tensor([2]), temperature=0.5)
    expected = math.log(8)
    assert [stat.item() for stat in as_tuple(result)] == pytest.approx([-expected, expected, expected])


def test_temperature_divides_the_logits() -> None:
    hidden_TD, weight_VD, targets_T = random_head(4, 6, 50)
    divided = as_tuple(linear_logprob(hidden_TD / 2.5, weight_VD, targets_T))
    torch.testing.assert_close(
        as_tuple(linear_logprob(hidden_TD, weight_VD, targets_T, temperature=2.5)),
        divided,
        rtol=0,
        atol=1e-12,
    )


def test_frozen_side_gets_no_gradient() -> None:
    hidden_TD, weight_VD, targets_T = random_head(4, 6, 50)
    linear_logprob(hidden_TD, weight_VD.detach(), targets_T).logprob_T.sum().backward()
    assert hidden_TD.grad is not None
    linear_logprob(hidden_TD.detach(), weight_VD, targets_T).logprob_T.sum().backward()
    assert weight_VD.grad is not None
    assert linear_logprob(hidden_TD.detach(), weight_VD.detach(), targets_T).logprob_T.grad_fn is None
    with torch.no_grad():
        assert linear_logprob(hidden_TD, weight_VD, targets_T).entropy_T.grad_fn is None


def test_strided_inputs_and_upstream() -> None:
    hidden_TD, weight_VD, targets_T = random_head(6, 8, 40)
    expected = linear_logprob_reference(hidden_TD, weight_VD, targets_T)
    strided = linear_logprob(
        hidden_TD.T.contiguous().T, weight_VD.T.contiguous().T, targets_T.repeat_interleave(2)[::2]
    )
    upstream = torch.randn(12, dtype=torch.float64)[::2]
    torch.testing.assert_close(
        torch.autograd.grad(strided.logprob_T, (hidden_TD, weight_VD), upstream),
        torch.autograd.grad(expected.logprob_T, (hidden_TD, weight_VD), upstream),
        rtol=1e-11,
        atol=1e-11,
    )


def test_no_rows_gives_empties_and_zero_gradients() -> None:
    hidden_TD = torch.empty(0, 4, requires_grad=True)
    weight_VD = torch.randn(9, 4, requires_grad=True)
    result = linear_logprob(hidden_TD, weight_VD, torch.empty(0, dtype=torch.int64))
    assert [(stat.shape, stat.dtype) for stat in as_tuple(result)] == [((0,), torch.float32)] * 3
    result.logprob_T.sum().backward()
    assert hidden_TD.grad is not None
    assert hidden_TD.grad.shape == (0, 4)
    assert weight_VD.grad is not None
    assert torch.equal(weight_VD.grad, torch.zeros(9, 4))


def test_same_inputs_give_the_same_bits() -> None:
    hidden_TD, weight_VD, targets_T = random_head(9, 16, 3001, torch.float32)
    runs = []
    for _ in range(2):
        stats = as_tuple(linear_logprob(hidden_TD, weight_VD, targets_T))
        runs.append((*stats, *torch.autograd.grad(stats[0].sum(), (hidden_TD, weight_VD))))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_meta_tensors() -> None:
    result = linear_logprob(
        torch.empty(5, 4, device="meta"),
        torch.empty(7, 4, device="meta"),
        torch.empty(5, dtype=torch.int64, device="meta"),
    )
    assert [(stat.shape, stat.device.type) for stat in as_tuple(result)] == [((5,), "meta")] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cuda_equals_cpu(dtype: torch.dtype) -> None:
    hidden_TD, weight_VD, targets_T = random_head(17, 48, 1531, dtype)
    cpu = as_tuple(linear_logprob(hidden_TD, weight_VD, targets_T, temperature=0.9))
    cuda = as_tuple(linear_logprob(hidden_TD.cuda(), weight_VD.cuda(), targets_T.cuda(), temperature=0.9))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    for on_cpu, on_cuda in zip(cpu, cuda, strict=True):
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(torch.stack(cuda).sum(), (hidden_TD, weight_VD)),
        torch.autograd.grad(torch.stack(cpu).sum(), (hidden_TD, weight_VD)),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize(
    ("hidden_shape", "weight_shape", "num_targets", "message"),
    [
        ((5, 4, 1), (7, 4), 5, r"hidden \(5, 4, 1\).*give hidden \[T, D\]"),
        ((5, 4), (7, 3), 5, "D of hidden and weight"),
        ((5, 4), (7, 4), 6, "T of hidden and targets"),
        ((5, 4), (0, 4), 5, r"weight \(0, 4\)"),
    ],
)
def test_bad_shapes_are_refused(
    hidden_shape: tuple, weight_shape: tuple, num_targets: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        linear_logprob(
            torch.zeros(hidden_shape), torch.zeros(weight_shape), torch.zeros(num_targets, dtype=torch.int64)
        )


@pytest.mark.parametrize("target", [-1, 7])
def test_target_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, 7\).*from {min(target, 0)} to {max(target, 0)}"):
        linear_logprob(torch.zeros(2, 4), torch.zeros(7, 4), torch.tensor([0, target]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be finite and above 0"):
        linear_logprob(torch.zeros(1, 4), torch.zeros(7, 4), torch.tensor([0]), temperature=temperature)


def test_bad_dtypes_are_refused() -> None:
    hidden_TD, weight_VD, targets_T = random_head(2, 3, 5)
    with pytest.raises(ValueError, match="give one float dtype"):
        linear_logprob(hidden_TD.float(), weight_VD, targets_T)
    with pytest.raises(ValueError, match="give int64"):
        linear_logprob(hidden_TD, weight_VD, targets_T.int())
    with pytest.raises(ValueError, match="float16 on the CPU"):
        linear_logprob(hidden_TD.half(), weight_VD.half(), targets_T)
