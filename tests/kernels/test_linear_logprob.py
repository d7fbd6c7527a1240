import json
import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from omnigrpo_kernels import chunking, extension
from omnigrpo_kernels.chunking import token_chunks
from omnigrpo_kernels.linear_logprob import LogProbs, linear_logprob, linear_logprob_reference

SIZES = {
    "1x1x1": (1, 1, 1),
    "3x4x2": (3, 4, 2),
    "prime": (7, 11, 1031),
    "past a panel": (33, 16, 2049),
}
each_size = pytest.mark.parametrize(("rows", "width", "vocabulary"), SIZES.values(), ids=SIZES.keys())
each_low_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """The ops are small: on a busy machine a second thread costs more than it gives. tests/conftest.py restores it."""
    torch.set_num_threads(1)


@pytest.fixture(params=["amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The instruction set that is active during the test."""
    module = extension.load()
    before = module.cpu_isa()
    try:
        module.use_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    module.use_cpu_isa(before)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_head(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    hidden_RD = torch.randn(rows, width, dtype=torch.float64, generator=generator) * spread / math.sqrt(width)
    weight_VD = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    targets_C = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden_RD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_C


def shared_rows(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Rows and targets of twice as many tokens: row 0 predicts half of them, one target twice; the last row none."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows_C = torch.cat([torch.zeros(rows, dtype=torch.int64), torch.randperm(rows, generator=generator)])
    rows_C = rows_C.where(rows_C != rows - 1, 0)[torch.randperm(2 * rows, generator=generator)]
    targets_C = torch.randint(vocabulary, (2 * rows,), generator=generator)
    first, second = (rows_C == 0).nonzero().squeeze(1)[:2].tolist()
    targets_C[second] = targets_C[first]
    return rows_C, targets_C


def as_tuple(result: LogProbs) -> tuple[Tensor, Tensor, Tensor]:
    return result.logprob_T, result.entropy_T, result.lse_T


def of_logits(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """A hidden state and a weight whose product is exactly these logits."""
    return torch.eye(logits_TV.shape[0], dtype=logits_TV.dtype), logits_TV.T.contiguous()


def exact_stats(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return as_tuple(linear_logprob_reference(*of_logits(logits_TV.double()), targets_T))


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, weight_VD: Tensor) -> None:
    """Of forward, which keeps no exponentials, and of backward."""
    budget = rows * weight_VD.shape[0] * weight_VD.element_size()
    monkeypatch.setattr(chunking, "CHUNK_BYTES", {"cpu": budget})
    monkeypatch.setattr(chunking, "FORWARD_ROWS", rows)


@each_size
@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
def test_float64_equals_the_reference(
    rows: int, width: int, vocabulary: int, temperature: float, shared: bool
) -> None:
    hidden_RD, weight_VD, targets_C = random_head(rows, width, vocabulary)
    rows_C = None
    if shared:
        rows_C, targets_C = shared_rows(rows, vocabulary)
    given: dict[str, Any] = {"rows_C": rows_C, "temperature": temperature}
    ours = as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C, **given))
    reference = as_tuple(linear_logprob_reference(hidden_RD, weight_VD, targets_C, **given))
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)
    generator = torch.Generator().manual_seed(1)
    upstream = list(torch.randn(3, len(targets_C), dtype=torch.float64, generator=generator))
    grads = torch.autograd.grad(ours, (hidden_RD, weight_VD), upstream)
    expected = torch.autograd.grad(reference, (hidden_RD, weight_VD), upstream)
    torch.testing.assert_close(grads, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
def test_gradcheck(chunk_rows: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight_VD, targets_C = random_head(5, 4, 19)
    rows_C = None
    if shared:
        rows_C, targets_C = shared_rows(5, 19)
    rows_per_chunk(monkeypatch, chunk_rows, weight_VD)

    def stats(hidden_RD: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C, rows_C=rows_C, temperature=0.8))

    assert torch.autograd.gradcheck(stats, (hidden_RD, weight_VD))


@each_low_dtype
@pytest.mark.parametrize("chunk_rows", [3, 100], ids=["chunks", "one chunk"])
@pytest.mark.parametrize("size", [(17, 48, 1531), (33, 896, 1031)], ids=["narrow", "wide"])
@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
def test_low_precision_is_as_close_as_the_reference(
    dtype: torch.dtype,
    chunk_rows: int,
    size: tuple[int, int, int],
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden_RD, weight_VD, targets_C = random_head(*size, dtype)
    rows_C = None
    if shared:
        rows_C, targets_C = shared_rows(size[0], size[2])
    rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(3, len(targets_C), generator=generator)

    def stats_and_grads(
        compute: Callable[..., LogProbs], hidden_RD: Tensor, weight_VD: Tensor
    ) -> tuple[Tensor, ...]:
        stats = as_tuple(compute(hidden_RD, weight_VD, targets_C, rows_C=rows_C, temperature=0.9))
        return *stats, *torch.autograd.grad(stats, (hidden_RD, weight_VD), list(upstream.to(stats[0])))

    ours = stats_and_grads(linear_logprob, hidden_RD, weight_VD)
    same_dtype = stats_and_grads(linear_logprob_reference, hidden_RD, weight_VD)
    exact = stats_and_grads(
        linear_logprob_reference,
        hidden_RD.detach().double().requires_grad_(),
        weight_VD.detach().double().requires_grad_(),
    )
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 3 + [dtype] * 2
    for actual, peer, truth in zip(ours, same_dtype, exact, strict=True):
        error, peer_error = actual.double() - truth, peer.double() - truth
        assert error.norm() <= 2 * peer_error.norm() + 1e-7 * truth.norm()
        assert error.abs().max() <= 2 * peer_error.abs().max() + 4e-7 * truth.abs().max()


Head = tuple[Tensor, Tensor, Tensor]


def wide_logits(dtype: torch.dtype) -> Head:
    """Independent logits of a standard deviation of 8.5: the largest are about 36."""
    hidden_RD, weight_VD, targets_C = random_head(24, 896, 2003, dtype, spread=8.5)
    return hidden_RD.detach(), weight_VD.detach(), targets_C


def aligned_logits(dtype: torch.dtype, width: int = 896) -> Head:
    """Targets whose logit is 36 or -36 and every partial sum of it grows: rounding errors of a long sum add up."""
    hidden_RD, weight_VD, _ = random_head(24, width, 2003, spread=math.sqrt(width))
    weight_VD = 0.02 * weight_VD.detach()
    hidden_RD = hidden_RD.detach().to(dtype).double()
    at_targets = torch.where(torch.arange(24) % 2 == 0, 36.0, -36.0).double()
    weight_VD[:24] = hidden_RD * (at_targets / hidden_RD.square().sum(1))[:, None]
    return hidden_RD.to(dtype), weight_VD.to(dtype), torch.arange(24)


def deep_logits(dtype: torch.dtype) -> Head:
    """The same with the width of a model of 7 billion parameters."""
    return aligned_logits(dtype, 3584)


@each_low_dtype
@pytest.mark.parametrize("head", [wide_logits, aligned_logits, deep_logits])
def test_logprobs_are_within_1e_5_at_logits_of_36(
    isa: str, head: Callable[[torch.dtype], Head], dtype: torch.dtype
) -> None:
    hidden_RD, weight_VD, targets_C = head(dtype)
    largest = (hidden_RD.double() @ weight_VD.double().T).abs().max()
    assert 33 < largest < 40
    ours = linear_logprob(hidden_RD, weight_VD, targets_C)
    exact = linear_logprob_reference(hidden_RD.double(), weight_VD.double(), targets_C)
    assert (ours.logprob_T - exact.logprob_T).abs().max() <= 1e-5
    assert (ours.entropy_T - exact.entropy_T).abs().max() <= 2e-5


@each_low_dtype
@pytest.mark.parametrize("vocabulary", [151_936, 152_064, 151_937])
def test_vocabularies_of_real_size(vocabulary: int, dtype: torch.dtype) -> None:
    """Rows: random logits up to 36; all below -88; all at -60 but the target, the last column, at -90; a confident one.

    A stray exp(0) beyond the vocabulary would dominate the second and third.
    """
    generator = torch.Generator().manual_seed(vocabulary)
    weight_VD = torch.randn(vocabulary, 16, generator=generator)
    hidden_RD = torch.zeros(6, 16)
    hidden_RD[:3, 4:] = torch.randn(3, 12, generator=generator) * 2.2
    targets_C = torch.tensor([0, vocabulary - 1, 77, 1234, vocabulary - 1, vocabulary - 2])
    weight_VD[:, :4] = torch.tensor([-92.0, -60.0, 0.0, 0.0])
    weight_VD[vocabulary - 1, 1], weight_VD[vocabulary - 2, 2] = -90.0, 32.0
    hidden_RD[3, 0], hidden_RD[3, 4:6] = 1.0, 0.5
    hidden_RD[4, 1] = hidden_RD[5, 2] = 1.0
    hidden_RD, weight_VD = hidden_RD.to(dtype), weight_VD.to(dtype)
    logits_CV = hidden_RD.double() @ weight_VD.double().T
    assert logits_CV[:3].abs().max() > 30
    assert logits_CV[3].max() < -88
    ours = as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C))
    exact = as_tuple(linear_logprob_reference(hidden_RD.double(), weight_VD.double(), targets_C))
    assert -1e-7 < exact[0][5] < 0
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=1e-7, atol=1e-5)
    torch.testing.assert_close(ours[0][5].double(), exact[0][5], rtol=1e-5, atol=0)


def test_chunks_change_no_bit_of_a_statistic_and_only_round_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden_RD, weight_VD, targets_C = random_head(70, 33, 1031, dtype)
        results = []
        for chunk_rows in (70, 33, 5, 1):
            rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
            for keep in (False, True):
                chunks = list(
                    token_chunks(hidden_RD.detach(), weight_VD.detach(), targets_C, None, keep=keep)
                )
                assert len(chunks) >= math.ceil(70 / chunk_rows)
            stats = as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C))
            results.append(
                (stats, torch.autograd.grad(stats[0].sum() + stats[1].sum(), (hidden_RD, weight_VD)))
            )
        (stats, grads), *chunked = results
        tolerance = 1e-5 if dtype == torch.float32 else 2**-7
        for chunked_stats, chunked_grads in chunked:
            assert all(torch.equal(actual, whole) for actual, whole in zip(chunked_stats, stats, strict=True))
            torch.testing.assert_close(chunked_grads, grads, rtol=tolerance, atol=tolerance)


@each_low_dtype
def test_chunks_that_part_the_tokens_of_a_row_only_round(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over other columns and the offset follow the targets that a chunk holds."""
    hidden_RD, weight_VD, _ = random_head(20, 33, 1031, dtype)
    rows_C, targets_C = shared_rows(20, 1031)
    results = []
    for chunk_rows in (100, 7, 1):
        rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
        results.append(as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C, rows_C=rows_C)))
    for chunked in results[1:]:
        torch.testing.assert_close(chunked, results[0], rtol=0, atol=4e-6)


@each_low_dtype
def test_runs_and_thread_counts_give_the_same_bits(dtype: torch.dtype, restored_threads: None) -> None:
    hidden_RD, weight_VD, _ = random_head(40, 33, 3001, dtype)
    rows_C, targets_C = shared_rows(40, 3001)
    runs = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        stats = as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C, rows_C=rows_C))
        loss = stats[0].sum() + 0.1 * stats[1].sum()
        runs.append((*stats, *torch.autograd.grad(loss, (hidden_RD, weight_VD))))
    for run in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(run, runs[0], strict=True))


def peak_bytes(work: Callable[[], object], folder: Path) -> int:
    """Largest sum of what PyTorch's CPU allocator handed out during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def test_forward_keeps_nothing_of_the_size_of_the_vocabulary(tmp_path: Path) -> None:
    hidden_RD, weight_VD, targets_C = random_head(512, 8, 4000, torch.bfloat16)
    with torch.no_grad():
        linear_logprob(hidden_RD, weight_VD, targets_C)
        peak = peak_bytes(lambda: linear_logprob(hidden_RD, weight_VD, targets_C), tmp_path)
    assert 512 * 3 * 4 <= peak < 0.04 * (512 * 4000 * 4)


def test_logits_all_far_below_exp_range() -> None:
    logits_TV = torch.randn(4, 333, generator=torch.Generator().manual_seed(0)) - 500.0
    targets_T = torch.tensor([0, 5, 331, 332])
    stats = as_tuple(linear_logprob(*of_logits(logits_TV), targets_T))
    for actual, exact in zip(stats, exact_stats(logits_TV, targets_T), strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("magnitude", [36.0, 80.0, 400.0, 1e4])
def test_large_logits(magnitude: float) -> None:
    """The target is up to 20,000 nats below the maximum."""
    logits_TV = torch.linspace(-magnitude, magnitude, 777).repeat(3, 1)
    targets_T = torch.tensor([0, 388, 776])
    hidden_TD, weight_VD = (matrix.requires_grad_() for matrix in of_logits(logits_TV))
    result = linear_logprob(hidden_TD, weight_VD, targets_T)
    exact = exact_stats(logits_TV, targets_T)
    tolerance = 2e-7 * magnitude
    torch.testing.assert_close(result.logprob_T.double(), exact[0], rtol=5e-7, atol=tolerance)
    torch.testing.assert_close(result.entropy_T.double(), exact[1], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result.lse_T.double(), exact[2], rtol=5e-7, atol=tolerance)
    (result.logprob_T.sum() + result.entropy_T.sum()).backward()
    for matrix in (hidden_TD, weight_VD):
        assert matrix.grad is not None
        assert matrix.grad.isfinite().all()


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
    assert result.logprob_T.item() == pytest.approx(-math.log1p(others), rel=5e-6)
    assert result.entropy_T.item() == pytest.approx(
        math.log1p(others) + others * margin / (1 + others), rel=5e-6
    )
    result.logprob_T.sum().backward()
    assert weight_VD.grad is not None
    assert weight_VD.grad[target].item() == pytest.approx(others / (1 + others), rel=5e-6)
    assert weight_VD.grad.sum().item() == pytest.approx(0, abs=1e-5 * others)


@each_low_dtype
@pytest.mark.parametrize("margin", [18.0, 24.0])
def test_confident_token_of_a_shared_row_keeps_relative_precision(margin: float, dtype: torch.dtype) -> None:
    """Its only rivals are the other tokens of its row: what is left of 1 - p is not the sum over other columns."""
    logits_TV = torch.full((1, 50), -60.0)
    logits_TV[0, [3, 9, 40]] = torch.tensor([margin, 0.0, 0.0])
    hidden_TD, weight_VD = of_logits(logits_TV)
    targets_C, rows_C = torch.tensor([9, 3, 40, 3]), torch.zeros(4, dtype=torch.int64)
    weight_VD = weight_VD.to(dtype).requires_grad_()
    result = linear_logprob(hidden_TD.to(dtype), weight_VD, targets_C, rows_C=rows_C)
    others = 2 * math.exp(-margin)
    assert result.logprob_T[[1, 3]].tolist() == pytest.approx([-math.log1p(others)] * 2, rel=5e-6)
    result.logprob_T[1].backward()
    assert weight_VD.grad is not None
    grad_V = weight_VD.grad.squeeze(1)
    assert grad_V[3].item() == pytest.approx(others / (1 + others), rel=2**-8)
    assert grad_V[[9, 40]].tolist() == pytest.approx([-others / 2 / (1 + others)] * 2, rel=2**-8)


def test_peaked_row_with_ragged_vocabulary_counts_no_column_beyond_it() -> None:
    """With every logit at -60 but one at -90 as target, a stray exp(0) would dominate."""
    logits_TV = torch.full((1, 1031), -60.0)
    logits_TV[0, 7] = -90.0
    result = linear_logprob(*of_logits(logits_TV), torch.tensor([7]))
    assert result.logprob_T.item() == pytest.approx(-30 - math.log(1030), rel=1e-6)
    assert result.entropy_T.item() == pytest.approx(math.log(1030), rel=1e-6)


def test_masked_columns_have_no_share() -> None:
    """A weight of -infinity, as one row's mask: the columns' probability is exactly 0."""
    weight_VD = torch.randn(300, 1, generator=torch.Generator().manual_seed(0))
    masked = torch.zeros(300, dtype=torch.bool)
    masked[5:290] = True
    kept = linear_logprob(torch.ones(1, 1), weight_VD[~masked], torch.tensor([6]))
    weight_VD[masked] = -torch.inf
    result = linear_logprob(torch.ones(1, 1), weight_VD, torch.tensor([291]))
    torch.testing.assert_close(as_tuple(result), as_tuple(kept), rtol=0, atol=1e-6)


@each_low_dtype
def test_nan_in_the_weight_is_no_number(dtype: torch.dtype) -> None:
    weight_VD = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight_VD[200, 2] = torch.nan
    result = linear_logprob(torch.ones(3, 4, dtype=dtype), weight_VD, torch.tensor([0, 200, 299]))
    assert all(stat.isnan().all() for stat in as_tuple(result))


def test_uniform_row_by_hand() -> None:
    result = linear_logprob(torch.zeros(1, 3), torch.ones(8, 3), torch.tensor([2]), temperature=0.5)
    expected = math.log(8)
    assert [stat.item() for stat in as_tuple(result)] == pytest.approx([-expected, expected, expected])


def test_vocabulary_of_one_is_certain() -> None:
    weight_VD = torch.ones(1, 3, requires_grad=True)
    result = linear_logprob(torch.ones(2, 3), weight_VD, torch.tensor([0, 0]))
    torch.testing.assert_close(torch.stack(as_tuple(result)), torch.tensor([[0.0, 0], [0, 0], [3, 3]]))
    assert (result.logprob_T == 0).all()
    (result.logprob_T.sum() + result.entropy_T.sum()).backward()
    assert weight_VD.grad is not None
    torch.testing.assert_close(weight_VD.grad, torch.zeros(1, 3), rtol=0, atol=1e-15)


def test_temperature_divides_the_logits() -> None:
    hidden_RD, weight_VD, targets_C = random_head(4, 6, 50)
    divided = as_tuple(linear_logprob(hidden_RD / 2.5, weight_VD, targets_C))
    torch.testing.assert_close(
        as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C, temperature=2.5)),
        divided,
        rtol=0,
        atol=1e-12,
    )


def test_frozen_side_gets_no_gradient() -> None:
    hidden_RD, weight_VD, targets_C = random_head(4, 6, 50)
    linear_logprob(hidden_RD, weight_VD.detach(), targets_C).logprob_T.sum().backward()
    assert hidden_RD.grad is not None
    linear_logprob(hidden_RD.detach(), weight_VD, targets_C).logprob_T.sum().backward()
    assert weight_VD.grad is not None
    assert linear_logprob(hidden_RD.detach(), weight_VD.detach(), targets_C).logprob_T.grad_fn is None
    with torch.no_grad():
        assert linear_logprob(hidden_RD, weight_VD, targets_C).entropy_T.grad_fn is None


def test_strided_inputs_and_upstream() -> None:
    hidden_RD, weight_VD, targets_C = random_head(6, 8, 40)
    expected = linear_logprob_reference(hidden_RD, weight_VD, targets_C)
    strided = linear_logprob(
        hidden_RD.T.contiguous().T,
        weight_VD.T.contiguous().T,
        targets_C.repeat_interleave(2)[::2],
        rows_C=torch.arange(6).repeat_interleave(2)[::2],
    )
    upstream = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[::2]
    torch.testing.assert_close(
        torch.autograd.grad(strided.logprob_T, (hidden_RD, weight_VD), upstream),
        torch.autograd.grad(expected.logprob_T, (hidden_RD, weight_VD), upstream),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize(("rows", "with_rows"), [(0, False), (0, True), (3, True)])
def test_no_tokens_give_empties_and_zero_gradients(rows: int, with_rows: bool) -> None:
    hidden_RD = torch.ones(rows, 4, requires_grad=True)
    weight_VD = torch.ones(9, 4, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    result = linear_logprob(hidden_RD, weight_VD, nothing, rows_C=nothing if with_rows else None)
    assert [(stat.shape, stat.dtype) for stat in as_tuple(result)] == [((0,), torch.float32)] * 3
    result.logprob_T.sum().backward()
    assert hidden_RD.grad is not None
    assert torch.equal(hidden_RD.grad, torch.zeros(rows, 4))
    assert weight_VD.grad is not None
    assert torch.equal(weight_VD.grad, torch.zeros(9, 4))


def test_second_derivative_is_refused() -> None:
    hidden_RD, weight_VD, targets_C = random_head(4, 6, 50)
    logprob_C = linear_logprob(hidden_RD, weight_VD, targets_C).logprob_T
    upstream_C = torch.ones_like(logprob_C, requires_grad=True)
    (grad_RD,) = torch.autograd.grad(logprob_C, hidden_RD, upstream_C, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_RD.sum().backward()


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
    hidden_RD, weight_VD, _ = random_head(17, 48, 1531, dtype)
    rows_C, targets_C = shared_rows(17, 1531)
    given: dict[str, Any] = {"rows_C": rows_C, "temperature": 0.9}
    cpu = as_tuple(linear_logprob(hidden_RD, weight_VD, targets_C, **given))
    cuda = as_tuple(linear_logprob(hidden_RD.cuda(), weight_VD.cuda(), targets_C, **given))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}[dtype]
    for on_cpu, on_cuda in zip(cpu, cuda, strict=True):
        torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=0, atol=tolerance)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(
        torch.autograd.grad(torch.stack(cuda).sum(), (hidden_RD, weight_VD)),
        torch.autograd.grad(torch.stack(cpu).sum(), (hidden_RD, weight_VD)),
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
    with pytest.raises(ValueError, match=f"^linear_logprob: .*{message}"):
        linear_logprob(
            torch.zeros(hidden_shape), torch.zeros(weight_shape), torch.zeros(num_targets, dtype=torch.int64)
        )


@pytest.mark.parametrize("target", [-1, 7])
def test_target_out_of_range_is_refused(target: int) -> None:
    with pytest.raises(ValueError, match=rf"in \[0, 7\).*from {min(target, 0)} to {max(target, 0)}"):
        linear_logprob(torch.zeros(2, 4), torch.zeros(7, 4), torch.tensor([0, target]))


@pytest.mark.parametrize("row", [-1, 2])
def test_row_out_of_range_is_refused(row: int) -> None:
    with pytest.raises(ValueError, match=r"^linear_logprob: every row must be in \[0, 2\)"):
        linear_logprob(
            torch.zeros(2, 4), torch.zeros(7, 4), torch.tensor([0, 0]), rows_C=torch.tensor([0, row])
        )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperature_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be finite and above 0"):
        linear_logprob(torch.zeros(1, 4), torch.zeros(7, 4), torch.tensor([0]), temperature=temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_hidden_states_that_are_not_finite_are_refused(value: float) -> None:
    hidden_RD = torch.zeros(3, 4)
    hidden_RD[1, 2] = value
    with pytest.raises(ValueError, match=r"^linear_logprob: hidden has NaN or infinity, first in row 1"):
        linear_logprob(hidden_RD, torch.zeros(7, 4), torch.tensor([0, 1, 2]))


def test_bad_dtypes_are_refused() -> None:
    hidden_RD, weight_VD, targets_C = random_head(2, 3, 5)
    with pytest.raises(ValueError, match="give one float dtype"):
        linear_logprob(hidden_RD.float(), weight_VD, targets_C)
    with pytest.raises(ValueError, match="give int64"):
        linear_logprob(hidden_RD, weight_VD, targets_C.int())
    with pytest.raises(ValueError, match="got float16"):
        linear_logprob(hidden_RD.half(), weight_VD.half(), targets_C)
