"""Launches of Triton kernels, without the work that triton repeats each time to find the compiled kernel.

``kernel[grid](...)`` binds, specialises and hashes its arguments in Python: about 50 us on a slow host, for a kernel of
a few. It returns what it compiled, which launches in a third of that, but only for arguments like those. So what was
compiled is kept under all that triton specialises on, and a bit more.
"""

from typing import Any

from torch import Tensor

_compiled: dict[tuple[Any, ...], tuple[Any, list[Any]]] = {}
"""Compiled kernels, with the values of their constexpr parameters."""


def launch(kernel: Any, num_programs: int, *args: Any, **named: Any) -> None:
    """Run ``num_programs`` of a jitted kernel on the current device, which must be that of the tensors.

    Args:
        kernel: its constexpr parameters come last.
        num_programs: at least 1.
        args: tensors, tensor descriptors, integers and floats, for its other parameters.
        named: constexpr parameters, all of them, and triton's options.
    """
    key = (id(kernel), *named.items(), *[_kind(arg) for arg in args])
    found = _compiled.get(key)
    if found is not None:
        compiled, constants = found
        compiled[num_programs, 1, 1](*args, *constants)
        return
    compiled = kernel[(num_programs,)](*args, **named)
    if compiled is not None:  # None from the interpreter.
        _compiled[key] = compiled, [named[name] for name in kernel.arg_names[len(args) :]]


def _kind(arg: Any) -> Any:
    """What a kernel may be specialised on: of a tensor type, device and alignment, of an integer 1, 16 and its size."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.get_device(), arg.data_ptr() % 16 == 0
    if isinstance(arg, int):
        return arg == 1, arg % 16 == 0, -(2**31) <= arg < 2**31
    if isinstance(arg, float):
        return float
    return arg.base.dtype, arg.base.get_device(), *arg.block_shape
