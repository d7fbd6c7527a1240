"""Prefix rows as JSON, for HTTP."""

import base64
import binascii
import math
from collections.abc import Mapping

import torch
from torch import Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rows_to_text(rows_MD: Tensor) -> dict[str, object]:
    """Bytes in base64, little-endian, with dtype and shape."""
    content = rows_MD.contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(rows_MD.dtype).removeprefix("torch."),
        "shape": list(rows_MD.shape),
        "data": base64.b64encode(content).decode("ascii"),
    }


def rows_from_text(text: Mapping[str, object]) -> Tensor:
    """The rows again; ValueError when the parts do not fit each other."""
    dtype, shape, data = _DTYPES.get(str(text.get("dtype"))), text.get("shape"), text.get("data")
    if dtype is None or not isinstance(shape, list) or not isinstance(data, str):
        raise ValueError(f"rows as text need a dtype of {', '.join(_DTYPES)}, a shape and base64 data")
    try:
        content = bytearray(base64.b64decode(data, validate=True))
    except binascii.Error as error:
        raise ValueError(f"rows as text: their data is not base64: {error}") from error
    if len(content) != math.prod(shape) * dtype.itemsize or not content:
        raise ValueError(f"rows as text: {len(content)} bytes for shape {shape} of {text['dtype']}")
    return torch.frombuffer(content, dtype=dtype).view(shape)
