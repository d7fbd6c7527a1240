"""The low-level ops on every instruction set of this CPU, and the algebra around them, against float64."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels import extension
from omnigrpo_kernels.vocabulary_head import (
    StatisticGrads,
    TokenPairs,
    check_head_inputs,
    head_backward,
    head_pass,
    pairs_to,
    row_grads,
    stat_dtype_of,
    token_pairs,
)

LOG2E = 1 / math.log(2)
SMALLEST = {torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126, torch.float64: 2.0**-251}
"""Exponentials below it are stored as 0, or in float64 as less than it."""
STORED = {torch.bfloat16: 3.95e-3, torch.float32: 5e-6, torch.float64: 1e-13}
"""Relative error of a value in the inputs' dtype: half a unit in the last place, and float32's arithmetic."""
SUMMED = {torch.bfloat16: 4e-6, torch.float32: 4e-6, torch.float64: 1e-13}
"""Relative error of a sum, which never is bfloat16."""

SHAPES = {
    "1x1x1": (1, 1, 1),
    "width 1": (3, 1, 45),
    "one row": (1, 64, 700),
    "below a tile": (5, 6, 3),
    "odd everywhere": (33, 7, 1031),
    "whole panels": (64, 32, 336),
    "three panels": (67, 33, 97),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_dtype = pytest.mark.parametrize("dtype", STORED, ids=str)


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


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_matrices(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of a standard deviation of 3."""
    rows, width, vocabulary = shape
    source = generator(rows * vocabulary + width)
    hidden = torch.randn(rows, width, generator=source, dtype=torch.float64) * 3 / math.sqrt(width)
    weight = torch.randn(vocabulary, width, generator=source, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype)


def random_pairs(num_rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """One to three targets a row, in no order; the first row has both ends of the vocabulary."""
    source = generator(num_rows + vocabulary)
    targets = [torch.randperm(vocabulary, generator=source)[: 1 + t % 3] for t in range(num_rows)]
    targets[0] = torch.tensor([vocabulary - 1, 0][: min(vocabulary, 2)])
    rows = torch.arange(num_rows).repeat_interleave(torch.tensor([len(of_row) for of_row in targets]))
    return rows, torch.cat(targets)


def stored_exps(exps: Tensor, num_rows: int, vocabulary: int) -> Tensor:
    """E ``[T, V]`` in float64, whatever its layout: its product with an identity, taken from a copy."""
    dtype, rows = exps.dtype, torch.arange(num_rows)
    return torch.ops.omnigrpo.head_gradients(
        exps.clone(),
        torch.zeros(num_rows, vocabulary, dtype=dtype),
        torch.eye(vocabulary, dtype=dtype),
        rows,
        torch.ones(num_rows, dtype=stat_dtype_of(dtype)),
        None,
        None,
        None,
        False,
        True,
    ).double()


def products(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return hidden.double() @ weight.double().T / temperature


def exact_exps(logits: Tensor, offset: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """E and log2 E of the definition, ``[T, V]`` float64; E is 0 at the targets."""
    y = logits * LOG2E - offset.double()[:, None]
    exps = torch.exp2(y)
    exps[rows, targets] = 0
    return exps, y


@each_shape
@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exponentials_and_sums(
    isa: str, dtype: torch.dtype, shape: tuple[int, int, int], temperature: float
) -> None:
    hidden, weight = random_matrices(shape, dtype)
    rows, targets = random_pairs(shape[0], shape[2])
    exps, offset, others, weighted, pair_logits = torch.ops.omnigrpo.head_exps(
        hidden, weight, rows, targets, temperature, True
    )
    logits = products(hidden, weight, temperature)
    assert exps.dtype == dtype
    assert {stat.dtype for stat in (offset, others, weighted, pair_logits)} == {stat_dtype_of(dtype)}
    is_target_TV = torch.zeros_like(logits, dtype=torch.bool)
    is_target_TV[rows, targets] = True
    exponent_T = logits.where(is_target_TV, -torch.inf).amax(1) * LOG2E
    is_near_T = logits.amax(1) * LOG2E - exponent_T < 59
    assert is_near_T.any()
    assert torch.equal(offset, offset.round())
    assert ((offset - exponent_T).abs() < 0.501)[is_near_T].all()
    expected, y = exact_exps(logits, offset, rows, targets)
    stored = stored_exps(exps, shape[0], shape[2])
    torch.testing.assert_close(stored, expected, rtol=STORED[dtype], atol=2 * SMALLEST[dtype])
    assert (stored[rows, targets] <= (SMALLEST[dtype] if dtype == torch.float64 else 0)).all()
    tolerance = SUMMED[dtype]
    torch.testing.assert_close(
        others.double(), expected.sum(1), rtol=tolerance, atol=shape[2] * SMALLEST[dtype]
    )
    error = (weighted.double() - (expected * y).sum(1)).abs()
    assert (error <= tolerance * (expected * (y.abs() + 1)).sum(1) + 1e-30).all()
    torch.testing.assert_close(
        pair_logits.double(), logits[rows, targets], rtol=tolerance, atol=tolerance / 4
    )


@each_dtype
def test_sums_are_the_same_bits_without_exponentials(isa: str, dtype: torch.dtype) -> None:
    hidden, weight = random_matrices((33, 7, 1031), dtype)
    pairs = random_pairs(33, 1031)
    exps, *kept = torch.ops.omnigrpo.head_exps(hidden, weight, *pairs, 1.0, True)
    nothing, *sums = torch.ops.omnigrpo.head_exps(hidden, weight, *pairs, 1.0, False)
    assert exps.numel() >= 33 * 1031
    assert nothing.numel() == 0
    assert all(torch.equal(left, right) for left, right in zip(kept, sums, strict=True))


@each_dtype
def test_rows_are_the_same_bits_whatever_rows_are_with_them(isa: str, dtype: torch.dtype) -> None:
    hidden, weight = random_matrices((67, 33, 500), dtype)
    targets = torch.randint(500, (67,), generator=generator(0))
    exps, *sums = torch.ops.omnigrpo.head_exps(hidden, weight, torch.arange(67), targets, 1.0, True)
    stored = stored_exps(exps, 67, 500)
    for rows in (slice(0, 1), slice(3, 40), slice(50, 67)):
        count = rows.stop - rows.start
        some_exps, *some = torch.ops.omnigrpo.head_exps(
            hidden[rows], weight, torch.arange(count), targets[rows], 1.0, True
        )
        assert torch.equal(stored_exps(some_exps, count, 500), stored[rows])
        assert all(torch.equal(part, whole[rows]) for part, whole in zip(some, sums, strict=True))


@each_dtype
def test_offset_is_the_largest_targets_exponent_up_to_sixty_binades_below_the_maximum(
    isa: str, dtype: torch.dtype
) -> None:
    """Rows 0, 1 and 4 keep it (0, 41 and 10 nats below), 2 and 3 (42 and 200 nats) start again with their own."""
    weight = torch.zeros(100, 5, dtype=dtype)
    weight[:, 0] = torch.linspace(-2, 2, 100).to(dtype)
    weight[50, :] = 3.0  # the maximum of every row, in a tile between others
    weight[7] = torch.tensor([0.0, -41 + 3, -42 + 3, -300 + 3, -300 + 3], dtype=dtype)
    weight[8, 3:] = torch.tensor(
        [-200 + 3, -10 + 3], dtype=dtype
    )  # the larger of the two targets of rows 3 and 4
    hidden = torch.eye(5, dtype=dtype)
    targets = torch.tensor([50, 7, 7, 7, 8, 8, 7])
    rows = torch.tensor([0, 1, 2, 3, 3, 4, 4])
    exps, offset, others, _, pair_logits = torch.ops.omnigrpo.head_exps(
        hidden, weight, rows, targets, 1.0, True
    )
    logits = products(hidden, weight, 1.0)
    kept = torch.tensor([0, 1, 4])
    assert torch.equal(offset[kept].double(), (logits[kept, [50, 7, 8]] * LOG2E).round())
    maximum = (logits[2:4, 50] * LOG2E).round()
    assert ((offset[2:4].double() - maximum).abs() <= 1).all()
    expected, _ = exact_exps(logits, offset, rows, targets)
    torch.testing.assert_close(
        stored_exps(exps, 5, 100), expected, rtol=5 * STORED[dtype], atol=2 * SMALLEST[dtype]
    )
    torch.testing.assert_close(others.double(), expected.sum(1), rtol=2e-5, atol=0)
    torch.testing.assert_close(pair_logits.double(), logits[rows, targets], rtol=1e-6, atol=0)


def test_one_row_that_starts_again_changes_no_other(isa: str) -> None:
    hidden, weight = random_matrices((40, 16, 300), torch.float32)
    targets = torch.randint(299, (40,), generator=generator(0))
    rows = torch.arange(40)
    weight[299] = 0
    calm = torch.ops.omnigrpo.head_exps(hidden, weight, rows, targets, 1.0, True)
    pushed = hidden.clone()
    pushed[5] = -weight[targets[5]] * 100  # its target is far below everything else
    torn = torch.ops.omnigrpo.head_exps(pushed, weight, rows, targets, 1.0, True)
    assert torn[1][5] - pushed[5].double() @ weight[targets[5]].double() * LOG2E > 60
    others = rows != 5
    assert torch.equal(stored_exps(torn[0], 40, 300)[others], stored_exps(calm[0], 40, 300)[others])
    assert all(torch.equal(torn[i][others], calm[i][others]) for i in range(1, 5))


@each_shape
@each_dtype
@pytest.mark.parametrize("reweighted", [False, True], ids=["plain", "reweighted"])
@pytest.mark.parametrize("compacted", [False, True], ids=["all rows", "live rows"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["overwrite", "accumulate"])
def test_gradients_of_stored_exponentials(
    isa: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    reweighted: bool,
    compacted: bool,
    accumulate: bool,
) -> None:
    """Rows that are not live are five times as large, and the gradient that is overwritten holds NaN."""
    num_rows, width, vocabulary = shape
    hidden, weight = random_matrices(shape, dtype)
    is_live = torch.arange(num_rows) % 3 != 1 if compacted else torch.ones(num_rows, dtype=torch.bool)
    live = is_live.nonzero().squeeze(1)
    hidden[~is_live] *= 5
    pairs = random_pairs(num_rows, vocabulary)
    exps = torch.ops.omnigrpo.head_exps(hidden, weight, *pairs, 1.0, True)[0]
    stored = stored_exps(exps, num_rows, vocabulary)[live]

    stat, source = stat_dtype_of(dtype), generator(1)
    scale, alpha, beta = torch.randn(3, len(live), generator=source).to(stat)
    base = torch.randn(vocabulary, width, generator=source).to(stat)
    grad_weight = base.clone() if accumulate else torch.full_like(base, torch.nan)
    grad_hidden = torch.ops.omnigrpo.head_gradients(
        exps,
        hidden[live],
        weight,
        live,
        scale,
        alpha if reweighted else None,
        beta if reweighted else None,
        grad_weight,
        accumulate,
        True,
    )

    log2 = stored.clamp_min(SMALLEST[dtype] / 2).log2()
    a, b = alpha.double()[:, None], beta.double()[:, None]
    factor, size = (
        (stored * (a + b * log2), stored * (a.abs() + (b * log2).abs())) if reweighted else (stored,) * 2
    )
    scaled = scale.double()[:, None] * hidden[live].double()
    error = (grad_hidden - scale.double()[:, None] * (factor @ weight.double())).abs()
    bound = scale.double().abs()[:, None] * (size @ weight.double().abs())
    assert grad_hidden.dtype == stat
    assert (error <= (STORED if reweighted else SUMMED)[dtype] * bound).all()
    error = (grad_weight - (factor.T @ scaled + (base.double() if accumulate else 0))).abs()
    bound = STORED[dtype] * (1 + reweighted) * (size.T @ scaled.abs()) + SUMMED[dtype] * base.double().abs()
    assert grad_weight.dtype == stat
    assert (error <= bound).all()


@pytest.mark.parametrize(
    ("scale", "rounded"),
    [
        (1 + 2**-8, 1.0),
        (1 + 3 * 2**-8, 1 + 2**-6),
        (-1 - 3 * 2**-8, -1 - 2**-6),
        (1 + 2**-8 + 2**-20, 1 + 2**-7),
    ],
)
def test_scaled_bfloat16_rows_round_to_nearest_even(isa: str, scale: float, rounded: float) -> None:
    hidden, weight = torch.ones(1, 70).bfloat16(), torch.zeros(3, 70).bfloat16()
    row = torch.tensor([0])
    exps = torch.ops.omnigrpo.head_exps(hidden, weight, row, row, 1.0, True)[
        0
    ]  # 0 at the target, 1 elsewhere
    grad_weight = torch.empty(3, 70)
    torch.ops.omnigrpo.head_gradients(
        exps, hidden, weight, row, torch.tensor([scale]), None, None, grad_weight, False, False
    )
    assert torch.equal(grad_weight, torch.tensor([[0.0], [rounded], [rounded]]).expand(3, 70))


@each_dtype
def test_gradients_that_are_not_wanted(isa: str, dtype: torch.dtype) -> None:
    hidden, weight = random_matrices((5, 6, 40), dtype)
    rows, targets = random_pairs(5, 40)
    live, scale = torch.arange(5), torch.ones(5, dtype=stat_dtype_of(dtype))

    def gradients(grad_weight: Tensor | None, want_hidden: bool) -> Tensor:
        exps = torch.ops.omnigrpo.head_exps(hidden, weight, rows, targets, 1.0, True)[0]
        return torch.ops.omnigrpo.head_gradients(
            exps, hidden, weight, live, scale, None, None, grad_weight, False, want_hidden
        )

    grad_weight, alone = (torch.full((40, 6), torch.nan, dtype=scale.dtype) for _ in range(2))
    both = gradients(grad_weight, True)
    assert torch.equal(gradients(None, True), both)
    assert gradients(alone, False).shape == (0, 6)
    assert torch.equal(alone, grad_weight)


@each_dtype
def test_one_thread_and_two_give_the_same_bits(dtype: torch.dtype, restored_threads: None) -> None:
    hidden, weight = random_matrices((70, 40, 1501), dtype)
    rows, targets = random_pairs(70, 1501)
    live, stat = torch.arange(70)[::2].contiguous(), stat_dtype_of(dtype)
    scale, alpha, beta = torch.randn(3, len(live), generator=generator(0)).to(stat)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        exps, *sums = torch.ops.omnigrpo.head_exps(hidden, weight, rows, targets, 1.0, True)
        kept = stored_exps(exps, 70, 1501)
        grad_weight = torch.ones(1501, 40, dtype=stat)
        grad_hidden = torch.ops.omnigrpo.head_gradients(
            exps, hidden[live], weight, live, scale, alpha, beta, grad_weight, True, True
        )
        results.append([kept, *sums, grad_weight, grad_hidden])
    for result in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(result, results[0], strict=True))


OP_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@each_dtype
@pytest.mark.parametrize("store", [True, False])
def test_opcheck_exponentials(dtype: torch.dtype, store: bool) -> None:
    hidden, weight = random_matrices((64, 6, 40), dtype)
    torch.library.opcheck(
        torch.ops.omnigrpo.head_exps.default,
        (hidden, weight, *random_pairs(64, 40), 0.7, store),
        test_utils=OP_CHECKS,
    )


@each_dtype
@pytest.mark.parametrize("optional", [True, False], ids=["every tensor", "no optional tensor"])
def test_opcheck_gradients(dtype: torch.dtype, optional: bool) -> None:
    hidden, weight = random_matrices((64, 6, 40), dtype)
    exps = torch.ops.omnigrpo.head_exps(hidden, weight, *random_pairs(64, 40), 1.0, True)[0]
    live = torch.arange(64)
    scale, alpha, beta = torch.randn(3, 64, generator=generator(0)).to(stat_dtype_of(dtype))
    grad_weight = torch.zeros(40, 6, dtype=scale.dtype)
    given = (alpha, beta, grad_weight, True, True) if optional else (None, None, None, False, False)
    torch.library.opcheck(
        torch.ops.omnigrpo.head_gradients.default,
        (exps, hidden, weight, live, scale, *given),
        test_utils=OP_CHECKS,
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"hidden": torch.zeros(2, 3).half(), "weight": torch.zeros(4, 3).half()},
            "float32, float64 or bfloat16",
        ),
        ({"hidden": torch.zeros(3, 2).T}, "must be contiguous"),
        ({"hidden": torch.zeros(2, 3).double()}, "of one dtype"),
        ({"weight": torch.zeros(4, 2)}, r"hidden \[T, D\] and weight \[V, D\]"),
        ({"targets": torch.tensor([0, 4])}, r"pair_targets\[1\] is 4; it must be in \[0, 4\)"),
        ({"targets": torch.tensor([-1, 0])}, r"pair_targets\[0\] is -1"),
        ({"targets": torch.tensor([0, 1]).int()}, "pair_targets must be contiguous int64"),
        ({"rows": torch.tensor([0, 2])}, r"pair_rows\[1\] is 2; it must be in \[0, 2\)"),
        ({"rows": torch.tensor([0])}, "one row for each target"),
        ({"temperature": 0.0}, "temperature must be above 0"),
    ],
)
def test_exponentials_refuse_what_they_cannot_read(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(4, 3),
        "rows": torch.tensor([0, 1]),
        "targets": torch.tensor([0, 3]),
        "temperature": 1.0,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.omnigrpo.head_exps(*(given | changed).values(), True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(6, 3)}, "exps must come from head_exps with the same weight"),
        ({"exps": torch.zeros(4, 64).double()}, "exps must come from head_exps"),
        ({"live": torch.tensor([0, 4096])}, r"live\[1\] is 4096"),
        ({"live": torch.tensor([0])}, "hold its live rows"),
        ({"scale": torch.ones(3)}, "row_scale must be contiguous float32 .* each of the 2 live rows"),
        ({"scale": torch.ones(2).double()}, "row_scale must be contiguous float32"),
        ({"alpha": torch.ones(2)}, "alpha and beta, or neither"),
        ({"alpha": torch.ones(2), "beta": torch.ones(1)}, "beta must be contiguous float32"),
        ({"grad_weight": torch.zeros(4, 3).double()}, "grad_weight must be contiguous float32"),
        ({"grad_weight": torch.zeros(3, 4)}, "of weight's shape"),
    ],
)
def test_gradients_refuse_what_they_cannot_read(changed: dict[str, Any], message: str) -> None:
    hidden, weight, pair = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
    given: dict[str, Any] = {
        "exps": torch.ops.omnigrpo.head_exps(hidden, weight, pair, pair, 1.0, True)[0],
        "hidden": hidden,
        "weight": weight,
        "live": torch.tensor([0, 1]),
        "scale": torch.ones(2),
        "alpha": None,
        "beta": None,
        "grad_weight": None,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.omnigrpo.head_gradients(*(given | changed).values(), False, True)


def test_pairs_of_tokens_that_share_rows_and_targets() -> None:
    pairs = token_pairs(torch.tensor([5, 3, 2, 5, 3]), torch.tensor([0, 0, 1, 0, 0]))
    assert pairs.rows_U.tolist() == [0, 0, 1]
    assert pairs.targets_U.tolist() == [3, 5, 2]
    assert (pairs.starts.tolist(), pairs.is_single) == ([0, 2, 3], False)
    assert pairs.pair_C is not None
    assert pairs.pair_C.tolist() == [1, 0, 2, 1, 0]
    of_pairs, of_tokens = torch.tensor([10.0, 20.0, 30.0]), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert pairs.of_tokens(of_pairs).tolist() == [20, 10, 30, 20, 10]
    assert pairs.rows_of_tokens(torch.tensor([7.0, 9.0])).tolist() == [7, 7, 9, 7, 7]
    assert pairs.sum_by_pair(of_tokens).tolist() == [18, 9, 4]
    assert pairs.sum_by_row(of_pairs).tolist() == [30, 30]


def test_pairs_of_tokens_of_their_own_rows() -> None:
    given = token_pairs(torch.tensor([4, 4, 0]), torch.tensor([2, 0, 1]))
    assert (given.starts.tolist(), given.is_single) == ([0, 1, 2, 3], True)
    assert given.rows_U.tolist() == [0, 1, 2]
    assert given.targets_U.tolist() == [4, 0, 4]
    assert given.of_tokens(torch.tensor([1, 2, 3])).tolist() == [3, 1, 2]
    alone = token_pairs(torch.tensor([4, 4, 0]), None)
    assert alone.pair_C is None
    assert alone.rows_U.tolist() == [0, 1, 2]
    values = torch.tensor([1, 2, 3])
    summed = (alone.of_tokens, alone.rows_of_tokens, alone.sum_by_pair, alone.sum_by_row)
    assert all(each(values) is values for each in summed)
    moved = pairs_to(given, torch.device("meta"))
    assert all(
        index is not None and index.device.type == "meta"
        for index in (moved.rows_U, moved.targets_U, moved.starts, moved.order_C, moved.token_starts)
    )


def dense_statistics(
    hidden: Tensor, weight: Tensor, pairs: TokenPairs, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    lse = (hidden @ weight.T / temperature).logsumexp(-1)
    return logp[pairs.rows_U, pairs.targets_U], -(logp.exp() * logp).sum(-1), lse


def shared_rows() -> TokenPairs:
    """Row 0 predicts three tokens, two of them the same; row 2 two; rows 1 and 3 one."""
    return token_pairs(torch.tensor([7, 0, 7, 5, 40, 2, 39]), torch.tensor([0, 0, 0, 1, 2, 2, 3]))


def own_rows() -> TokenPairs:
    return token_pairs(torch.tensor([7, 0, 40, 39]), None)


each_layout = pytest.mark.parametrize("layout", [shared_rows, own_rows], ids=["shared rows", "own rows"])


@each_layout
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_statistics_of_a_pass(isa: str, layout: Callable[[], TokenPairs], temperature: float) -> None:
    hidden, weight = random_matrices((4, 5, 41), torch.float64)
    pairs = layout()
    passed = head_pass(hidden, weight, pairs, temperature, keep=False)
    expected = dense_statistics(hidden, weight, pairs, temperature)
    torch.testing.assert_close(
        (passed.logprob_U, passed.entropy_T, passed.lse_T), expected, rtol=1e-13, atol=1e-13
    )


GRADS = {
    "logprob": (1, 0, 0),
    "entropy": (1, 1, 0),
    "lse": (1, 0, 1),
    "all": (1, 1, 1),
    "entropy alone": (0, 1, 0),
}


@each_layout
@pytest.mark.parametrize("with_grads", GRADS.values(), ids=GRADS.keys())
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_backward_equals_autograd(
    isa: str, layout: Callable[[], TokenPairs], with_grads: tuple[int, int, int], temperature: float
) -> None:
    hidden, weight = (matrix.requires_grad_() for matrix in random_matrices((4, 5, 41), torch.float64))
    pairs, source = layout(), generator(2)
    with_logprob, with_entropy, with_lse = with_grads
    logprob_U = torch.randn(len(pairs.rows_U), dtype=torch.float64, generator=source) * with_logprob
    entropy_T, lse_T = torch.randn(2, 4, dtype=torch.float64, generator=source)
    upstream = [logprob_U, entropy_T * with_entropy, lse_T * with_lse]
    expected = torch.autograd.grad(
        dense_statistics(hidden, weight, pairs, temperature), (hidden, weight), upstream
    )
    grads = StatisticGrads(
        logprob_U=logprob_U,
        entropy_T=entropy_T if with_entropy else None,
        lse_T=lse_T if with_lse else None,
    )
    hidden, weight = hidden.detach(), weight.detach()
    grad_weight = torch.full_like(weight, torch.nan)
    for accumulate in (False, True):
        passed = head_pass(hidden, weight, pairs, temperature, keep=True)
        grad_hidden, dropped = head_backward(
            passed,
            hidden,
            weight,
            pairs,
            row_grads(passed, pairs, grads, temperature),
            grad_weight_VD=grad_weight,
            accumulate=accumulate,
            want_hidden=True,
        )
        assert dropped == 0
        assert grad_hidden is not None
        torch.testing.assert_close(grad_hidden, expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_weight, 2 * expected[1], rtol=1e-12, atol=1e-12)


def test_row_whose_coefficients_cancel_leaves_the_products_and_keeps_its_targets(isa: str) -> None:
    """Row 0's tokens add up to 0: nothing is left of its softmax, and each target keeps its own gradient."""
    hidden, weight = (matrix.requires_grad_() for matrix in random_matrices((4, 5, 41), torch.float64))
    pairs = shared_rows()
    coefficients_C = torch.tensor([1.5, -2.0, 0.5, 0.0, 1.0, 0.25, -1.0], dtype=torch.float64)
    logprob_U, *_ = dense_statistics(hidden, weight, pairs, 1.0)
    expected = torch.autograd.grad((pairs.of_tokens(logprob_U) * coefficients_C).sum(), (hidden, weight))
    hidden, weight = hidden.detach(), weight.detach()
    passed = head_pass(hidden, weight, pairs, 1.0, keep=True)
    rows = row_grads(passed, pairs, StatisticGrads(logprob_U=pairs.sum_by_pair(coefficients_C)), 1.0)
    assert rows.scale_T.count_nonzero() == 2
    grad_weight = torch.full_like(weight, torch.nan)
    grad_hidden, dropped = head_backward(
        passed, hidden, weight, pairs, rows, grad_weight_VD=grad_weight, accumulate=False, want_hidden=True
    )
    assert dropped == 2
    assert grad_hidden is not None
    torch.testing.assert_close((grad_hidden, grad_weight), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_pass_without_any_coefficient_gives_exact_zeros(with_entropy: bool) -> None:
    hidden, weight = random_matrices((4, 5, 41), torch.float32)
    pairs = shared_rows()
    passed = head_pass(hidden, weight, pairs, 1.0, keep=True)
    zeros_T = torch.zeros(4, dtype=torch.float64)
    grads = StatisticGrads(
        logprob_U=torch.zeros(len(pairs.rows_U), dtype=torch.float64),
        entropy_T=zeros_T if with_entropy else None,
    )
    rows = row_grads(passed, pairs, grads, 1.0)
    grad_weight = torch.full_like(weight, torch.nan)
    passed = replace(passed, exps=torch.full_like(passed.exps, torch.nan))
    grad_hidden, dropped = head_backward(
        passed, hidden, weight, pairs, rows, grad_weight_VD=grad_weight, accumulate=False, want_hidden=True
    )
    assert dropped == 4
    assert grad_hidden is not None
    assert not grad_hidden.count_nonzero()
    assert not grad_weight.count_nonzero()


def test_backward_of_one_side_alone() -> None:
    hidden, weight = random_matrices((4, 5, 41), torch.float64)
    pairs = own_rows()
    grads = StatisticGrads(logprob_U=torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64))

    def backward(grad_weight: Tensor | None, want_hidden: bool) -> Tensor | None:
        passed = head_pass(hidden, weight, pairs, 1.0, keep=True)
        return head_backward(
            passed,
            hidden,
            weight,
            pairs,
            row_grads(passed, pairs, grads, 1.0),
            grad_weight_VD=grad_weight,
            accumulate=False,
            want_hidden=want_hidden,
        )[0]

    grad_weight, alone = torch.empty_like(weight), torch.empty_like(weight)
    both = backward(grad_weight, True)
    hidden_alone = backward(None, True)
    assert both is not None
    assert hidden_alone is not None
    assert torch.equal(hidden_alone, both)
    assert both[1].count_nonzero() == 0
    assert backward(alone, False) is None
    assert torch.equal(alone, grad_weight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(5, 4, 1)}, r"got hidden \(5, 4, 1\).*give hidden \[T, D\]"),
        ({"targets": torch.zeros(5, 1).long()}, r"targets \(5, 1\); give hidden"),
        ({"weight": torch.zeros(7, 3)}, "D of hidden and weight differ"),
        ({"weight": torch.zeros(0, 4)}, r"weight \(0, 4\)"),
        (
            {"targets": torch.zeros(6).long()},
            "T of hidden and targets differ: give one target a row, or rows_C",
        ),
        (
            {"hidden": torch.zeros(5, 4).bfloat16()},
            "got hidden torch.bfloat16, weight torch.float32; give one",
        ),
        ({"hidden": torch.zeros(5, 4).int(), "weight": torch.zeros(7, 4).int()}, "give one float dtype"),
        ({"hidden": torch.zeros(5, 4).half(), "weight": torch.zeros(7, 4).half()}, "float16.*give bfloat16"),
        ({"targets": torch.zeros(5).int()}, "got targets torch.int32; give int64"),
        ({"hidden": torch.zeros(5, 4, device="meta")}, "got hidden on meta, weight on cpu; give one device"),
        ({"temperature": 0.0}, r"got temperature 0.0; it must be finite and above 0"),
        ({"temperature": -1.0}, "got temperature -1.0"),
        ({"temperature": math.nan}, "got temperature nan"),
        ({"temperature": math.inf}, "got temperature inf"),
        ({"hidden": torch.zeros(5, 4).index_fill(0, torch.tensor([3]), math.nan)}, "NaN.*first in row 3"),
        (
            {"hidden": torch.zeros(5, 4).index_fill(0, torch.tensor([2]), -math.inf)},
            "infinity.*first in row 2",
        ),
        (
            {"targets": torch.tensor([0, 1, 7, 2, 3])},
            r"every target must be in \[0, 7\).*targets from 0 to 7",
        ),
        ({"targets": torch.tensor([0, 1, -1, 2, 3])}, "targets from -1 to 3"),
        ({"rows": torch.tensor([0, 1, 5, 2, 3])}, r"every row must be in \[0, 5\).*rows from 0 to 5"),
        ({"rows": torch.tensor([0, 1, -2, 2, 3])}, "rows from -2 to 3"),
        ({"rows": torch.tensor([0, 1])}, r"rows torch.int64 \(2,\).*for targets \(5,\)"),
        ({"rows": torch.arange(5).int()}, "got rows torch.int32"),
    ],
)
def test_inputs_without_a_right_answer_are_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(5, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.tensor([0, 6, 1, 2, 3]),
        "rows": None,
        "temperature": 1.0,
    }
    check_head_inputs("head", *given.values())
    with pytest.raises(ValueError, match=f"^head: .*{message}"):
        check_head_inputs("head", *(given | changed).values())
