"""The decoder layer's norm, rotation and gate: against their references, on the CPU and on a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels.rms_norm import rms_norm, rms_norm_reference
from omnigrpo_kernels.rope import rotate_heads, rotate_reference
from omnigrpo_kernels.swiglu import swiglu, swiglu_reference

EPS = 1e-6
Op = Callable[..., Tensor]


def angles(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    angle = torch.rand(rows, 1, width // 2, dtype=torch.float64) * 6
    wide = torch.promote_types(dtype, torch.float32)
    return angle.cos().to(device, wide), angle.sin().to(device, wide)


def rotated_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Copies, because rotate_heads may write into its arguments."""
    return torch.cat(rotate_heads(q.clone(), k.clone(), cos, sin), dim=1)


def reference_of_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([rotate_reference(x, cos, sin) for x in (q, k)], dim=1)


def case(op: str, rows: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Op, Op, list[Tensor], list]:
    """Op, reference, differentiable inputs, constants."""
    torch.manual_seed(rows)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape).to(device, dtype).requires_grad_()

    if op == "rms_norm":
        return rms_norm, rms_norm_reference, [random(rows, 24), random(24)], [EPS]
    if op == "rope":
        constants = angles(rows, 8, dtype, device)
        return rotated_both, reference_of_both, [random(rows, 6, 8), random(rows, 2, 8)], [*constants]
    return swiglu, swiglu_reference, [random(rows, 40), random(rows, 40)], []


def passed(op: Op, inputs: list[Tensor], constants: list, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients for a fixed upstream gradient, in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    wide = torch.promote_types(dtype, torch.float32)
    out = op(*leaves, *(x.to(wide) if isinstance(x, Tensor) else x for x in constants))
    upstream = torch.arange(out.numel(), device=out.device).view(out.shape).to(torch.float64).cos().to(dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


OPS = ("rms_norm", "rope", "swiglu")


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("op", OPS)
def test_equals_its_reference_in_float64(op: str, rows: int) -> None:
    ours, reference, inputs, constants = case(op, rows, torch.float64)
    results = (passed(each, inputs, constants, torch.float64) for each in (ours, reference))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_those_of_the_output(op: str) -> None:
    ours, _, inputs, constants = case(op, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: ours(*leaves, *constants), inputs)


def assert_errs_at_most_twice_as_much(op: str, dtype: torch.dtype, device: str = "cpu") -> None:
    ours, reference, inputs, constants = case(op, 257, dtype, device)
    exact = passed(reference, inputs, constants, torch.float64)
    errors = [
        [
            float((got.double() - true).norm() / true.norm())
            for got, true in zip(passed(each, inputs, constants, dtype), exact, strict=True)
        ]
        for each in (ours, reference)
    ]
    for mine, theirs in zip(*errors, strict=True):
        assert mine <= 2 * theirs + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errs_at_most_twice_as_much_as_its_reference(op: str, dtype: torch.dtype) -> None:
    assert_errs_at_most_twice_as_much(op, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_errs_at_most_twice_as_much_on_a_gpu(op: str, dtype: torch.dtype) -> None:
    assert_errs_at_most_twice_as_much(op, dtype, "cuda")


@pytest.mark.parametrize("op", OPS)
def test_takes_strided_inputs_and_gradients(op: str) -> None:
    ours, reference, inputs, constants = case(op, 6, torch.float64)
    strided = [torch.stack([x.detach(), x.detach()], dim=-1)[..., 0].requires_grad_() for x in inputs]
    results = []
    for each, leaves in ((ours, strided), (reference, inputs)):
        out = each(*leaves, *constants)
        results.append(torch.autograd.grad(out, leaves, torch.ones((), dtype=out.dtype).expand(out.shape)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_rms_norm_keeps_the_rows_and_one_number_each() -> None:
    rows = torch.randn(5, 24).bfloat16().requires_grad_()
    weight = torch.ones(24).bfloat16().requires_grad_()
    saved: list[tuple[torch.Size, torch.dtype]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append((tensor.shape, tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rms_norm(rows, weight, EPS)
    assert saved == [
        (rows.shape, torch.bfloat16),
        (weight.shape, torch.bfloat16),
        (torch.Size([5, 1]), torch.float32),
    ]
