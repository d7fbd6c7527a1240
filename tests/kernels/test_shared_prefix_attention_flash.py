"""Which rows the FlashAttention calls get, and how their results merge; the calls themselves on a device."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels.shared_prefix_attention import group_mask, shared_prefix_attention_reference
from omnigrpo_kernels.shared_prefix_attention_flash import (
    FlashCall,
    flash_backward,
    flash_calls,
    flash_forward,
    merge_,
    put_,
    take,
)
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

LAYOUTS = {
    "one group": SharedPrefixLayout(prefix_lengths=(5,), completion_lengths=((3, 0, 1, 4),)),
    "several groups": SharedPrefixLayout(
        prefix_lengths=(3, 1, 4, 2), completion_lengths=((2, 5), (), (0, 3), (0,))
    ),
    "prefill": SharedPrefixLayout(prefix_lengths=(4, 2), completion_lengths=((), ())),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_prefix_queries = pytest.mark.parametrize(
    "prefix_queries", [True, False], ids=["all queries", "completions' queries"]
)


def rows_of(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [row for begin, end in ranges for row in range(begin, end)]


def pairs_of(call: FlashCall, num_queries: int, num_rows: int) -> Tensor:
    """int32 ``[Q, T]``: the pairs that the call attends."""
    assert 0 not in (*call.query_lengths, *call.key_lengths)
    blocks = [
        torch.ones(queries, keys, dtype=torch.int32).tril(0 if call.causal else keys)
        for queries, keys in zip(call.query_lengths, call.key_lengths, strict=True)
    ]
    pairs = torch.zeros(num_queries, num_rows, dtype=torch.int32)
    index = torch.tensor(rows_of(call.queries))[:, None], torch.tensor(rows_of(call.keys))[None, :]
    pairs[index] = torch.block_diag(*blocks).int()
    return pairs


@each_layout
@each_prefix_queries
def test_the_calls_cover_each_pair_once(layout: SharedPrefixLayout, prefix_queries: bool) -> None:
    layout = replace(layout, prefix_queries=prefix_queries)
    masks = [
        group_mask(prefix, lengths, torch.device("cpu"))[0 if prefix_queries else prefix :].int()
        for prefix, lengths in zip(layout.prefix_lengths, layout.completion_lengths, strict=True)
    ]
    seen = torch.zeros(layout.num_query_rows, layout.num_rows, dtype=torch.int32)
    visited: set[int] = set()
    for call in flash_calls(layout):
        queries = set(rows_of(call.queries))
        assert queries <= visited if call.merges else not queries & visited
        visited |= queries
        seen += pairs_of(call, *seen.shape)
    assert torch.equal(seen, torch.block_diag(*masks).int())
    assert visited == set(range(layout.num_query_rows))


def test_a_group_alone_is_never_copied() -> None:
    rows = torch.randn(13, 2, 4)
    for call in flash_calls(LAYOUTS["one group"]):
        assert take(rows, call.queries)._base is rows
        assert take(rows, call.keys)._base is rows


def test_take_and_put_are_inverse() -> None:
    rows, ranges = torch.arange(10.0), ((1, 3), (6, 10))
    taken = take(rows, ranges)
    assert taken.tolist() == [1, 2, 6, 7, 8, 9]
    put_(rows, ranges, taken * 10, add=True)
    assert rows.tolist() == [0, 11, 22, 3, 4, 5, 66, 77, 88, 99]
    put_(rows, ranges, taken, add=False)
    assert rows.tolist() == list(range(10))


def test_merge_is_attention_over_both_sets_of_keys() -> None:
    torch.manual_seed(0)
    scores_NTJ, v_NJH = (
        torch.randn(2, 7, 9, dtype=torch.float64) * 4,
        torch.randn(2, 9, 3, dtype=torch.float64),
    )

    def attend(first: int, last: int) -> tuple[Tensor, Tensor]:
        s = scores_NTJ[:, :, first:last]
        return (s.softmax(2) @ v_NJH[:, first:last]).transpose(0, 1), s.logsumexp(2)

    (o_TNH, lse_NT), (part_TNH, part_lse_NT), (whole_TNH, whole_lse_NT) = (
        attend(0, 4), attend(4, 9), attend(0, 9),
    )  # fmt: skip
    o_TNH, ranges = o_TNH.contiguous(), ((0, 2), (4, 7))
    untouched = o_TNH[2:4].clone()
    merge_(o_TNH, lse_NT, ranges, take(part_TNH, ranges), take(part_lse_NT, ranges, dim=1))
    torch.testing.assert_close(take(o_TNH, ranges), take(whole_TNH, ranges), rtol=0, atol=1e-12)
    torch.testing.assert_close(take(lse_NT, ranges, 1), take(whole_lse_NT, ranges, 1), rtol=0, atol=1e-12)
    assert torch.equal(o_TNH[2:4], untouched)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@each_prefix_queries
def test_on_the_device(dtype: torch.dtype, width: int, prefix_queries: bool) -> None:
    layout = SharedPrefixLayout(
        prefix_lengths=(300, 1, 128),
        completion_lengths=((100, 0, 64), (), (7, 90)),
        prefix_queries=prefix_queries,
    )
    with torch.device("cuda"):
        q_TNH, do_TNH = torch.randn(2, layout.num_query_rows, 14, width).to(dtype)
        k_TKH, v_TKH = torch.randn(2, layout.num_rows, 2, width).to(dtype)
        scale = width**-0.5
        o_TNH, lse_NT = flash_forward(q_TNH, k_TKH, v_TKH, layout, scale)
        grads = flash_backward(do_TNH, q_TNH, k_TKH, v_TKH, o_TNH, lse_NT, layout, scale)
        ours = o_TNH, *grads

        def dense(dtype: torch.dtype) -> tuple[Tensor, ...]:
            q, k, v = (x.to(dtype).requires_grad_() for x in (q_TNH, k_TKH, v_TKH))
            o = shared_prefix_attention_reference(q, k, v, layout, scale=scale)
            return o.detach(), *torch.autograd.grad(o, (q, k, v), do_TNH.to(dtype))

        for result, exact, plain in zip(ours, dense(torch.float64), dense(dtype), strict=True):
            assert (result.double() - exact).norm() <= 2 * (plain.double() - exact).norm()
