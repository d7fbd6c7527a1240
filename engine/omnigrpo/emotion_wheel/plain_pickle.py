"""Reads dictionaries, lists and strings out of pickled NumPy object arrays without running what a pickle asks for.

``numpy.load(allow_pickle=True)`` would call whatever functions a file names. This is a stack machine over the opcodes
that a dictionary in a 0-d object array needs; names of functions are compared with a short list and never looked up.
"""

import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omnigrpo.emotion_wheel.tables import WheelError

_HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
"""Names in a pickled object array; here they are only marks."""

_LITERALS = {
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
}
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = {"PROTO", "FRAME"}


@dataclass(slots=True)
class _Call:
    """What a pickle wanted to have made; kept as data."""

    arguments: object
    state: object = None


@dataclass(slots=True)
class _Machine:
    """Stack, marks and memo of the pickle protocol."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self, opcode: str, argument: Any) -> None:
        if opcode in _NOTHING:
            return
        if opcode in _LITERALS:
            self.stack.append(argument)
        elif opcode in _CONSTANTS:
            self.stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[opcode])))
        elif (action := getattr(self, f"_{opcode.lower()}", None)) is not None:
            action(argument)
        else:
            raise ValueError(f"holds the pickle opcode {opcode}, which no table of words needs")

    def _pop(self, count: int) -> list[Any]:
        if not 0 < count <= len(self.stack):
            raise ValueError("is not a well-formed pickle")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._pop_to_mark()))

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _append(self, _: Any) -> None:
        (item,) = self._pop(1)
        self.stack[-1].append(item)

    def _appends(self, _: Any) -> None:
        items = self._pop_to_mark()
        self.stack[-1].extend(items)

    def _setitem(self, _: Any) -> None:
        key, value = self._pop(2)
        self.stack[-1][key] = value

    def _setitems(self, _: Any) -> None:
        items = self._pop_to_mark()
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _long_binput = _binput

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _long_binget = _binget

    def _global(self, name: str) -> None:
        self._name(*name.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        self._name(*self._pop(2))

    def _name(self, module: str, name: str) -> None:
        if (module, name) not in _HARMLESS:
            raise ValueError(f"wants to call {module}.{name}, which no table of words needs")
        self.stack.append((module, name))

    def _reduce(self, _: Any) -> None:
        _, arguments = self._pop(2)
        self.stack.append(_Call(arguments))

    def _build(self, _: Any) -> None:
        (state,) = self._pop(1)
        self.stack[-1].state = state

    def _stop(self, _: Any) -> None:
        pass


def read_object_arrays(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The one object in each named array of an npz file, e.g. a dictionary saved by ``numpy.savez``.

    Raises:
        WheelError: no such file or array, or content that is more than dictionaries, lists, strings and numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {name: _read(archive, path, name) for name in names}
    except FileNotFoundError:
        raise WheelError(f"{path} does not exist: check the path") from None
    except zipfile.BadZipFile as error:
        raise WheelError(f"{path} is no npz file: {error}") from error


def _read(archive: zipfile.ZipFile, path: Path, name: str) -> Any:
    if f"{name}.npy" not in archive.namelist():
        raise WheelError(f"{path} has no array {name!r}; it holds {', '.join(archive.namelist())}")
    with archive.open(f"{name}.npy") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read_header(file)
            if shape != () or not dtype.hasobject:
                raise ValueError(f"is an array of {dtype} with shape {shape}, not one pickled object")
            return _only_object(file.read())
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise WheelError(f"{path}: array {name!r} {error}") from error


def _only_object(pickled: bytes) -> Any:
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(pickled):
        machine.run(opcode.name, argument)
    array = machine.stack[-1]
    # An array's state: version, shape, dtype, whether in Fortran's order, elements.
    if not isinstance(array, _Call) or not isinstance(array.state, tuple) or len(array.state) != 5:
        raise ValueError("does not hold a NumPy array")
    (element,) = array.state[4]
    return element
