"""The layout of a shard: one safetensors file that grows by entries of a few tensors each.

    8 bytes   length of the header, the same for the shard's whole life
    header    JSON: tensor ``<key>.<name>`` per tensor, ``<key>: <crc32>`` in the metadata; spaces fill it up
    data      the entries one after the other, without gaps

An entry's bytes are written before the header names them, so the file is a safetensors file except while an append
is under way.
"""

import errno
import json
import math
import mmap
import os
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FORMAT = "omnigrpo-features-2"
LENGTH_BYTES = 8
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Dtypes of tensors in a shard, by their names in safetensors."""

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MADV_POPULATE_READ = 22
"""Linux 5.14: read the pages now, and fail here where touching them would end the process with SIGBUS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of an entry."""

    name: str
    dtype: str
    """Name in safetensors, a key of ``DTYPES``."""
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What a shard holds under one key."""

    key: str
    crc32: int
    """Checksum of the key, of every tensor's name, dtype and shape, and of the bytes."""
    offset: int
    """Byte of the file at which the first tensor begins."""
    tensors: tuple[StoredTensor, ...]
    """In the order of their bytes, widest dtype first."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def end(self) -> int:
        """The byte after the last one."""
        return self.offset + self.num_bytes


def describe(key: str, tensors: Mapping[str, Tensor], *, offset: int) -> tuple[Entry, list[Tensor]]:
    """Return the entry that these CPU tensors make at ``offset``, and them as bytes in the order to be written."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPE_NAMES:
            known = ", ".join(str(dtype) for dtype in _DTYPE_NAMES)
            raise ValueError(f"{name} is {tensor.dtype}; features are one of {known}")
    stored = tuple(
        StoredTensor(name=name, dtype=_DTYPE_NAMES[tensor.dtype], shape=tuple(tensor.shape))
        for name, tensor in ordered
    )
    parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in ordered]
    checksum = _start_checksum(key, stored)
    for part in parts:
        checksum = zlib.crc32(part.numpy().data, checksum)
    return Entry(key=key, crc32=checksum, offset=offset, tensors=stored), parts


def read_entry(path: Path, entry: Entry) -> dict[str, Tensor] | None:
    """Map an entry, copy it out, and check the copy; None when its bytes are not those that were written.

    The tensors share one allocation of their own: what later becomes of the file does not reach them. Raises
    FileNotFoundError when there is no such shard.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < entry.end:
            return None
        first = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(file.fileno(), entry.end - first, offset=first, access=mmap.ACCESS_READ) as view:
            if not _populate(view):
                return None
            content = torch.empty(entry.num_bytes, dtype=torch.uint8)
            mapped = np.frombuffer(view, np.uint8, entry.num_bytes, entry.offset - first)
            np.copyto(content.numpy(), mapped)
            del mapped  # A map that is looked at cannot be closed.
    if zlib.crc32(content.numpy().data, _start_checksum(entry.key, entry.tensors)) != entry.crc32:
        return None
    sizes = [tensor.num_bytes for tensor in entry.tensors]
    return {
        tensor.name: part.view(DTYPES[tensor.dtype]).reshape(tensor.shape)
        for tensor, part in zip(entry.tensors, content.split(sizes), strict=True)
    }


def header_parts(entry: Entry, data_start: int) -> tuple[str, str]:
    """Return what an entry adds to a header: to the metadata, and to the tensors."""
    tensors, begin = {}, entry.offset - data_start
    for tensor in entry.tensors:
        end = begin + tensor.num_bytes
        tensors[f"{entry.key}.{tensor.name}"] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [begin, end],
        }
        begin = end
    return f',"{entry.key}":"{entry.crc32:08x}"', "".join(
        f",{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))}" for name, value in tensors.items()
    )


def join_header(parts: Sequence[tuple[str, str]]) -> bytes:
    """Return the header's JSON, without the spaces that fill it up."""
    metadata = "".join(part[0] for part in parts)
    tensors = "".join(part[1] for part in parts)
    return f'{{"__metadata__":{{"format":"{FORMAT}"{metadata}}}{tensors}}}'.encode()


def read_data_start(handle: int) -> int | None:
    """The byte at which the first entry begins; None when the file is too short to have a header."""
    length = os.pread(handle, LENGTH_BYTES, 0)
    if len(length) < LENGTH_BYTES:
        return None
    start = LENGTH_BYTES + struct.unpack("<Q", length)[0]
    return start if LENGTH_BYTES < start <= os.fstat(handle).st_size else None


def read_header(handle: int) -> list[Entry]:
    """The entries that a shard's header names; none when it is damaged. Their bytes are not looked at."""
    start = read_data_start(handle)
    if start is None:
        return []
    try:
        header = json.loads(os.pread(handle, start - LENGTH_BYTES, LENGTH_BYTES))
        metadata = header.pop("__metadata__")
        if metadata.pop("format") != FORMAT:
            return []
        return _entries(metadata, header, start)
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # JSON, but not what this module writes.


def parse_tensors(items: Sequence[Sequence[object]]) -> tuple[StoredTensor, ...]:
    """Read ``[name, dtype, shape]`` of each tensor; ValueError or TypeError when they are something else."""
    tensors = []
    for name, dtype, shape in items:
        if not isinstance(name, str) or dtype not in DTYPES or not isinstance(shape, list):
            raise ValueError(f"no tensor: {name!r}, {dtype!r}, {shape!r}")
        if not shape or not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"no shape: {shape!r}")
        tensors.append(StoredTensor(name=name, dtype=str(dtype), shape=tuple(shape)))
    if not tensors:
        raise ValueError("an entry holds at least one tensor")
    return tuple(tensors)


def _entries(checksums: Mapping[str, str], header: Mapping[str, dict], start: int) -> list[Entry]:
    found: dict[str, list[tuple[int, list[object]]]] = {key: [] for key in checksums}
    for full_name, value in header.items():
        key, _, name = full_name.partition(".")
        found[key].append((int(value["data_offsets"][0]), [name, value["dtype"], value["shape"]]))
    return [_entry(key, int(checksums[key], 16), sorted(tensors), start) for key, tensors in found.items()]


def _entry(key: str, crc32: int, tensors: Sequence[tuple[int, Sequence[object]]], start: int) -> Entry:
    stored = parse_tensors([tensor for _, tensor in tensors])
    offset = tensors[0][0]
    if offset < 0:
        raise ValueError(f"no offset: {offset}")
    return Entry(key=key, crc32=crc32, offset=start + offset, tensors=stored)


def _start_checksum(key: str, tensors: Sequence[StoredTensor]) -> int:
    return zlib.crc32("|".join([key, *(f"{t.name} {t.dtype} {t.shape}" for t in tensors)]).encode())


def _populate(view: mmap.mmap) -> bool:
    """Bring the map's pages in; False where the file lost them or the disk cannot read them."""
    if sys.platform != "linux":
        return True
    try:
        view.madvise(_MADV_POPULATE_READ)
    except OSError as error:
        return error.errno == errno.EINVAL  # A kernel that does not know the advice.
    return True
