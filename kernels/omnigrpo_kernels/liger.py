"""liger-kernel's Triton ops for CUDA, where it is installed; ``kernel_status`` says whether it is."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

FUNCTIONS = {
    "rms_norm": "LigerRMSNormFunction",
    "rope": "LigerRopeFunction",
    "swiglu": "LigerSiLUMulFunction",
}
"""Module of ``liger_kernel.ops`` to the ``autograd.Function`` in it."""


@cache
def is_installed() -> bool:
    """Whether CUDA tensors go to liger-kernel or to plain PyTorch; settled once in a process."""
    return find_spec("liger_kernel") is not None


@cache
def function(op: str) -> Any:
    """The ``autograd.Function`` of an op of ``FUNCTIONS``."""
    return getattr(import_module(f"liger_kernel.ops.{op}"), FUNCTIONS[op])


def takes(tensor: Tensor) -> bool:
    """Whether liger-kernel computes this: its ops run on CUDA and compute in float32."""
    return tensor.is_cuda and tensor.dtype != torch.float64 and is_installed()
