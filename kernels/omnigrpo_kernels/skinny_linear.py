"""Products of few rows with a weight matrix, without gradients: what a decode step is made of.

Legend: ``M`` rows, ``K`` width, ``N`` outputs.

    y[m, n] = sum_k x[m, k] w[n, k] + bias[n]

With few rows such a product takes as long as its weights take to arrive from memory. The kernel reads them once, in
order, as ``nn.Linear`` keeps them; bfloat16 is widened in registers and summed in float32 (with AVX512-BF16, pairs at a
time). A row's result does not depend on the rows beside it, to the last bit. One core of an Ice Lake server at 2.8 GHz,
bfloat16: [8, 896] x [4864, 896] in 1.0 ms, where torch takes 3.2 ms; the vocabulary's 151,936 outputs in 30 ms and 105.
"""

import torch
from torch import Tensor
from torch.nn import functional

from omnigrpo_kernels import extension

MOST_ROWS = 64
"""From here on PyTorch's product is as fast, where it is made for the dtype."""
_WIDENING_ISAS = ("avx512", "avx2", "baseline")
"""CPUs without products of bfloat16, where PyTorch's takes four times as long as this one at any number of rows."""
_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def skinny_linear_reference(
    rows_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    """The same in plain PyTorch, widened before the product."""
    dtype = _wide(rows_MK.dtype)
    bias = None if bias_N is None else bias_N.to(dtype)
    product_MN = functional.linear(rows_MK.to(dtype), weight_NK.to(dtype), bias)
    return product_MN if wide else product_MN.to(rows_MK.dtype)


def skinny_linear(
    rows_MK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, wide: bool = False
) -> Tensor:
    """``rows @ weight.T + bias`` on the CPU, not differentiable.

    Args:
        rows_MK: bfloat16, float32 or float64, contiguous.
        weight_NK: of the same dtype, contiguous.
        bias_N: of the same dtype.
        wide: keep the float32 sums of bfloat16 instead of rounding them.
    """
    extension.load()
    return torch.ops.omnigrpo.skinny_linear(rows_MK, weight_NK, bias_N, wide)


def linear(rows_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """``functional.linear``, through the kernel where that is faster and no gradient is recorded."""
    if _is_skinny(rows_TK, weight_NK):
        return skinny_linear(rows_TK, weight_NK, bias_N)
    return functional.linear(rows_TK, weight_NK, bias_N)


def wide_linear(rows_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """``rows @ weight.T`` with the float32 sums of half precision as they are, not differentiable."""
    if _is_skinny(rows_TK, weight_NK):
        return skinny_linear(rows_TK, weight_NK, wide=True)
    if rows_TK.dtype in (torch.float32, torch.float64):
        return rows_TK @ weight_NK.mT
    if rows_TK.is_cuda:
        return torch.mm(rows_TK, weight_NK.mT, out_dtype=torch.float32)
    return skinny_linear_reference(rows_TK, weight_NK, wide=True)


def _is_skinny(rows_TK: Tensor, weight_NK: Tensor) -> bool:
    return (
        rows_TK.device.type == "cpu"
        and rows_TK.dim() == 2
        and rows_TK.dtype == weight_NK.dtype
        and rows_TK.dtype in _DTYPES
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and rows_TK.is_contiguous()
        and weight_NK.is_contiguous()
        and (len(rows_TK) <= MOST_ROWS or _beats_pytorch(rows_TK.dtype))
    )


def _beats_pytorch(dtype: torch.dtype) -> bool:
    """Whether the kernel is faster at any number of rows."""
    return dtype == torch.bfloat16 and extension.load().cpu_isa() in _WIDENING_ISAS


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


extension.load()


@torch.library.register_fake("omnigrpo::skinny_linear")
def _skinny_linear_fake(rows: Tensor, weight: Tensor, bias: Tensor | None, wide: bool) -> Tensor:
    dtype = _wide(rows.dtype) if wide else rows.dtype
    return rows.new_empty(rows.shape[0], weight.shape[0], dtype=dtype)
