"""Ways to attend over one group that shares a prefix: ours, plain PyTorch, and what other engines do.

Legend: ``T`` packed rows, ``N`` query heads, ``K`` key/value heads, ``H`` head width, ``P`` prefix rows, ``R`` rows of
one of the ``G`` completions, ``L = P + R``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from omnigrpo_kernels.shared_prefix_attention import (
    shared_prefix_attention,
    shared_prefix_attention_reference,
)
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


@dataclass(frozen=True, kw_only=True)
class Group:
    """One group of completions of one length, and the heads."""

    prefix: int
    """P."""
    completion: int
    """R."""
    size: int
    """G."""
    num_heads: int
    """N."""
    num_kv_heads: int
    """K."""
    head_width: int
    """H."""
    device: torch.device

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}/{self.head_width}"
        return f"P={self.prefix} R={self.completion} G={self.size} heads {heads}"

    @cached_property
    def layout(self) -> SharedPrefixLayout:
        return SharedPrefixLayout(
            prefix_lengths=(self.prefix,), completion_lengths=((self.completion,) * self.size,)
        )

    @property
    def pairs(self) -> float:
        """Of a query and a key that must meet."""
        own = self.size * self.completion**2 / 2
        return self.prefix**2 / 2 + self.size * self.completion * self.prefix + own

    @property
    def dense_pairs(self) -> float:
        """The same where each sequence has a prefix of its own."""
        return self.size * (self.prefix + self.completion) ** 2 / 2

    @cached_property
    def dense_rows(self) -> Tensor:
        """int64 ``[G * L]``: the packed row of each row of the G sequences."""
        prefix = torch.arange(self.prefix).expand(self.size, -1)
        own = torch.arange(self.prefix, self.layout.num_rows).view(self.size, -1)
        return torch.cat([prefix, own], dim=1).flatten().to(self.device)

    @cached_property
    def packed_rows(self) -> Tensor:
        """int64 ``[T]``: where among ``dense_rows`` each packed row comes first."""
        length = self.prefix + self.completion
        own = torch.arange(self.size * length).view(self.size, -1)[:, self.prefix :]
        return torch.cat([torch.arange(self.prefix), own.flatten()]).to(self.device)

    @cached_property
    def block_mask(self) -> BlockMask:
        """FlexAttention's, of the packed row."""
        segment = torch.zeros(self.layout.num_rows, dtype=torch.int64, device=self.device)
        segment[self.prefix :] = torch.arange(1, self.size + 1, device=self.device).repeat_interleave(
            self.completion
        )

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & ((key < self.prefix) | (segment[key] == segment[query]))

        rows = self.layout.num_rows
        return create_block_mask(sees, None, None, rows, rows, device=self.device.type)


Attend = Callable[[Tensor, Tensor, Tensor, Group], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One way to attend."""

    name: str
    attend: Attend
    """``(q_TNH, k_TKH, v_TKH, group) -> o_TNH``."""
    is_dense: bool = False
    """Whether its rows are those of the G sequences, the prefix repeated."""
    note: str = ""
    """What it does otherwise than the rest."""

    def attend_packed(self, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
        """The same on packed rows for every peer."""
        if not self.is_dense:
            return self.attend(q_TNH, k_TKH, v_TKH, group)
        rows = group.dense_rows
        return self.attend(q_TNH[rows], k_TKH[rows], v_TKH[rows], group)[group.packed_rows]


def ours(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
    """The op that is measured."""
    return shared_prefix_attention(q_TNH, k_TKH, v_TKH, group.layout)


def reference(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
    """One SDPA with the whole group's mask."""
    return shared_prefix_attention_reference(q_TNH, k_TKH, v_TKH, group.layout)


def dense(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
    """Causal SDPA over the G sequences."""
    q, k, v = (x.unflatten(0, (group.size, -1)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH))
    return (
        scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    )


def dense_flash(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
    """The same, by FlashAttention or not at all."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return dense(q_TNH, k_TKH, v_TKH, group)


def prefix_grouper(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
    """As the package prefix-grouper does: the prefix alone, then each completion over a copy of the prefix."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TKH, v_TKH))
    prefix = slice(0, group.prefix)
    prefix_o = scaled_dot_product_attention(
        q[:, :, prefix], k[:, :, prefix], v[:, :, prefix], is_causal=True, enable_gqa=True
    )
    q_GNRH, k_GKRH, v_GKRH = (
        x[group.prefix :].unflatten(0, (group.size, -1)).transpose(1, 2) for x in (q_TNH, k_TKH, v_TKH)
    )
    k_GKLH, v_GKLH = (
        torch.cat([whole[:, :, prefix].expand(group.size, -1, -1, -1), own], dim=2)
        for whole, own in ((k, k_GKRH), (v, v_GKRH))
    )
    length = group.prefix + group.completion
    mask = torch.ones(group.completion, length, dtype=torch.bool, device=q.device).tril_(group.prefix)
    o = scaled_dot_product_attention(q_GNRH, k_GKLH, v_GKLH, attn_mask=mask, enable_gqa=True)
    return torch.cat([prefix_o[0].transpose(0, 1), o.transpose(1, 2).flatten(0, 1)])


def flex(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
    """FlexAttention, compiled, on the packed row."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TNH, k_TKH, v_TKH))
    out = _compiled_flex(q, k, v, block_mask=group.block_mask, enable_gqa=True)
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)


def three_flash(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: Group) -> Tensor:
    """Three varlen FlashAttention calls of PyTorch, merged by their log-sum-exps."""
    return _ThreeFlash.apply(q_TNH, k_TKH, v_TKH, group)


_compiled_flex = torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the three calls: row ranges and where its sequences end."""

    queries: slice
    keys: slice
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]
    is_causal: bool


def _parts(group: Group) -> list[_Part]:
    def ends(*, length: int, count: int) -> Tensor:
        return torch.arange(count + 1, dtype=torch.int32, device=group.device) * length

    prefix, rows = group.prefix, group.size * group.completion
    one, all_rows = ends(length=prefix, count=1), ends(length=rows, count=1)
    each = ends(length=group.completion, count=group.size)
    first, rest = slice(0, prefix), slice(prefix, prefix + rows)
    own = (group.completion, group.completion)
    return [
        _Part(first, first, one, one, (prefix, prefix), True),
        _Part(rest, first, all_rows, one, (rows, prefix), False),
        _Part(rest, rest, each, each, own, True),
    ]


class _ThreeFlash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: Group) -> Tensor:
        parts = _parts(group)
        results = [
            torch.ops.aten._flash_attention_forward(
                q[part.queries], k[part.keys], v[part.keys], part.query_ends, part.key_ends, *part.longest,
                0.0, part.is_causal, False,
            )
            for part in parts
        ]  # fmt: skip
        (prefix_o, prefix_lse, *state), (cross_o, cross_lse, *_), (own_o, own_lse, *_) = results
        lse = torch.logaddexp(cross_lse, own_lse)
        o = torch.lerp(cross_o.float(), own_o.float(), (own_lse - lse).exp().T[..., None]).to(q.dtype)
        out = torch.cat([prefix_o, o])
        ctx.save_for_backward(q, k, v, out, prefix_lse, lse, *state[:2])
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, prefix_lse, lse, *state = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for part, part_lse in zip(ctx.parts, (prefix_lse, lse, lse), strict=True):
            grads = torch.ops.aten._flash_attention_backward(
                grad_out[part.queries], q[part.queries], k[part.keys], v[part.keys], out[part.queries], part_lse,
                part.query_ends, part.key_ends, *part.longest, 0.0, part.is_causal, *state,
            )  # fmt: skip
            dq[part.queries] += grads[0]
            dk[part.keys] += grads[1]
            dv[part.keys] += grads[2]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


PEERS: dict[str, Peer] = {
    "reference": Peer(name="masked SDPA", attend=reference),
    "dense": Peer(name="dense SDPA", attend=dense, is_dense=True),
    "prefix-grouper": Peer(
        name="PrefixGrouper-style",
        attend=prefix_grouper,
        note="its composition written for this benchmark: prefix keys and values copied for each completion, masked",
    ),
    "flex": Peer(name="FlexAttention", attend=flex, note="compiled for the shape, its mask built beforehand"),
}
"""By the name to ask for, on every device."""
CUDA_PEERS: dict[str, Peer] = {
    "three-flash": Peer(name="three FlashAttention calls", attend=three_flash),
    "dense-flash": Peer(name="dense FlashAttention", attend=dense_flash, is_dense=True),
}
"""On CUDA, too."""
