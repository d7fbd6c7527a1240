"""Loads the compiled extension ``omnigrpo_kernels._C`` and says which kernels are active."""

import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch

from omnigrpo_kernels import liger

HEAD_OPS = ("linear_logprob", "linear_token_loss", "grpo_head")
"""They share the kernels of the vocabulary head."""
DECODE_OPS = ("skinny_linear", "decode_attention", "draw_tokens")
"""What a decode step is made of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelStatus:
    """What runs when an op is called with tensors of one device type."""

    op: str
    device: str
    """``cpu`` or ``cuda``."""
    implementation: str
    """Kernel that runs, with its instruction set; ``none`` when the call raises."""
    active: bool
    """True for an implementation made for this op, false for nothing."""
    reason: str | None
    """Why no kernel of its own is active; None when one is."""


def load() -> ModuleType:
    """Imports ``omnigrpo_kernels._C``, which registers ``torch.ops.omnigrpo``; ImportError says how to build it."""
    try:
        return importlib.import_module("omnigrpo_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "omnigrpo_kernels._C":
            raise
        raise ImportError(
            "omnigrpo_kernels._C is not built: run `make setup`, or `pip install --no-build-isolation -e .` "
            "in the repository with torch, setuptools and ninja installed",
            name=error.name,
        ) from error
    except ImportError as error:
        raise ImportError(
            f"omnigrpo_kernels._C does not load with torch {torch.__version__}: {error}; rebuild it against this "
            "torch with `pip install --no-build-isolation --force-reinstall --no-deps -e .` in the repository",
            name="omnigrpo_kernels._C",
        ) from error


def kernel_status() -> list[KernelStatus]:
    """One entry per op and device type, whether or not this machine has the device; never raises."""
    return [
        *(_compiled_on_cpu(op) for op in (*HEAD_OPS, *DECODE_OPS)),
        *(_on_cuda(op, "Triton, cuBLAS") for op in HEAD_OPS),
        _attention_on_cpu(),
        _yuv_to_rgb_on_cpu(),
        _on_cuda("shared_prefix_attention", "Triton"),
        _on_cuda("decode_attention", "Triton"),
        _on_cuda("decoder_layer", "Triton, cuBLAS"),
        *(_layer_on_cpu(op) for op in liger.FUNCTIONS),
        *(_layer_on_cuda(op) for op in liger.FUNCTIONS),
    ]


def _compiled_on_cpu(op: str) -> KernelStatus:
    try:
        implementation, reason = f"C++ ({load().cpu_isa()})", None
    except ImportError as error:
        implementation, reason = "none", str(error)
    return KernelStatus(
        op=op, device="cpu", implementation=implementation, active=reason is None, reason=reason
    )


def _attention_on_cpu() -> KernelStatus:
    implementation = "PyTorch's flash kernels, in parts"
    try:
        if load().cpu_isa() == "amx_bf16":
            implementation += "; backward in bfloat16: C++ (amx_bf16)"
    except ImportError:
        pass
    return KernelStatus(
        op="shared_prefix_attention", device="cpu", implementation=implementation, active=True, reason=None
    )


def _yuv_to_rgb_on_cpu() -> KernelStatus:
    try:
        isa, reason = "baseline" if load().cpu_isa() == "baseline" else "avx2", None
    except ImportError as error:
        isa, reason = "none", str(error)
    return KernelStatus(
        op="yuv420_to_rgb",
        device="cpu",
        implementation="none" if reason else f"C++ ({isa})",
        active=reason is None,
        reason=reason,
    )


def _on_cuda(op: str, kernels: str) -> KernelStatus:
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed: pip install triton"
    elif not torch.cuda.is_available():
        reason = _no_device()
    implementation = "none" if reason else kernels
    return KernelStatus(
        op=op, device="cuda", implementation=implementation, active=reason is None, reason=reason
    )


def _layer_on_cpu(op: str) -> KernelStatus:
    return KernelStatus(
        op=op,
        device="cpu",
        implementation="PyTorch",
        active=False,
        reason="a few fused PyTorch passes; it has no C++ kernel",
    )


def _layer_on_cuda(op: str) -> KernelStatus:
    """Ops outside the fused decoder layer, for which liger-kernel's Triton kernels run as they are."""
    reason = None
    if not liger.is_installed():
        reason = "liger-kernel is not installed: pip install liger-kernel; plain PyTorch runs"
    elif not torch.cuda.is_available():
        reason = _no_device()
    implementation = "liger-kernel" if liger.is_installed() else "PyTorch"
    return KernelStatus(
        op=op, device="cuda", implementation=implementation, active=reason is None, reason=reason
    )


def _no_device() -> str:
    return f"no CUDA device (torch {torch.__version__})"
