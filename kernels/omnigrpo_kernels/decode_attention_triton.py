"""Triton kernels of decode attention; `decode_attention_cuda` launches them. Legend there and in `decode_attention`."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from omnigrpo_kernels.triton_launch import launch

LOG2E = 1.4426950408889634
BLOCK_TOKENS = 32
LEAST_QUERIES = 16
"""Rows that ``tl.dot`` asks for."""


@triton.jit(do_not_specialize=["own_stride"])
def append(
    k,  # [S, K, H]
    v,  # [S, K, H]
    keys,  # [X, K, H, TOKENS]
    values,  # [X, K, TOKENS, H]
    own_blocks,  # int64 [S, own_stride]
    own_lengths,  # int64 [S]
    own_stride,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One row and head: its new key and value go to the last place of its blocks."""
    program = tl.program_id(0).to(tl.int64)
    row, head = program // KV_HEADS, program % KV_HEADS
    at = tl.load(own_lengths + row) - 1
    block = tl.load(own_blocks + row * own_stride + at // TOKENS)
    slot = at % TOKENS
    h = tl.arange(0, PADDED_WIDTH)
    inside = h < WIDTH
    base = (block * KV_HEADS + head) * WIDTH * TOKENS
    key = tl.load(k + program * WIDTH + h, mask=inside, other=0.0)
    tl.store(keys + base + h * TOKENS + slot, key, mask=inside)
    value = tl.load(v + program * WIDTH + h, mask=inside, other=0.0)
    tl.store(values + base + slot * WIDTH + h, value, mask=inside)


@triton.jit(do_not_specialize=["prefix_stride", "own_stride", "scale"])
def attend(
    q,  # [S, K * REPEAT, H]
    keys,  # [X, K, H, TOKENS]
    values,  # [X, K, TOKENS, H]
    groups,  # int64 [S]
    prefix_blocks,  # int64 [B, prefix_stride]
    prefix_lengths,  # int64 [B]
    own_blocks,  # int64 [S, own_stride]
    own_lengths,  # int64 [S]
    sums,  # float32 [S, K, PARTS, REPEAT, H], written, as all below
    offsets,  # float32 [S, K, PARTS, REPEAT]
    totals,  # float32 [S, K, PARTS, REPEAT]
    prefix_stride,
    own_stride,
    scale,  # of scores in base 2
    KV_HEADS: tl.constexpr,
    REPEAT: tl.constexpr,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Part c of a row has blocks c, c + PARTS, ... of its prefix and then of its own: parts are even at any length."""
    program = tl.program_id(0).to(tl.int64)
    part = program % PARTS
    head = program // PARTS % KV_HEADS
    row = program // (PARTS * KV_HEADS)
    j = tl.arange(0, QUERIES)
    h = tl.arange(0, PADDED_WIDTH)
    t = tl.arange(0, TOKENS)
    is_query, inside = j < REPEAT, h < WIDTH
    q_at = (row * KV_HEADS * REPEAT + head * REPEAT + j[:, None]) * WIDTH + h[None, :]
    q_JH = tl.load(q + q_at, mask=is_query[:, None] & inside[None, :], other=0.0)
    if WIDEN:
        q_JH = q_JH.to(tl.float32)
    group = tl.load(groups + row)
    prefix_length = tl.load(prefix_lengths + group)
    own_length = tl.load(own_lengths + row)
    num_prefix = (prefix_length + TOKENS - 1) // TOKENS
    num_blocks = num_prefix + (own_length + TOKENS - 1) // TOKENS
    offset_J = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total_J = tl.zeros((QUERIES,), dtype=tl.float32)
    sums_JH = tl.zeros((QUERIES, PADDED_WIDTH), dtype=tl.float32)
    index = part
    while index < num_blocks:
        own = index - num_prefix
        is_own = own >= 0
        table = tl.where(
            is_own, own_blocks + row * own_stride + own, prefix_blocks + group * prefix_stride + index
        )
        left = tl.where(is_own, own_length - own * TOKENS, prefix_length - index * TOKENS)
        base = (tl.load(table) * KV_HEADS + head) * WIDTH * TOKENS
        seen = t < left
        k_HT = tl.load(
            keys + base + h[:, None] * TOKENS + t[None, :], mask=inside[:, None] & seen[None, :], other=0.0
        )
        v_TH = tl.load(
            values + base + t[:, None] * WIDTH + h[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        if WIDEN:
            k_HT = k_HT.to(tl.float32)
            v_TH = v_TH.to(tl.float32)
        score_JT = tl.dot(q_JH, k_HT, input_precision="ieee") * scale
        score_JT = tl.where(seen[None, :], score_JT, float("-inf"))
        higher_J = tl.maximum(offset_J, tl.max(score_JT, axis=1))
        shrink_J = tl.exp2(offset_J - higher_J)
        weight_JT = tl.exp2(score_JT - higher_J[:, None])
        total_J = total_J * shrink_J + tl.sum(weight_JT, axis=1)
        sums_JH = sums_JH * shrink_J[:, None] + tl.dot(weight_JT.to(v_TH.dtype), v_TH, input_precision="ieee")
        offset_J = higher_J
        index += PARTS
    at = program * REPEAT + j
    tl.store(offsets + at, offset_J, mask=is_query)
    tl.store(totals + at, total_J, mask=is_query)
    tl.store(sums + at[:, None] * WIDTH + h[None, :], sums_JH, mask=is_query[:, None] & inside[None, :])


def append_and_attend(
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
    sums_SKCJH: Tensor,
    offsets_SKCJ: Tensor,
    totals_SKCJ: Tensor,
) -> None:
    """Write the new keys and values, then every part's softmax sums."""
    rows, kv_heads, parts, repeat, width = sums_SKCJH.shape
    padded = max(LEAST_QUERIES, triton.next_power_of_2(width))
    launch(
        append, rows * kv_heads, k, v, keys, values, own_blocks, own_lengths, own_blocks.shape[1],
        KV_HEADS=kv_heads, WIDTH=width, PADDED_WIDTH=padded, TOKENS=BLOCK_TOKENS, num_warps=1,
    )  # fmt: skip
    launch(
        attend, rows * kv_heads * parts, q, keys, values, groups, prefix_blocks, prefix_lengths, own_blocks,
        own_lengths, sums_SKCJH, offsets_SKCJ, totals_SKCJ, prefix_blocks.shape[1], own_blocks.shape[1],
        scale * LOG2E, KV_HEADS=kv_heads, REPEAT=repeat,
        QUERIES=max(LEAST_QUERIES, triton.next_power_of_2(repeat)), WIDTH=width, PADDED_WIDTH=padded,
        TOKENS=BLOCK_TOKENS, PARTS=parts,
        WIDEN=q.dtype == torch.float32 or knobs.runtime.interpret, num_warps=4,
    )  # fmt: skip
