"""The objective's kernel: on a device, interpreted on the CPU, and compiled ahead of time."""

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels import grpo_objective_cuda as module
from omnigrpo_kernels.grpo_objective import (
    KlEstimator,
    LossForm,
    ObjectiveConfig,
    TokenBatch,
    TokenTerms,
    switches,
    token_terms,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMS = [loss for loss in get_args(LossForm) if loss != "gspo"]
NUM_TOKENS = 300
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves no kernel to compile")


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted")]
    if INTERPRETED
    else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def random_batch(**left_out: None) -> tuple[Tensor, Tensor, TokenBatch]:
    """Log-probs, entropies and constants, float64 of float32 values; far ratios, and masked tokens that hold poison."""
    generator = torch.Generator().manual_seed(11)
    drift, ref, roll, adv, entropy = torch.randn(5, NUM_TOKENS, generator=generator).double()
    drift[:20] *= 30
    ref[:40] *= 1e-3
    adv[100:120] = 0
    logprob_C = (torch.rand(NUM_TOKENS, generator=generator) * -4).double()
    weight_C = torch.full((NUM_TOKENS,), 0.25, dtype=torch.float64)
    weight_C[200:220] = 0
    named = {
        "advantage_C": adv,
        "old_C": (logprob_C + 0.3 * drift).float().double(),
        "reference_C": (logprob_C + ref).float().double(),
        "rollout_C": (logprob_C + 0.2 * roll).float().double(),
    }
    for value_C in (logprob_C, entropy, *named.values()):
        value_C[200:210], value_C[210:220] = math.nan, -math.inf
    constants: dict[str, Any] = named | left_out
    return (
        logprob_C,
        entropy,
        TokenBatch(weight_C=weight_C, sequence_C=torch.zeros(NUM_TOKENS).long(), **constants),
    )


def kernel_terms(
    logprob_C: Tensor, entropy_C: Tensor, batch: TokenBatch, config: ObjectiveConfig, device: torch.device
) -> module.Terms:
    def move(value_C: Tensor | None) -> Tensor | None:
        return None if value_C is None else value_C.to(device)

    return module.objective_terms(
        logprob_C,
        entropy_C,
        batch.weight_C.to(device),
        batch.advantage_C.to(device),
        move(batch.old_C),
        move(batch.reference_C),
        move(batch.rollout_C),
        switches(batch, config),
    )


def check(config: ObjectiveConfig, device: torch.device, **left_out: None) -> None:
    """Values, slopes and parts against the formulae in float64."""
    logprob_C, entropy_C, batch = random_batch(**left_out)
    exact_leaves = [logprob_C.requires_grad_(), entropy_C.requires_grad_()]
    exact: TokenTerms = token_terms(logprob_C, entropy_C, batch, config)
    upstream_C = torch.linspace(0.5, 2, NUM_TOKENS, dtype=torch.float64)
    exact_grads = torch.autograd.grad(exact.loss_C, exact_leaves, upstream_C, allow_unused=True)
    leaves = [x.detach().float().to(device).requires_grad_() for x in exact_leaves]
    found = kernel_terms(leaves[0], leaves[1], batch, config, device)
    grads = torch.autograd.grad(found.loss_C, leaves, upstream_C.float().to(device), allow_unused=True)
    for mine, truth in zip(
        (found.loss_C, found.kl_C, found.ratio_C, found.importance_C, *grads),
        (exact.loss_C, exact.kl_C, exact.ratio_C, exact.importance_C, *exact_grads),
        strict=True,
    ):
        assert (mine is None) == (truth is None)
        if mine is not None and truth is not None:
            torch.testing.assert_close(mine.cpu().double(), truth.detach(), rtol=3e-6, atol=2e-6)
    assert torch.equal(found.clipped_C.cpu(), exact.clipped_C)
    assert not any(x is not None and x.requires_grad for x in (found.kl_C, found.ratio_C, found.importance_C))


@pytest.mark.parametrize("with_old", [True, False], ids=["old", "on policy"])
@pytest.mark.parametrize("loss", FORMS)
def test_every_form(device: torch.device, loss: LossForm, with_old: bool) -> None:
    left_out: dict[str, None] = {} if with_old else {"old_C": None}
    check(ObjectiveConfig(loss=loss, clip_low=0.2, clip_high=0.3, kl_coefficient=0.04), device, **left_out)


@pytest.mark.parametrize("estimator", get_args(KlEstimator))
def test_every_estimator(device: torch.device, estimator: KlEstimator) -> None:
    check(ObjectiveConfig(kl_coefficient=0.5, kl_estimator=estimator), device)
    check(ObjectiveConfig(kl_coefficient=0.0, kl_estimator=estimator), device)


@pytest.mark.parametrize(
    "given",
    [
        {"dual_clip": 3.0},
        {"entropy_coefficient": 0.01},
        {"max_importance_weight": 1.1},
        {"max_importance_weight": 1.1, "importance_correction": "masked", "min_importance_weight": 0.9},
        {"loss": "cispo", "max_importance_weight": 1.1, "entropy_coefficient": -0.02},
        {"loss": "sapo", "max_importance_weight": 1.1, "sapo_temperature_negative": 1.5},
    ],
    ids=["dual clip", "entropy", "truncated", "masked", "cispo", "sapo"],
)
def test_every_switch(device: torch.device, given: dict[str, Any]) -> None:
    check(ObjectiveConfig(**given), device)


def test_without_a_reference(device: torch.device) -> None:
    check(ObjectiveConfig(kl_coefficient=0.0), device, reference_C=None, rollout_C=None)


def test_a_tie_at_the_edge_keeps_the_gradient(device: torch.device) -> None:
    """0.75 and 1.25 are floats, and the exponentials of their rounded logarithms round to them."""
    old_C = torch.zeros(4)
    logprob_C = torch.tensor([1.25, 1.25, 0.75, 0.75]).log().to(device).requires_grad_()
    advantage_C = torch.tensor([1.0, -1.0, 1.0, -1.0])
    batch = TokenBatch(
        advantage_C=advantage_C,
        weight_C=torch.ones(4),
        sequence_C=torch.zeros(4).long(),
        old_C=old_C,
    )
    config = ObjectiveConfig(clip_low=0.25, clip_high=0.25, kl_coefficient=0.0)
    terms = kernel_terms(logprob_C, torch.zeros(4, device=device), batch, config, device)
    (slope_C,) = torch.autograd.grad(terms.loss_C.sum(), logprob_C)
    assert slope_C.tolist() == [-1.25, 1.25, -0.75, 0.75]
    assert terms.clipped_C.tolist() == [False] * 4


def test_nan_is_not_hidden(device: torch.device) -> None:
    logprob_C, entropy_C, batch = random_batch()
    batch = replace(batch, weight_C=torch.ones_like(batch.weight_C))
    terms = kernel_terms(
        logprob_C.float().to(device), entropy_C.float().to(device), batch, ObjectiveConfig(), device
    )
    assert terms.loss_C[200:210].isnan().all()
    assert not terms.loss_C[:200].isnan().any()


def test_no_tokens(device: torch.device) -> None:
    logprob_C, _, batch = random_batch()
    none = torch.zeros(0, dtype=torch.int64)
    leaf = logprob_C[none].float().to(device).requires_grad_()
    terms = kernel_terms(leaf, leaf.detach(), batch.select(none), ObjectiveConfig(), device)
    assert len(terms.loss_C) == len(terms.clipped_C) == 0
    assert len(torch.autograd.grad(terms.loss_C.sum(), leaf)[0]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("loss", get_args(LossForm))
def test_the_objective_takes_the_kernel_on_cuda(loss: LossForm, monkeypatch: pytest.MonkeyPatch) -> None:
    logprob_C, entropy_C, batch = random_batch()
    there = TokenBatch(
        **{
            name: value.cuda() if value.dtype == torch.int64 else value.float().cuda()
            for name, value in batch._vectors().items()
        }
    )
    config = ObjectiveConfig(loss=loss)
    exact = token_terms(logprob_C, entropy_C, batch, config)
    calls: list[int] = []
    apply = module.objective_terms

    def counting(*arguments: Any) -> module.Terms:
        calls.append(len(arguments))
        return apply(*arguments)

    monkeypatch.setattr(module, "objective_terms", counting)
    terms = token_terms(logprob_C.float().cuda(), entropy_C.float().cuda(), there, config)
    assert len(calls) == int(loss != "gspo")
    torch.testing.assert_close(terms.loss_C.cpu().double(), exact.loss_C, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton 3.6 does not run with numpy 2.4 or later")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__],
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
    ahead = ahead_of_time.AheadOfTime(monkeypatch, tmp_path, 90, {"num_tokens"})
    logprob_C, entropy_C, batch = random_batch()
    leaves = logprob_C.float(), entropy_C.float()
    given: list[dict[str, Any]] = [{"loss": loss} for loss in ("grpo", "cispo", "sapo")]
    given += [{"kl_estimator": estimator} for estimator in ("k1", "k2", "k3_k2grad")]
    given += [{"max_importance_weight": 2.0, "entropy_coefficient": 0.1}]
    for each in given:
        kernel_terms(*leaves, batch, ObjectiveConfig(**each), torch.device("cpu"))
    (built,) = ahead.binaries.values()
    assert len(built) == 7
    for binary in built:
        _, spilled_bytes = ahead_of_time.used_resources(binary, tmp_path)
        assert spilled_bytes == 0
