"""Compiles Triton kernels for a GPU that is not there, from the launches that a call would make."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

SHORT = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
    "float64": "fp64",
    "bool": "i1",
    "int32": "i32",
    "int64": "i64",
}


class AheadOfTime:
    """Takes the place of every launch: compiles the kernel for its arguments, and runs nothing."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, cache: Path, capability: int, varying: set[str]
    ) -> None:
        """``varying``: arguments that differ from call to call, which no kernel may be specialised on."""
        jit = pytest.importorskip("triton.runtime.jit")
        self.capability, self.varying = capability, varying
        self.binaries: dict[str, list[Any]] = {}
        """What was compiled, by the kernel's name, in the order of the launches."""
        monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
        monkeypatch.setattr(
            jit.JITFunction, "run", lambda kernel, *args, **kwargs: self._launch(kernel, *args, **kwargs)
        )

    def _launch(self, kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        assert len(grid) == 1
        assert all(param.do_not_specialize for param in kernel.params if param.name in self.varying)
        named = {name: kwargs.pop(name) for name in kernel.arg_names if name in kwargs}
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | named
        assert list(arguments) == kernel.arg_names
        signature = {
            param.name: type_of(arguments[param.name], fixed=param.is_constexpr) for param in kernel.params
        }
        source = ASTSource(
            kernel,
            signature=signature,
            constexprs={name: arguments[name] for name, kind in signature.items() if kind == "constexpr"},
            attrs={
                (index,): [["tt.divisibility", 16]]
                for index, param in enumerate(kernel.params)
                if is_aligned(param, arguments[param.name], signature[param.name])
            },
        )
        binary = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=kwargs)
        self.binaries.setdefault(kernel.__name__, []).append(binary)


def is_aligned(param: Any, argument: Any, kind: str) -> bool:
    """What the launch of a large problem finds: pointers, and the lengths that it specialises on."""
    if kind.startswith("*"):
        return not param.do_not_specialize_on_alignment
    return kind == "i32" and argument % 16 == 0 and not param.do_not_specialize


def type_of(argument: Any, *, fixed: bool) -> str:
    """The argument's type, as signatures spell it."""
    if fixed:
        return "constexpr"
    if isinstance(argument, Tensor):
        return "*" + SHORT[str(argument.dtype).removeprefix("torch.")]
    if isinstance(argument, int):
        return "i32"
    if isinstance(argument, float):
        return "fp32"
    return f"tensordesc<{SHORT[str(argument.base.dtype).removeprefix('torch.')]}{argument.block_shape}>"


def used_resources(binary: Any, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which are nothing but registers that did not fit."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    listing = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", listing)
    return int(registers), int(stack)
