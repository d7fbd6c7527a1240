"""The CUDA ops of the vocabulary head: on a device, interpreted on the CPU, and compiled ahead of time.

Triton reads TRITON_INTERPRET when it is first imported, so the interpreted cases run in a process of their own, which
`test_kernels_under_the_interpreter` starts with this file.
"""

import importlib
import inspect
import math
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from omnigrpo_kernels import vocabulary_head_cuda as module
from omnigrpo_kernels.vocabulary_head_cuda import (
    NARROW,
    WIDE,
    Tiling,
    head_exps_cuda,
    head_exps_from_logits,
    head_gradients_cuda,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = math.log2(math.e)
STORED_ROUNDING = 2**-7 if INTERPRETED else 2**-8
"""Of a bfloat16: the interpreter truncates."""
SMALL = Tiling(rows=16, columns=64, depth=16, num_warps=4, num_stages=1, programs=1)

compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves no kernel to compile")
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
each_variant = pytest.mark.parametrize(
    "head_exps", [head_exps_cuda, head_exps_from_logits], ids=["tiled", "logits"]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """Inputs of ``head_exps``."""

    hidden_TD: Tensor
    weight_VD: Tensor
    pair_rows_U: Tensor
    pair_targets_U: Tensor
    temperature: float = 1.0

    def run(self, head_exps: Callable[..., tuple[Tensor, ...]], store: bool = True) -> tuple[Tensor, ...]:
        return head_exps(
            self.hidden_TD, self.weight_VD, self.pair_rows_U, self.pair_targets_U, self.temperature, store
        )

    def exact_logits(self) -> Tensor:
        return self.hidden_TD.double() @ self.weight_VD.double().T / self.temperature

    def exact_logprob(self) -> Tensor:
        return self.exact_logits().log_softmax(dim=1)[self.pair_rows_U, self.pair_targets_U]

    def logit_error(self) -> float:
        """What float32 sums of the largest logit may be off by; tensor cores round each of 16 terms towards zero."""
        terms = self.hidden_TD.double().abs() @ self.weight_VD.double().abs().T / self.temperature
        return terms.max().item() * (self.hidden_TD.shape[1] / 16 + 4) * 2**-23 + 1e-6


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted")]
    if INTERPRETED
    else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernels run; the interpreter is slow, so there several tiles are few elements."""
    if INTERPRETED:
        monkeypatch.setattr(module, "WIDE", SMALL)
        monkeypatch.setattr(module, "FLOAT32", SMALL)
        monkeypatch.setattr(module, "SWEEP_COLUMNS", 128)
    with torch.device(request.param):
        yield request.param


def size(on_cpu: int, on_device: int) -> int:
    return on_cpu if torch.get_default_device().type == "cpu" else on_device


def random_head(
    dtype: torch.dtype, *, width: int = 0, temperature: float = 1.0, spread: float = 3.0, pairs: int = 1
) -> Head:
    rows, vocabulary, width = size(19, 300), size(203, 20_011), width or size(24, 200)
    generator = torch.Generator(device=torch.get_default_device()).manual_seed(rows + pairs)
    hidden_TD = torch.randn(rows, width, generator=generator) * spread / math.sqrt(width)
    weight_VD = torch.randn(vocabulary, width, generator=generator)
    counts = [pairs if row % 5 == 0 else 1 for row in range(rows)]
    targets = [
        torch.randperm(vocabulary, generator=generator)[:count].sort(descending=True).values
        for count in counts
    ]
    return Head(
        hidden_TD=hidden_TD.to(dtype),
        weight_VD=weight_VD.to(dtype),
        pair_rows_U=torch.arange(rows).repeat_interleave(torch.tensor(counts)),
        pair_targets_U=torch.cat(targets),
        temperature=temperature,
    )


def head_of_logits(logits_TV: Tensor, pairs: list[tuple[int, int]], dtype: torch.dtype) -> Head:
    """A head whose logits are exactly these; rows without a pair get one at column 3."""
    rows = len(logits_TV)
    covered = {row for row, _ in pairs}
    pairs = sorted(
        [*pairs, *((row, 3) for row in range(rows) if row not in covered)], key=lambda pair: pair[0]
    )
    return Head(
        hidden_TD=torch.eye(rows).to(dtype),
        weight_VD=logits_TV.T.contiguous().to(dtype),
        pair_rows_U=torch.tensor([row for row, _ in pairs]),
        pair_targets_U=torch.tensor([target for _, target in pairs]),
    )


def extreme_logits(low: float, high: float) -> Tensor:
    generator = torch.Generator(device=torch.get_default_device()).manual_seed(7)
    return torch.rand(size(20, 150), size(210, 9000), generator=generator) * (high - low) + low


def peaked(dtype: torch.dtype) -> Head:
    """Targets of probability 1 - 1e-9 and more, one in the last column, which no tile ends with."""
    logits_TV = extreme_logits(-4, 2)
    pairs = [(0, logits_TV.shape[1] - 1), (2, 70), (19, 0)]
    for row, target in pairs:
        logits_TV[row, target] = 36
    return head_of_logits(logits_TV, pairs, dtype)


def far_below(dtype: torch.dtype) -> Head:
    """First targets 100 nats below the maximum: beside an ordinary row, beside a target at the maximum, and alone."""
    logits_TV = extreme_logits(-3, 3)
    logits_TV[1, 5], logits_TV[1, 200] = -50, 50
    logits_TV[4, 9], logits_TV[4, 201] = -50, 50
    logits_TV[18, 64], logits_TV[18, 209] = -64, 36
    return head_of_logits(logits_TV, [(1, 5), (4, 9), (4, 201), (18, 64)], dtype)


CASES: dict[str, Callable[[torch.dtype], Head]] = {
    "random": random_head,
    "temperature": lambda dtype: random_head(dtype, temperature=0.7, spread=6),
    "odd width": lambda dtype: random_head(dtype, width=13),
    "several pairs": lambda dtype: random_head(dtype, pairs=size(9, 64)),
    "36": lambda dtype: head_of_logits(extreme_logits(-36, 36), [(2, 11), (2, 12), (5, 0)], dtype),
    "below -88": lambda dtype: head_of_logits(extreme_logits(-160, -100), [(1, 100)], dtype),
    "peaked": peaked,
    "far below": far_below,
    "one column": lambda dtype: head_of_logits(
        torch.full((18, 1), 2.5), [(row, 0) for row in range(18)], dtype
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def assert_defines(
    head: Head, exps: Tensor, offset: Tensor, others: Tensor, weighted: Tensor, z_U: Tensor
) -> None:
    """The results against the definitions, in float64, for whatever offset was chosen."""
    z_TV, pairs = head.exact_logits(), (head.pair_rows_U, head.pair_targets_U)
    error = head.logit_error()
    assert (z_U.double() - z_TV[pairs]).abs().max() <= error
    assert torch.equal(offset, offset.round())
    y_TV = z_TV * LOG2E - offset.double()[:, None]
    e_TV = y_TV.exp2()
    e_TV[pairs] = 0
    sums = e_TV.sum(dim=1)
    assert ((others.double() - sums).abs() <= sums * 2 * error + 1e-37).all()
    sums_of_terms = (e_TV * y_TV.abs()).sum(dim=1)
    assert (
        (weighted.double() - (e_TV * y_TV).sum(dim=1)).abs() <= (sums_of_terms + sums) * 2 * error + 1e-35
    ).all()
    assert (exps[pairs] == 0).all()
    rounding = 2 * error + (0 if exps.dtype == torch.float32 else STORED_ROUNDING)
    assert ((exps.double() - e_TV).abs() <= e_TV * rounding * 1.01 + 2.0**-126).all()
    assert others.max() < 2.0**61


def logprob(head: Head, offset: Tensor, others: Tensor, z_U: Tensor) -> Tensor:
    """The contract's algebra, in float64."""
    e_U = (z_U.double() * LOG2E - offset.double()[head.pair_rows_U]).exp2()
    rest_U = others.double()[head.pair_rows_U]
    for other in range(len(e_U)):
        same = head.pair_rows_U == head.pair_rows_U[other]
        same[other] = False
        rest_U = rest_U + torch.where(same, e_U[other], 0)
    return -torch.log1p(rest_U / e_U)


@each_variant
@each_dtype
@each_case
def test_definitions(
    device: str,
    case: Callable[[torch.dtype], Head],
    dtype: torch.dtype,
    head_exps: Callable[..., tuple[Tensor, ...]],
) -> None:
    head = case(dtype)
    exps, offset, others, weighted, z_U = head.run(head_exps)
    assert exps.dtype == dtype
    assert exps.shape == (len(head.hidden_TD), len(head.weight_VD))
    assert {result.dtype for result in (offset, others, weighted, z_U)} == {torch.float32}
    assert_defines(head, exps, offset, others, weighted, z_U)
    error = (logprob(head, offset, others, z_U) - head.exact_logprob()).abs()
    assert error.max() <= max(1e-5, 2 * head.logit_error())


@each_variant
@each_dtype
def test_runs_are_bitwise_equal_with_and_without_exps(
    device: str, dtype: torch.dtype, head_exps: Callable[..., tuple[Tensor, ...]]
) -> None:
    head = random_head(dtype, pairs=5)
    results = head.run(head_exps)
    for first, second in zip(results, head.run(head_exps), strict=True):
        assert torch.equal(first, second)
    empty, *vectors = head.run(head_exps, store=False)
    assert empty.shape == (len(head.hidden_TD), 0)
    for first, second in zip(results[1:], vectors, strict=True):
        assert torch.equal(first, second)


@each_dtype
@pytest.mark.parametrize("case", [random_head, far_below], ids=["random", "far below"])
def test_a_row_does_not_depend_on_its_chunk(
    device: str, case: Callable[[torch.dtype], Head], dtype: torch.dtype
) -> None:
    head = case(dtype)
    exps, offset, others, weighted, z_U = head.run(head_exps_cuda)
    for start, end in ((3, 18), (18, 19)):
        chosen_U = (head.pair_rows_U >= start) & (head.pair_rows_U < end)
        part = replace(
            head,
            hidden_TD=head.hidden_TD[start:end],
            pair_rows_U=head.pair_rows_U[chosen_U] - start,
            pair_targets_U=head.pair_targets_U[chosen_U],
        )
        whole = (*(result[start:end] for result in (exps, offset, others, weighted)), z_U[chosen_U])
        for in_part, in_whole in zip(part.run(head_exps_cuda), whole, strict=True):
            assert torch.equal(in_part, in_whole)


@each_variant
@each_dtype
def test_nan_and_infinity_stay_in_their_row(
    device: str, dtype: torch.dtype, head_exps: Callable[..., tuple[Tensor, ...]]
) -> None:
    head = random_head(dtype)
    clean = head.run(head_exps)
    head.hidden_TD[2, 1], head.hidden_TD[7, 0] = math.nan, math.inf
    broken = torch.tensor([row in (2, 7) for row in range(len(head.hidden_TD))])
    _, offset, others, _, z_U = results = head.run(head_exps)
    for result, expected in zip(results, clean, strict=True):
        assert torch.equal(result[~broken], expected[~broken])
    assert logprob(head, offset, others, z_U)[broken].isnan().all()


def test_target_outside_the_vocabulary_is_nan(device: str) -> None:
    head = random_head(torch.bfloat16)
    head.pair_targets_U[[1, 3, 17]] = torch.tensor([len(head.weight_VD), -1, 10**9])
    _, offset, others, _, z_U = head.run(head_exps_cuda)
    assert z_U.isnan().nonzero().flatten().tolist() == [1, 3, 17]
    assert logprob(head, offset, others, z_U).isnan().nonzero().flatten().tolist() == [1, 3, 17]


def test_sums_over_more_tiles_than_one_step_merges(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE", replace(module.WIDE, columns=size(16, 128), num_warps=4))
    head = far_below(torch.bfloat16)
    head = replace(head, weight_VD=torch.cat([head.weight_VD] * size(5, 1)))
    assert len(head.weight_VD) > 64 * module.WIDE.columns
    assert_defines(head, *head.run(head_exps_cuda))


@pytest.mark.parametrize("bands", [1, 2, 1000], ids=lambda bands: f"{bands} rows of tiles")
def test_the_order_of_tiles_changes_nothing(device: str, bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = far_below(torch.bfloat16)
    expected = head.run(head_exps_cuda)
    monkeypatch.setattr(module, "BAND_BYTES", bands * module.WIDE.rows * 2 * len(head.hidden_TD))
    for result, same in zip(head.run(head_exps_cuda), expected, strict=True):
        assert torch.equal(result, same)


def gradient_inputs(head: Head, live: Tensor, with_entropy: bool) -> dict[str, Any]:
    generator = torch.Generator(device=live.device).manual_seed(3)
    row_scale, alpha, beta = torch.randn(3, len(live), generator=generator)
    return {
        "hidden": head.hidden_TD[live],
        "weight": head.weight_VD,
        "live": live,
        "row_scale": row_scale * 1e-3,
        "alpha": alpha if with_entropy else None,
        "beta": beta if with_entropy else None,
    }


@each_dtype
@pytest.mark.parametrize("with_entropy", [False, True], ids=["M = E", "entropy"])
@pytest.mark.parametrize("live", ["all", "some", "last"])
def test_gradients(device: str, dtype: torch.dtype, with_entropy: bool, live: str) -> None:
    head = replace(random_head(dtype), hidden_TD=torch.cat([random_head(dtype).hidden_TD] * 2))
    rows = len(head.hidden_TD)
    head = replace(
        head,
        pair_rows_U=torch.arange(rows),
        pair_targets_U=torch.arange(rows) * 3,
    )
    exps = head.run(head_exps_cuda)[0]
    live_L = {
        "all": torch.arange(rows),
        "some": torch.tensor([row for row in range(rows) if row % 7 not in (0, 3)]),
        "last": torch.tensor([rows - 1]),
    }[live]
    inputs = gradient_inputs(head, live_L, with_entropy)
    matrix = exps[live_L].double()
    if with_entropy:
        factor = inputs["alpha"].double()[:, None] + inputs["beta"].double()[:, None] * matrix.log2()
        matrix = torch.where(matrix == 0, 0, matrix * factor)
    scaled = inputs["row_scale"].double()[:, None] * inputs["hidden"].double()
    exact_hidden = inputs["row_scale"].double()[:, None] * (matrix @ head.weight_VD.double())
    before = torch.randn(head.weight_VD.shape) * 1e-3
    grad_weight = before.clone()
    grad_hidden = head_gradients_cuda(
        exps, grad_weight=grad_weight, accumulate=True, want_hidden=True, **inputs
    )

    assert grad_hidden.dtype == grad_weight.dtype == torch.float32
    rounded, summed = (STORED_ROUNDING, 1e-4) if dtype == torch.bfloat16 else (1e-6, 1e-5)
    terms = matrix.abs() @ head.weight_VD.double().abs() * inputs["row_scale"].double().abs()[:, None]
    allowed = summed + (rounded if with_entropy else 0)
    assert ((grad_hidden.double() - exact_hidden).abs() <= terms * allowed + 1e-30).all()
    terms = matrix.abs().T @ scaled.abs()
    error = (grad_weight.double() - before.double() - matrix.T @ scaled).abs()
    assert (error <= terms * (2 * rounded + summed) + 1e-9).all()


@each_dtype
def test_each_gradient_alone_and_twice_has_the_same_bits(device: str, dtype: torch.dtype) -> None:
    head = random_head(dtype)
    inputs = gradient_inputs(head, torch.arange(1, len(head.hidden_TD)), with_entropy=True)

    def gradients(with_weight: bool, want_hidden: bool) -> tuple[Tensor, Tensor | None]:
        grad_weight = torch.full(head.weight_VD.shape, math.nan) if with_weight else None
        exps = head.run(head_exps_cuda)[0]
        grad_hidden = head_gradients_cuda(
            exps, grad_weight=grad_weight, accumulate=False, want_hidden=want_hidden, **inputs
        )
        return grad_hidden, grad_weight

    grad_hidden, grad_weight = gradients(True, True)
    again_hidden, again_weight = gradients(True, True)
    assert torch.equal(grad_hidden, again_hidden)
    assert grad_weight is not None
    assert again_weight is not None
    assert torch.equal(grad_weight, again_weight)
    assert torch.equal(gradients(False, True)[0], grad_hidden)
    nothing, alone = gradients(True, False)
    assert nothing.shape == (0, head.hidden_TD.shape[1])
    assert alone is not None
    assert torch.equal(alone, grad_weight)


@each_variant
@each_dtype
@pytest.mark.parametrize("case", ["several pairs", "peaked", "far below"])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprob", "entropy"])
def test_gradients_of_a_loss(
    device: str,
    case: str,
    dtype: torch.dtype,
    with_entropy: bool,
    head_exps: Callable[..., tuple[Tensor, ...]],
) -> None:
    """Through the contract's algebra, against autograd in float64, with rows dropped that have no gradient."""
    head = CASES[case](dtype)
    rows, pairs = head.pair_rows_U, (head.pair_rows_U, head.pair_targets_U)
    generator = torch.Generator(device=rows.device).manual_seed(5)
    c_U = torch.randn(len(rows), generator=generator).double() * (rows % 4 != 2)
    b_T = torch.randn(len(head.hidden_TD), generator=generator).double() * with_entropy
    b_T = b_T * (torch.arange(len(b_T)) % 4 != 2)

    hidden, weight = (x.double().requires_grad_() for x in (head.hidden_TD, head.weight_VD))
    logp_TV = (hidden @ weight.T / head.temperature).log_softmax(dim=1)
    loss = (logp_TV[pairs] * c_U).sum() - ((logp_TV.exp() * logp_TV).sum(dim=1) * b_T).sum()
    exact = torch.autograd.grad(loss, (hidden, weight))

    exps, offset, others, weighted, z_U = head.run(head_exps)
    y_U = z_U.double() * LOG2E - offset.double()[rows]
    total_T = others.double().index_add(0, rows, y_U.exp2())
    sum_c_T = torch.zeros_like(total_T).index_add(0, rows, c_U)
    weighted_T = weighted.double().index_add(0, rows, y_U.exp2() * y_U)
    entropy_T = total_T.log() - math.log(2) * weighted_T / total_T
    live = (torch.arange(len(total_T)) % 4 != 2).nonzero().flatten()
    alpha = sum_c_T + b_T * (entropy_T - total_T.log())
    row_scale = -1 / (head.temperature * total_T)
    grad_weight = torch.zeros(head.weight_VD.shape)
    part = head_gradients_cuda(
        exps,
        head.hidden_TD[live],
        head.weight_VD,
        live,
        (row_scale if with_entropy else row_scale * sum_c_T)[live].float(),
        alpha[live].float() if with_entropy else None,
        (b_T * math.log(2))[live].float() if with_entropy else None,
        grad_weight,
        True,
        True,
    )
    logp_U = logprob(head, offset, others, z_U)
    g_U = (c_U - logp_U.exp() * (sum_c_T[rows] + b_T[rows] * (logp_U + entropy_T[rows]))) / head.temperature
    grad_hidden = torch.zeros(head.hidden_TD.shape, dtype=torch.float64).index_add(0, live, part.double())
    grad_hidden.index_add_(0, rows, g_U[:, None] * head.weight_VD.double()[head.pair_targets_U])
    grads = (
        grad_hidden,
        grad_weight.double().index_add(0, head.pair_targets_U, g_U[:, None] * head.hidden_TD.double()[rows]),
    )
    for ours, reference in zip(grads, exact, strict=True):
        assert (ours - reference).norm() <= (1e-2 if dtype == torch.bfloat16 else 2e-5) * reference.norm()


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    with torch.device("cuda"):
        head = far_below(torch.bfloat16)
        live = torch.arange(1, len(head.hidden_TD))
        inputs = gradient_inputs(head, live, with_entropy=True)
        grad_weight = torch.zeros(head.weight_VD.shape)
        for head_exps in (head_exps_cuda, head_exps_from_logits):
            exps = head.run(head_exps)[0]  # the first call compiles
            torch.cuda.set_sync_debug_mode("error")
            try:
                exps = head.run(head_exps)[0]
                head_gradients_cuda(
                    exps, grad_weight=grad_weight, accumulate=True, want_hidden=True, **inputs
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")


class RefuseToWait(TorchFunctionMode):
    """Raises for what waits for a CUDA device, on any device."""

    WAITS = frozenset(
        {"item", "tolist", "cpu", "numpy", "nonzero", "masked_select", "unique", "bincount", "__bool__"}
        | {"__int__", "__float__", "__index__", "is_nonzero", "equal", "allclose"}
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAITS or func is torch.tensor:
            raise AssertionError(f"{name} waits for the device")
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            tensors = [part for part in index if isinstance(part, Tensor)]
            if any(part.dtype == torch.bool for part in tensors):
                raise AssertionError(f"{name} waits for the device, which counts the mask")
            if name == "__setitem__" and tensors and not isinstance(args[2], Tensor):
                raise AssertionError(f"{name} at indices waits for the device, to copy a number there")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise AssertionError(f"{name} waits for the device, to know its size")
        return func(*args, **(kwargs or {}))


class NoKernels:
    """In place of the module of Triton kernels: their launches do nothing."""

    INTERPRETED = False

    def describe(self, matrix: Tensor, block: list[int]) -> SimpleNamespace:
        return SimpleNamespace(base=matrix, block_shape=block)

    def __getattr__(self, name: str) -> dict[Any, Callable[..., None]]:
        return defaultdict(lambda: lambda *arguments, **options: None)


@each_variant
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_nothing_around_the_kernels_waits_for_a_device(
    dtype: torch.dtype, head_exps: Callable[..., tuple[Tensor, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_kernels", NoKernels)
    head = far_below(dtype)
    inputs = gradient_inputs(head, torch.arange(1, len(head.hidden_TD)), with_entropy=True)
    if dtype == torch.float64:
        inputs = {
            name: x.double() if name in ("row_scale", "alpha", "beta") else x for name, x in inputs.items()
        }
    grad_weight = torch.zeros(head.weight_VD.shape, dtype=inputs["row_scale"].dtype)
    with RefuseToWait():
        for store in (False, True):
            exps = head.run(head_exps, store=store)[0]
        head_gradients_cuda(exps, grad_weight=grad_weight, accumulate=True, want_hidden=True, **inputs)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    rows, vocabulary, tail = 20_000, 151_936, 200
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free device memory")
    with torch.device("cuda"):
        generator = torch.Generator(device="cuda").manual_seed(2)
        hidden_TD = torch.randn(rows, 64, generator=generator).bfloat16() / 4
        weight_VD = torch.randn(vocabulary, 64, generator=generator).bfloat16()
        targets_T = torch.randint(vocabulary, (rows,), generator=generator)
        head = Head(
            hidden_TD=hidden_TD, weight_VD=weight_VD, pair_rows_U=torch.arange(rows), pair_targets_U=targets_T
        )
        last = Head(
            hidden_TD=hidden_TD[-tail:],
            weight_VD=weight_VD,
            pair_rows_U=torch.arange(tail),
            pair_targets_U=targets_T[-tail:],
        )
        results, expected = head.run(head_exps_cuda), last.run(head_exps_cuda)
        for result, in_last in zip(results, expected, strict=True):
            assert torch.equal(result[-tail:], in_last)
        scale, live = torch.ones(tail), torch.arange(rows - tail, rows)
        gradients = [
            head_gradients_cuda(
                exps, hidden_TD[-tail:], weight_VD, rows_L, scale, None, None, None, False, True
            )
            for exps, rows_L in ((results[0], live), (expected[0], torch.arange(tail)))
        ]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@each_case
def test_float64(device_type: str, case: Callable[[torch.dtype], Head]) -> None:
    with torch.device(device_type):
        head = case(torch.float64)
        exps, offset, others, weighted, z_U = head.run(head_exps_cuda)
        z_TV, pairs = head.exact_logits(), (head.pair_rows_U, head.pair_targets_U)
        y_TV = z_TV * LOG2E - offset[:, None]
        e_TV = y_TV.exp2()
        e_TV[pairs] = 0
        torch.testing.assert_close(exps, e_TV, rtol=1e-12, atol=0)
        torch.testing.assert_close(others, e_TV.sum(dim=1), rtol=1e-12, atol=1e-300)
        torch.testing.assert_close(weighted, (e_TV * y_TV).sum(dim=1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(z_U, z_TV[pairs], rtol=1e-14, atol=0)
        error = logprob(head, offset, others, z_U) - head.exact_logprob()
        assert error.abs().max() <= 1e-13
        live = torch.arange(len(offset))
        grad_weight = torch.full_like(head.weight_VD, math.nan)
        row_scale = 1 / others.clamp_min(1)
        grad_hidden = head_gradients_cuda(
            exps, head.hidden_TD, head.weight_VD, live, row_scale, None, None, grad_weight, False, True
        )
        assert grad_hidden.dtype == grad_weight.dtype == torch.float64
        scaled_TV = e_TV * row_scale[:, None]
        torch.testing.assert_close(grad_hidden, scaled_TV @ head.weight_VD, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_weight, scaled_TV.T @ head.hidden_TD, rtol=1e-12, atol=1e-12)


def test_no_rows() -> None:
    hidden, weight, no_pairs = torch.zeros(0, 4), torch.ones(6, 4), torch.zeros(0, dtype=torch.int64)
    exps, *vectors = head_exps_cuda(hidden, weight, no_pairs, no_pairs, 1.0, True)
    assert exps.shape == (0, 6)
    assert [vector.shape for vector in vectors] == [(0,)] * 4
    grad_weight = torch.ones(6, 4)
    grad_hidden = head_gradients_cuda(
        exps, hidden, weight, no_pairs, vectors[0], None, None, grad_weight, True, True
    )
    assert grad_hidden.shape == (0, 4)
    assert torch.equal(grad_weight, torch.ones(6, 4))
    head_gradients_cuda(exps, hidden, weight, no_pairs, vectors[0], None, None, grad_weight, False, False)
    assert torch.equal(grad_weight, torch.zeros(6, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 5)}, r"hidden \(2, 5\), weight \(7, 4\); give hidden \[T, D\]"),
        (
            {"hidden": torch.zeros(2, 4).half(), "weight": torch.zeros(7, 4).half()},
            "got float16, whose exponents",
        ),
        ({"hidden": torch.zeros(2, 4).bfloat16()}, r"got hidden torch\.bfloat16, weight torch\.float32"),
        ({"pair_rows": torch.tensor([0])}, r"give both \[U\], and each row at least once"),
        ({"pair_targets": torch.tensor([0.0, 1.0])}, "pair_targets torch.float32 .* give int64"),
        ({"temperature": 0.0}, "got temperature 0.0; it must be finite and above 0"),
    ],
)
def test_head_exps_refuses(changes: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(7, 4),
        "pair_rows": torch.tensor([0, 1]),
        "pair_targets": torch.tensor([6, 0]),
        "temperature": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        head_exps_cuda(**(inputs | changes), store=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"exps": torch.zeros(0)},
            r"got exps torch.float32 \(0,\) .* give the exponentials of head_exps, stored",
        ),
        ({"live": torch.tensor([0])}, r"got hidden \(2, 4\) and 1 live rows"),
        ({"alpha": torch.zeros(2)}, "got one of alpha and beta"),
        (
            {"row_scale": torch.zeros(2).double()},
            r"got row_scale torch.float64 \(2,\); give torch.float32 \[2\]",
        ),
        ({"grad_weight": torch.zeros(7, 4).bfloat16()}, "got grad_weight torch.bfloat16"),
    ],
)
def test_head_gradients_refuses(changes: dict[str, Any], message: str) -> None:
    inputs: dict[str, Any] = {
        "exps": torch.zeros(3, 7),
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(7, 4),
        "live": torch.tensor([0, 2]),
        "row_scale": torch.zeros(2),
        "alpha": None,
        "beta": None,
        "grad_weight": None,
    }
    with pytest.raises(ValueError, match=message):
        head_gradients_cuda(**(inputs | changes), accumulate=True, want_hidden=True)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_without_triton_the_package_imports_and_a_call_says_what_to_install() -> None:
    result = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from omnigrpo_kernels.vocabulary_head_cuda import head_exps_cuda\n"
        "row = torch.tensor([0]); head_exps_cuda(torch.ones(1, 4), torch.ones(5, 4), row, row, 1.0, True)"
    )
    assert result.returncode == 1
    assert "ImportError: the vocabulary head on CUDA needs triton >= 3.6" in result.stderr


def test_importing_the_launchers_imports_no_triton() -> None:
    result = run_python("import sys, omnigrpo_kernels.vocabulary_head_cuda; print('triton' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.parametrize("kernel", [head_exps_cuda, head_gradients_cuda], ids=["head_exps", "head_gradients"])
def test_the_ops_run_these_kernels_on_cuda(kernel: Callable[..., Any]) -> None:
    importlib.import_module("omnigrpo_kernels.vocabulary_head")
    name = f"omnigrpo::{kernel.__name__.removesuffix('_cuda')}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    (schema,) = torch._C._jit_get_schemas_for_operator(name)
    assert [argument.name for argument in schema.arguments] == list(inspect.signature(kernel).parameters)


@compiled
@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton 3.6 does not run with numpy 2.4 or later")
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-k",
            "interpreted",
            str(Path(__file__)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout)
    assert "skipped" not in result.stdout


VARYING_LENGTHS = {"num_rows", "num_live", "num_pairs", "num_tile_rows", "group"}
"""Differ from call to call: a kernel compiled for one of their values would be compiled again and again."""


def compile_all(
    ahead_of_time: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    capability: int,
    dtype: torch.dtype,
    tiling: Tiling,
) -> dict[str, list[Any]]:
    """Every kernel variant that the ops launch, by name."""
    ahead = ahead_of_time.AheadOfTime(monkeypatch, cache, capability, VARYING_LENGTHS)
    monkeypatch.setattr(module, "WIDE", tiling)
    rows, vocabulary, width = 256, 1008, 128
    hidden, weight = torch.zeros(rows, width, dtype=dtype), torch.zeros(vocabulary, width, dtype=dtype)
    pairs = torch.arange(rows)
    for head_exps in (head_exps_cuda, head_exps_from_logits):
        for store in (True, False):
            head_exps(hidden, weight, pairs, pairs, 1.0, store)
    exps, stat_dtype = torch.zeros(rows, vocabulary, dtype=dtype), torch.promote_types(dtype, torch.float32)
    for live, factor in ((pairs[1:], None), (pairs[1:], 1.0), (pairs, 1.0)):
        vector = torch.ones(len(live), dtype=stat_dtype)
        factors = vector if factor else None
        head_gradients_cuda(exps, hidden[live], weight, live, vector, factors, factors, None, False, False)
    return ahead.binaries


@compiled
@pytest.mark.slow
@each_dtype
def test_every_kernel_compiles_for_sm_90(
    ahead_of_time: ModuleType, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = compile_all(ahead_of_time, monkeypatch, tmp_path, 90, dtype, WIDE)
    launches = {name: len(built) for name, built in binaries.items()}
    assert launches == {
        "target_offsets": 2,
        "exp_tiles": 2,
        "merge_partials": 2,
        "crowded_rows": 2,
        "sum_rows": 2,
        "exp_rows": 1,
        "gather_rows": 3,
    }
    for built in binaries.values():
        for binary in built:
            assert ".target sm_90" in binary.asm["ptx"]
            assert len(binary.asm["cubin"]) > 1000
    for binary in binaries["exp_tiles"]:
        assert binary.metadata.shared <= 227 * 1024
        assert "cp.async.bulk.tensor.2d" in binary.asm["ptx"]
        assert ("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16" in binary.asm["ptx"]) == (
            dtype == torch.bfloat16
        )
        assert "tf32" not in binary.asm["ptx"]
        _, spilled_bytes = ahead_of_time.used_resources(binary, tmp_path)
        assert spilled_bytes <= 64
    with_exps, without = binaries["sum_rows"]
    assert with_exps.asm["ptx"] == without.asm["ptx"]  # and so their sums have the same bits
    for binary in binaries["gather_rows"]:
        assert re.search(r"ld\.global\S*\.v[248]", binary.asm["ptx"])


@compiled
def test_float64_rows_compile_for_sm_90(
    ahead_of_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binaries = compile_all(ahead_of_time, monkeypatch, tmp_path, 90, torch.float64, WIDE)
    assert {name: len(built) for name, built in binaries.items()} == {"gather_rows": 3}


@compiled
@pytest.mark.slow
def test_the_narrow_tiling_compiles_for_sm_80(
    ahead_of_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for binary in compile_all(ahead_of_time, monkeypatch, tmp_path, 80, torch.bfloat16, NARROW)["exp_tiles"]:
        assert binary.metadata.shared <= 99 * 1024
        assert "mma.sync.aligned" in binary.asm["ptx"]
