"""Products of few rows: against float64, on every instruction set, and row by row to the last bit."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from omnigrpo_kernels.skinny_linear import (
    MOST_ROWS,
    linear,
    skinny_linear,
    skinny_linear_reference,
    wide_linear,
)

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
SIZES = [(1, 32, 3), (3, 1, 1), (8, 70, 37), (9, 33, 100), (13, 48, 5), (70, 96, 129)]
"""M, K, N: whole and broken tiles of rows, steps of the width and outputs."""


def operands(sizes: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, width, outputs = sizes
    generator = torch.Generator().manual_seed(rows + width)
    shapes = ((rows, width), (outputs, width), (outputs,))
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x, w, b


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_float64_ones(each_isa: str, sizes: tuple[int, int, int], dtype: torch.dtype):
    x, w, b = operands(sizes, dtype)
    exact = functional.linear(x.double(), w.double(), b.double())
    bound = (x.double().abs() @ w.double().abs().T + b.double().abs()) * sizes[1]
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    wide = skinny_linear(x, w, b, wide=True)
    assert wide.dtype == torch.promote_types(dtype, torch.float32)
    assert bool(((wide.double() - exact).abs() <= unit * bound).all())
    rounded = skinny_linear(x, w, b)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, wide.to(dtype))
    torch.testing.assert_close(skinny_linear(x, w, wide=True), skinny_linear_reference(x, w, wide=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(each_isa: str, dtype: torch.dtype):
    x, w, b = operands((21, 100, 65), dtype)
    together = skinny_linear(x, w, b)
    for first, last in ((0, 1), (5, 12), (20, 21)):
        assert torch.equal(skinny_linear(x[first:last], w, b), together[first:last])


def test_nan_and_infinity_pass_through(each_isa: str):
    x, w, _ = operands((9, 64, 7), torch.bfloat16)
    x[2, 5], x[4, 0] = torch.nan, torch.inf
    y = skinny_linear(x, w)
    assert bool(y[2].isnan().all())
    assert not bool(y[4].isfinite().any())
    assert bool(y[[0, 1, 3, 5, 6, 7, 8]].isfinite().all())


def test_wrong_operands_are_refused():
    x, w, b = operands((3, 8, 5), torch.float32)
    for wrong in ((x, w[:, :7].contiguous(), b), (x.double(), w, b), (x, w, b[:4]), (x.T, w, b)):
        with pytest.raises(RuntimeError, match="skinny_linear"):
            torch.ops.omnigrpo.skinny_linear(*wrong, False)
    with pytest.raises(RuntimeError, match="bfloat16"):
        torch.ops.omnigrpo.skinny_linear(x.half(), w.half(), None, False)


@pytest.mark.parametrize("num_rows", [0, 1, MOST_ROWS, MOST_ROWS + 1])
def test_linear_is_functional_linear(num_rows: int):
    x, w, b = operands((num_rows, 40, 12), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, w, b), functional.linear(x, w, b))
        torch.testing.assert_close(wide_linear(x, w), x @ w.T)


def test_linear_records_gradients_where_they_are_wanted():
    rows = operands((3, 8, 5), torch.float64)[0].requires_grad_()
    module = nn.Linear(8, 5).double()
    y = linear(rows, module.weight, module.bias)
    grad_rows, grad_weight = torch.autograd.grad(y.sum(), [rows, module.weight])
    torch.testing.assert_close(grad_rows, module.weight.detach().sum(0).expand(3, -1))
    torch.testing.assert_close(grad_weight, rows.detach().sum(0).expand(5, -1))


def test_half_precision_beyond_the_kernel_is_wide_too():
    x, w, _ = operands((3, 8, 5), torch.float32)
    with torch.no_grad():
        y = wide_linear(x.half(), w.half())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.half().float() @ w.half().float().T)


def test_fake_tensors_have_the_real_shapes():
    with torch._subclasses.FakeTensorMode():
        x, w = torch.empty(3, 8, dtype=torch.bfloat16), torch.empty(5, 8, dtype=torch.bfloat16)
        for wide, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            y = torch.ops.omnigrpo.skinny_linear(x, w, None, wide)
            assert (y.shape, y.dtype) == ((3, 5), dtype)
