"""The launches around the head's products on CUDA: on a device, interpreted on the CPU, and compiled ahead of time."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels import vocabulary_rows_cuda as module
from omnigrpo_kernels.vocabulary_head import (
    HeadPass,
    RowGrads,
    StatisticGrads,
    TokenPairs,
    head_pass,
    pairs_to,
    row_grads,
    token_pairs,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves no kernel to compile")
each_dtype = pytest.mark.parametrize(
    ("dtype", "stat_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=["bfloat16", "float32", "float64"],
)
each_layout = pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted")]
    if INTERPRETED
    else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run; the interpreter is slow, so there several programs are few rows."""
    if INTERPRETED:
        monkeypatch.setattr(module, "ROWS", 8)
        monkeypatch.setattr(module, "COLUMNS", 16)
    return torch.device(request.param)


def some_pairs(shared: bool) -> TokenPairs:
    """19 rows; shared: some predict up to four tokens, one token twice."""
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor([4 if row % 5 == 0 else 1 for row in range(19)])
    if not shared:
        return token_pairs(torch.randint(41, (19,), generator=generator), None)
    rows_C = torch.arange(19).repeat_interleave(counts)
    targets_C = torch.randint(41, rows_C.shape, generator=generator)
    targets_C[1] = targets_C[0]
    return token_pairs(targets_C, rows_C)


def peaked_pass(pairs: TokenPairs, temperature: float = 1.0) -> HeadPass:
    """Statistics by the algebra of the CPU, of rows from flat to a target of probability 1 - 1e-30."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(19, 6, dtype=torch.float64, generator=generator)
    hidden *= torch.linspace(0.1, 12, 19, dtype=torch.float64)[:, None]
    weight = torch.randn(41, 6, dtype=torch.float64, generator=generator)
    weight[int(pairs.targets_U[-1])] = 4 * hidden[18] / hidden[18].norm()
    return head_pass(hidden, weight, pairs, temperature, keep=True)


def head_results(pairs: TokenPairs) -> tuple[Tensor, ...]:
    """Offset, others, weighted and the pairs' logits in float32, a target of nearly no probability among them."""
    generator = torch.Generator().manual_seed(1)
    offset_T = torch.randint(-40, 40, (19,), generator=generator).float()
    others_T = torch.rand(19, generator=generator) * torch.logspace(-30, 10, 19)
    weighted_T = others_T * torch.randn(19, generator=generator)
    logits_U = (offset_T[pairs.rows_U] + torch.randn(len(pairs.rows_U), generator=generator)) * math.log(2)
    logits_U[3], logits_U[4] = -200.0, math.nan
    return offset_T, others_T, weighted_T, logits_U


def algebra(head_exps: tuple[Tensor, ...], pairs: TokenPairs) -> tuple[Tensor, ...]:
    """Their statistics in float64, by the formulae of `vocabulary_head`."""
    offset_T, others_T, weighted_T, logits_U = (value.double() for value in head_exps)
    y_U = logits_U / math.log(2) - offset_T[pairs.rows_U]
    e_U = y_U.exp2()
    others_U = (others_T + pairs.sum_by_row(e_U))[pairs.rows_U] - e_U
    total_T = others_T + pairs.sum_by_row(e_U)
    logprob_U = torch.where(
        e_U < others_U,
        math.log(2) * y_U - total_T.log()[pairs.rows_U],
        -(others_T[pairs.rows_U] + (pairs.sum_by_row(e_U)[pairs.rows_U] - e_U)).div(e_U).log1p(),
    )
    mean_T = (weighted_T + pairs.sum_by_row(e_U * y_U)) / total_T
    return (
        logprob_U,
        total_T.log() - math.log(2) * mean_T,
        math.log(2) * offset_T + total_T.log(),
        total_T,
    )


def statistics(results: tuple[Tensor, ...], pairs: TokenPairs, device: torch.device) -> list[Tensor]:
    offset_T, others_T, weighted_T, logits_U = (value.to(device) for value in results)
    starts = pairs.starts.to(device)
    return [value.cpu() for value in module.row_statistics(offset_T, others_T, weighted_T, logits_U, starts)]


@each_layout
def test_statistics(device: torch.device, shared: bool) -> None:
    pairs = some_pairs(shared)
    results = head_results(pairs)
    found = statistics(results, pairs, device)
    assert found[3][int(pairs.rows_U[4])].isnan()
    for mine, exact in zip(found, algebra(results, pairs), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-13, atol=1e-13, equal_nan=True)


def test_what_is_left_of_a_sure_target_is_not_rounded_away(device: torch.device) -> None:
    pairs = some_pairs(shared=False)
    offset_T, others_T, weighted_T, _ = head_results(pairs)
    results = offset_T, torch.full_like(others_T, 1e-25), weighted_T, offset_T * math.log(2)
    logprob_U = statistics(results, pairs, device)[0]
    torch.testing.assert_close(logprob_U, algebra(results, pairs)[0], rtol=1e-6, atol=0)
    assert (logprob_U < -1e-26).all()


GRADS = {"logprob": (1, 0, 0), "entropy": (1, 1, 0), "lse": (1, 0, 1), "all": (1, 1, 1)}


@each_layout
@pytest.mark.parametrize("with_grads", GRADS.values(), ids=GRADS.keys())
def test_gradients_of_rows(device: torch.device, shared: bool, with_grads: tuple[int, int, int]) -> None:
    pairs, temperature = some_pairs(shared), 0.7
    passed = peaked_pass(pairs, temperature)
    generator = torch.Generator().manual_seed(2)
    logprob_U = torch.randn(len(pairs.rows_U), dtype=torch.float64, generator=generator)
    logprob_U[pairs.rows_U == 6] = 0
    entropy_T, lse_T = torch.randn(2, 19, dtype=torch.float64, generator=generator)
    entropy_T[6] = lse_T[6] = 0
    grads = StatisticGrads(
        logprob_U=logprob_U,
        entropy_T=entropy_T if with_grads[1] else None,
        lse_T=lse_T if with_grads[2] else None,
    )
    expected = row_grads(passed, pairs, grads, temperature)

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    scale_T, alpha_T, beta_T, target_U, live = module.row_gradients(
        passed.logprob_U.to(device),
        passed.entropy_T.to(device),
        passed.total_T.to(device),
        pairs.starts.to(device),
        logprob_U.to(device),
        move(grads.entropy_T),
        move(grads.lse_T),
        temperature,
        torch.float64,
    )
    found = RowGrads(scale_T=scale_T, alpha_T=alpha_T, beta_T=beta_T, target_U=target_U, live=live)
    assert int(found.live.sum()) == int(expected.live) == 18
    for name in ("scale_T", "alpha_T", "beta_T", "target_U"):
        mine, exact = getattr(found, name), getattr(expected, name)
        assert (mine is None) == (exact is None)
        if exact is not None:
            torch.testing.assert_close(mine.cpu(), exact, rtol=1e-12, atol=1e-15)


@each_layout
@each_dtype
def test_targets_shares(
    device: torch.device, shared: bool, dtype: torch.dtype, stat_dtype: torch.dtype
) -> None:
    pairs = some_pairs(shared)
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(19, 37, generator=generator).to(dtype)
    weight = torch.randn(41, 37, generator=generator).to(dtype)
    coefficients = torch.randn(len(pairs.rows_U), generator=generator, dtype=stat_dtype)
    grad_TD, grad_VD = (torch.randn(rows, 37, generator=generator, dtype=stat_dtype) for rows in (19, 41))
    columns = coefficients.double()[:, None] * weight[pairs.targets_U].double()
    rows = coefficients.double()[:, None] * hidden[pairs.rows_U].double()
    exact_TD = grad_TD.to(torch.float64, copy=True).index_add_(0, pairs.rows_U, columns)
    exact_VD = grad_VD.to(torch.float64, copy=True).index_add_(0, pairs.targets_U, rows)
    there = pairs_to(pairs, device)
    grad_TD, grad_VD, coefficients = (value.to(device) for value in (grad_TD, grad_VD, coefficients))
    module.add_target_columns_(grad_TD, weight.to(device), coefficients, there.starts, there.targets_U)
    module.add_target_rows_(grad_VD, hidden.to(device), coefficients, there.rows_U, there.targets_U)
    tolerance = 1e-13 if stat_dtype == torch.float64 else 2e-6
    torch.testing.assert_close(grad_TD.cpu().double(), exact_TD, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad_VD.cpu().double(), exact_VD, rtol=tolerance, atol=tolerance)


def test_targets_outside_the_vocabulary_write_nowhere(device: torch.device) -> None:
    """Their logit is NaN, and so is what the loss makes of them: the sums leave them out, and memory stays whole."""
    targets = torch.tensor([-1, 5, 2], device=device)
    grad_VD = torch.zeros(4, 6, device=device)
    rows = torch.arange(3, device=device)
    module.add_target_rows_(
        grad_VD[:3], torch.ones(3, 6, device=device), torch.ones(3, device=device), rows, targets
    )
    assert grad_VD.cpu().count_nonzero(dim=1).tolist() == [0, 0, 6, 0]


@pytest.mark.parametrize("numel", [1, 20_001])
def test_scaling_in_place(device: torch.device, numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(6)).to(device)
    expected = values * 0.3
    module.scale_in_place_(values, torch.tensor(0.3, device=device))
    assert torch.equal(values, expected)
    module.scale_in_place_(values, torch.tensor(1.0, device=device))
    assert torch.equal(values, expected)
    module.scale_in_place_(values, torch.tensor(math.nan, device=device))
    assert values.isnan().all()


def test_no_rows(device: torch.device) -> None:
    empty, starts = torch.zeros(0, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    assert [len(value) for value in module.row_statistics(empty, empty, empty, empty, starts)] == [0] * 4
    none = empty.double()
    scale_T, *_, live = module.row_gradients(none, none, none, starts, none, none, none, 1.0, torch.float32)
    assert (len(scale_T), live.tolist()) == (0, [])


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


@compiled
@pytest.mark.slow
def test_every_kernel_compiles_for_sm_90(
    ahead_of_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = ahead_of_time.AheadOfTime(monkeypatch, tmp_path, 90, {"num_rows", "num_pairs"})
    rows, width, vocabulary = 256, 896, 1008
    index, starts = torch.arange(rows), torch.arange(rows + 1)
    vector, wide = torch.zeros(rows), torch.zeros(rows, dtype=torch.float64)
    module.row_statistics(vector, vector, vector, vector, starts)
    for entropy, lse in ((None, None), (wide, None), (wide, wide)):
        module.row_gradients(wide, wide, wide, starts, wide, entropy, lse, 0.7, torch.float32)
    hidden, weight = torch.zeros(rows, width).bfloat16(), torch.zeros(vocabulary, width).bfloat16()
    module.add_target_columns_(torch.zeros(rows, width), weight, vector, starts, index)
    module.add_target_rows_(torch.zeros(vocabulary, width), hidden, vector, index, index)
    module.scale_in_place_(torch.zeros(vocabulary, width), torch.ones(()))
    assert {name: len(built) for name, built in ahead.binaries.items()} == {
        "row_statistics": 1,
        "row_gradients": 3,
        "add_target_columns": 1,
        "add_target_rows": 1,
        "scale_in_place": 1,
    }
    for built in ahead.binaries.values():
        for binary in built:
            _, spilled_bytes = ahead_of_time.used_resources(binary, tmp_path)
            assert spilled_bytes == 0
    (scaling,) = ahead.binaries["scale_in_place"]
    assert re.search(r"ld\.global\S*\.v4", scaling.asm["ptx"])
