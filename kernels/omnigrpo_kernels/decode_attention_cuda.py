"""Decode attention on CUDA: a row's tokens are cut into parts, and the parts' softmax sums meet afterwards.

Legend: `decode_attention`; ``C`` parts of a row, ``J = N / K`` query heads of a key/value head.

A program has one row, key/value head and part. With few rows, parts are what fills the GPU; their number depends on the
size of the tables alone, so that a captured CUDA graph serves rows of any length.
"""

import importlib
from types import ModuleType

import torch
from torch import Tensor

BLOCKS_PER_PART = 8
"""At least, of a part: 256 tokens."""
MOST_PARTS = 32


def decode_attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    groups: Tensor,
    prefix_blocks: Tensor,
    prefix_lengths: Tensor,
    own_blocks: Tensor,
    own_lengths: Tensor,
    scale: float,
) -> Tensor:
    """As `decode_attention`, for bfloat16, float16 and float32; tables are not checked."""
    rows, heads, width = q.shape
    kv_heads = k.shape[1]
    repeat = heads // kv_heads
    num_blocks = prefix_blocks.shape[1] + own_blocks.shape[1]
    parts = max(1, min(MOST_PARTS, num_blocks // BLOCKS_PER_PART))
    sums_SKCJH = q.new_empty(rows, kv_heads, parts, repeat, width, dtype=torch.float32)
    offsets_SKCJ = q.new_empty(rows, kv_heads, parts, repeat, dtype=torch.float32)
    totals_SKCJ = torch.empty_like(offsets_SKCJ)
    kernels = _kernels()
    kernels.append_and_attend(
        q, k, v, keys, values, groups, prefix_blocks, prefix_lengths, own_blocks, own_lengths, scale,
        sums_SKCJH, offsets_SKCJ, totals_SKCJ,
    )  # fmt: skip
    # A part without tokens has offset -infinity, and weighs nothing.
    weights_SKCJ = (offsets_SKCJ - offsets_SKCJ.amax(dim=2, keepdim=True)).exp2_()
    total_SKJ = (totals_SKCJ * weights_SKCJ).sum(dim=2)
    out_SKJH = (sums_SKCJH * weights_SKCJ[..., None]).sum(dim=2) / total_SKJ[..., None]
    return out_SKJH.flatten(1, 2).to(q.dtype)


def _kernels() -> ModuleType:
    """The kernels, and triton with them, at the first use: the package imports without triton."""
    try:
        return importlib.import_module("omnigrpo_kernels.decode_attention_triton")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        raise ImportError(
            "decode_attention on CUDA needs triton, which is not installed: pip install triton"
        ) from error
