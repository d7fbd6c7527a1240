from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from omnigrpo_kernels import extension, shared_prefix_attention_cpu
from omnigrpo_kernels.shared_prefix_attention import (
    group_mask,
    shared_prefix_attention,
    shared_prefix_attention_reference,
)
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

LAYOUTS = {
    "uneven": SharedPrefixLayout(prefix_lengths=(7,), completion_lengths=((3, 5, 2),)),
    "one-token completions": SharedPrefixLayout(prefix_lengths=(4,), completion_lengths=((1, 1, 1),)),
    "one-token prefix": SharedPrefixLayout(prefix_lengths=(1,), completion_lengths=((2, 4),)),
    "empty completions": SharedPrefixLayout(prefix_lengths=(5,), completion_lengths=((0, 3, 0, 2, 0),)),
    "only empty completions": SharedPrefixLayout(prefix_lengths=(5,), completion_lengths=((0, 0),)),
    "G=1": SharedPrefixLayout(prefix_lengths=(6,), completion_lengths=((9,),)),
    "several groups": SharedPrefixLayout(
        prefix_lengths=(3, 1, 8), completion_lengths=((2, 6), (1, 0, 3), (4, 4))
    ),
    "prefill": SharedPrefixLayout(prefix_lengths=(5, 1, 2), completion_lengths=((), (), ())),
    "prefill beside a group": SharedPrefixLayout(prefix_lengths=(5, 4), completion_lengths=((), (2, 3))),
    "lengths of several batches": SharedPrefixLayout(
        prefix_lengths=(9, 4), completion_lengths=((70, 1, 34), (60, 0, 33))
    ),
}
HEADS = {"MHA": (3, 3), "GQA": (6, 2), "MQA": (4, 1)}
HEAD_WIDTH = 5

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
each_heads = pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS.values(), ids=HEADS.keys())


def causal_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, scale: float) -> Tensor:
    """One whole sequence, written out."""
    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = (rows.repeat_interleave(repeats, dim=1) for rows in (k_TKH, v_TKH))
    scores = torch.einsum("inh,jnh->nij", q_TNH, k_TNH) * scale
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("nij,jnh->inh", scores.masked_fill(future, -torch.inf).softmax(-1), v_TNH)


def sdpa_attention(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, scale: float) -> Tensor:
    """One whole sequence, by PyTorch."""
    q, k, v = (rows.transpose(0, 1)[None] for rows in (q_TNH, k_TKH, v_TKH))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def dense_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    layout: SharedPrefixLayout,
    scale: float,
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor] = causal_attention,
) -> Tensor:
    """Each sequence alone, with its prefix repeated; results in packed order."""
    outputs, start = [], 0
    for prefix, lengths in zip(layout.prefix_lengths, layout.completion_lengths, strict=True):
        prefix_rows = torch.arange(start, start + prefix)
        outputs.append(attend(q_TNH[prefix_rows], k_TKH[prefix_rows], v_TKH[prefix_rows], scale))
        start += prefix
        for length in lengths:
            rows = torch.cat([prefix_rows, torch.arange(start, start + length)])
            outputs.append(attend(q_TNH[rows], k_TKH[rows], v_TKH[rows], scale)[prefix:])
            start += length
    return torch.cat(outputs)


def random_qkv(
    layout: SharedPrefixLayout,
    num_heads: int,
    num_kv_heads: int,
    dtype: torch.dtype = torch.float64,
    head_width: int = HEAD_WIDTH,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(layout.num_rows)
    q_TNH, k_TKH, v_TKH = (
        torch.randn(layout.num_rows, heads, head_width, dtype=torch.float64, generator=generator).to(dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q_TNH.requires_grad_(), k_TKH.requires_grad_(), v_TKH.requires_grad_()


@each_layout
@each_heads
def test_output_and_gradients_equal_each_sequence_alone(
    layout: SharedPrefixLayout, num_heads: int, num_kv_heads: int
) -> None:
    qkv = random_qkv(layout, num_heads, num_kv_heads)
    upstream = torch.randn(layout.num_rows, num_heads, HEAD_WIDTH, dtype=torch.float64)
    packed = shared_prefix_attention(*qkv, layout)
    dense = dense_attention(*qkv, layout, scale=HEAD_WIDTH**-0.5)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-9)
    packed_grads = torch.autograd.grad(packed, qkv, upstream)
    dense_grads = torch.autograd.grad(dense, qkv, upstream)
    torch.testing.assert_close(packed_grads, dense_grads, rtol=0, atol=1e-9)


def relative_errors(actual: Iterable[Tensor], exact: Iterable[Tensor]) -> list[float]:
    return [
        float((a.detach().double() - e.detach()).norm() / e.detach().norm())
        for a, e in zip(actual, exact, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("layout", "head_width"),
    [
        (SharedPrefixLayout(prefix_lengths=(300,), completion_lengths=((40,) * 5,)), 64),
        (SharedPrefixLayout(prefix_lengths=(90, 300), completion_lengths=((17, 40, 33), (280,))), 128),
        (SharedPrefixLayout(prefix_lengths=(50,), completion_lengths=((9, 40, 30, 1),)), 32),
    ],
    ids=["P=300 R=40 G=5 H=64", "uneven H=128", "small H=32"],
)
@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["flat", "peaked"])
def test_errors_are_at_most_twice_those_of_dense_attention(
    dtype: torch.dtype, layout: SharedPrefixLayout, head_width: int, spread: float
) -> None:
    q_TNH, k_TKH, v_TKH = random_qkv(layout, 6, 2, dtype, head_width)
    qkv = ((q_TNH.detach() * spread).requires_grad_(), k_TKH, v_TKH)
    wide = tuple(x.detach().double().requires_grad_() for x in qkv)
    upstream = torch.randn(qkv[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )

    def run(
        attention: Callable[..., Tensor], inputs: tuple[Tensor, ...], *args: object
    ) -> tuple[Tensor, ...]:
        out = attention(*inputs, *args)
        return out, *torch.autograd.grad(out, inputs, upstream.to(out.dtype))

    scale = head_width**-0.5
    exact = run(dense_attention, wide, layout, scale)
    dense = relative_errors(run(dense_attention, qkv, layout, scale, sdpa_attention), exact)
    packed_results = run(shared_prefix_attention, qkv, layout)
    assert {result.dtype for result in packed_results} == {dtype}
    for error, bound in zip(relative_errors(packed_results, exact), dense, strict=True):
        assert error <= 2 * bound


@each_layout
@each_heads
def test_without_prefix_queries_the_completions_rows_are_the_same(
    layout: SharedPrefixLayout, num_heads: int, num_kv_heads: int
) -> None:
    q_TNH, k_TKH, v_TKH = random_qkv(layout, num_heads, num_kv_heads)
    rows = [
        torch.arange(start + prefix, start + length)
        for start, prefix, length in zip(
            layout.group_starts, layout.prefix_lengths, layout.group_lengths, strict=True
        )
    ]
    completion_rows = torch.cat(rows)
    alone = replace(layout, prefix_queries=False)
    q_CNH = q_TNH.detach()[completion_rows].requires_grad_()
    upstream = torch.randn(q_CNH.shape, dtype=torch.float64)
    split = shared_prefix_attention(q_CNH, k_TKH, v_TKH, alone)
    whole = shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout)[completion_rows]
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-9)
    split_grads = torch.autograd.grad(split, (q_CNH, k_TKH, v_TKH), upstream)
    whole_grads = torch.autograd.grad(whole, (q_TNH, k_TKH, v_TKH), upstream)
    torch.testing.assert_close(split_grads[0], whole_grads[0][completion_rows], rtol=0, atol=1e-9)
    torch.testing.assert_close(split_grads[1:], whole_grads[1:], rtol=0, atol=1e-9)


def test_scale_multiplies_the_scores() -> None:
    layout = LAYOUTS["uneven"]
    q_TNH, k_TKH, v_TKH = random_qkv(layout, 4, 2)
    expected = shared_prefix_attention(q_TNH * 3, k_TKH, v_TKH, layout, scale=0.1)
    torch.testing.assert_close(
        shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout, scale=0.3), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("dims", [(0, 1), (1, 2)], ids=["heads apart", "elements apart"])
def test_noncontiguous_inputs_give_the_same(dims: tuple[int, int]) -> None:
    layout = LAYOUTS["several groups"]
    qkv = random_qkv(layout, 4, 2)
    q_TNH, k_TKH, v_TKH = (tensor.transpose(*dims).contiguous().transpose(*dims) for tensor in qkv)
    assert not q_TNH.is_contiguous()
    strided = shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout)
    torch.testing.assert_close(strided, shared_prefix_attention(*qkv, layout), rtol=0, atol=1e-12)


def test_completions_do_not_see_each_other_nor_the_prefix_its_completions() -> None:
    layout = LAYOUTS["uneven"]
    q_TNH, k_TKH, v_TKH = random_qkv(layout, 4, 2)
    changed = k_TKH.detach().clone()
    changed[10:15] += 1.0  # the second completion
    before = shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout)
    after = shared_prefix_attention(q_TNH, changed, v_TKH, layout)
    others = [*range(10), *range(15, 17)]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[11:15], after[11:15])


def test_first_use_in_inference_mode_does_not_break_a_later_backward() -> None:
    layout = SharedPrefixLayout(prefix_lengths=(11,), completion_lengths=((3, 2),))
    q_TNH, k_TKH, v_TKH = random_qkv(layout, 2, 1)
    with torch.inference_mode():
        shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout)
    shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout).sum().backward()
    assert q_TNH.grad is not None


@each_layout
@each_heads
def test_reference_is_the_same(layout: SharedPrefixLayout, num_heads: int, num_kv_heads: int) -> None:
    q_TNH, k_TKH, v_TKH = random_qkv(layout, num_heads, num_kv_heads)
    torch.testing.assert_close(
        shared_prefix_attention_reference(q_TNH, k_TKH, v_TKH, layout),
        shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("prefix_queries", [True, False])
def test_gradcheck(prefix_queries: bool) -> None:
    layout = SharedPrefixLayout(
        prefix_lengths=(3, 2), completion_lengths=((2, 0, 3), (1,)), prefix_queries=prefix_queries
    )
    q_TNH, k_TKH, v_TKH = random_qkv(layout, 4, 2)
    q_TNH = q_TNH.detach()[: layout.num_query_rows].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v: shared_prefix_attention(q, k, v, layout, scale=0.7), (q_TNH, k_TKH, v_TKH)
    )


def test_gradients_of_causal_parts_longer_than_a_block() -> None:
    """More rows than a block on the diagonal has, in the prefix and in a completion."""
    layout = SharedPrefixLayout(prefix_lengths=(300,), completion_lengths=((270, 530),))
    qkv = random_qkv(layout, 2, 1)
    upstream = torch.randn(layout.num_rows, 2, HEAD_WIDTH, dtype=torch.float64)
    packed = torch.autograd.grad(shared_prefix_attention(*qkv, layout), qkv, upstream)
    dense = torch.autograd.grad(dense_attention(*qkv, layout, HEAD_WIDTH**-0.5), qkv, upstream)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-9)


def test_pieces_for_many_cores_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = SharedPrefixLayout(prefix_lengths=(300,), completion_lengths=((211, 90, 200),))
    qkv = random_qkv(layout, 4, 2)
    upstream = torch.randn(layout.num_rows, 4, HEAD_WIDTH, dtype=torch.float64)
    results = []
    for num_threads in (1, 7, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        out = shared_prefix_attention(*qkv, layout)
        results.append((out, *torch.autograd.grad(out, qkv, upstream)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-10)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal(dtype: torch.dtype) -> None:
    layout = SharedPrefixLayout(prefix_lengths=(150, 40), completion_lengths=((40, 41, 7), (70,)))
    qkv = random_qkv(layout, 6, 2, dtype, 64)

    def run() -> tuple[Tensor, ...]:
        out = shared_prefix_attention(*qkv, layout)
        return out, *torch.autograd.grad(out, qkv, torch.ones_like(out))

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("layout", [LAYOUTS["several groups"], LAYOUTS["prefill"]], ids=["groups", "prefill"])
@pytest.mark.parametrize("prefix_queries", [True, False])
def test_op_keeps_the_rules_of_pytorchs_dispatcher(layout: SharedPrefixLayout, prefix_queries: bool) -> None:
    layout = replace(layout, prefix_queries=prefix_queries)
    q_TNH, k_TKH, v_TKH = random_qkv(layout, 4, 2, torch.float32)
    counts = [len(lengths) for lengths in layout.completion_lengths]
    lengths = [length for group in layout.completion_lengths for length in group]
    constants = (list(layout.prefix_lengths), counts, lengths, prefix_queries, 0.3)
    inputs = (q_TNH.detach()[: layout.num_query_rows].requires_grad_(), k_TKH, v_TKH)
    torch.library.opcheck(torch.ops.omnigrpo.shared_prefix_attention.default, (*inputs, *constants))
    with torch.no_grad():
        out, lse = torch.ops.omnigrpo.shared_prefix_attention(*inputs, *constants)
        backward = (torch.randn_like(out), *(x.detach() for x in inputs), out, lse, *constants)
        torch.library.opcheck(torch.ops.omnigrpo.shared_prefix_attention_backward.default, backward)


AMX_LAYOUTS = {
    "odd lengths": SharedPrefixLayout(prefix_lengths=(205,), completion_lengths=((37, 1, 150, 64),)),
    "empty completions": SharedPrefixLayout(prefix_lengths=(33,), completion_lengths=((0, 45, 0),)),
    "one-row prefix": SharedPrefixLayout(prefix_lengths=(1,), completion_lengths=((31, 70),)),
    "several groups": SharedPrefixLayout(
        prefix_lengths=(40, 3, 129), completion_lengths=((20, 61), (), (5, 0, 33))
    ),
    "whole strips": SharedPrefixLayout(prefix_lengths=(64, 32), completion_lengths=((32, 96), (64,))),
}
each_amx_layout = pytest.mark.parametrize("layout", AMX_LAYOUTS.values(), ids=AMX_LAYOUTS.keys())


@pytest.fixture
def amx() -> Iterator[None]:
    """Skips where the CPU has no AMX, which is the active instruction set where it has."""
    if extension.load().cpu_isa() != "amx_bf16":
        pytest.skip("the CPU has no AMX")
    yield
    extension.load().use_cpu_isa("amx_bf16")


def backward_inputs(
    layout: SharedPrefixLayout, num_heads: int, num_kv_heads: int, head_width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bfloat16 q, k, v and the output's gradient, with q's rows as the layout has them."""
    q_TNH, k_TKH, v_TKH = (
        x.detach() for x in random_qkv(layout, num_heads, num_kv_heads, torch.bfloat16, head_width)
    )
    q_TNH = q_TNH[: layout.num_query_rows].contiguous()
    return q_TNH, k_TKH, v_TKH, q_TNH.roll(1, dims=2)


def gradients(
    inputs: tuple[Tensor, ...],
    layout: SharedPrefixLayout,
    scale: float | None = None,
    attention: Callable[..., Tensor] = shared_prefix_attention,
) -> tuple[Tensor, ...]:
    upstream = inputs[3]
    qkv = tuple(x.detach().requires_grad_() for x in inputs[:3])
    return torch.autograd.grad(attention(*qkv, layout, scale=scale), qkv, upstream)


@each_amx_layout
@pytest.mark.parametrize("prefix_queries", [True, False])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_width"),
    [(14, 2, 64), (2, 2, 32), (7, 1, 96), (3, 3, 128)],
    ids=["14/2/64", "2/2/32", "7/1/96", "3/3/128"],
)
@pytest.mark.parametrize("scale", [None, 0.31])
def test_amx_errors_are_at_most_twice_those_of_dense_attention(
    amx: None,
    layout: SharedPrefixLayout,
    prefix_queries: bool,
    num_heads: int,
    num_kv_heads: int,
    head_width: int,
    scale: float | None,
) -> None:
    layout = replace(layout, prefix_queries=prefix_queries)
    inputs = backward_inputs(layout, num_heads, num_kv_heads, head_width)
    q, k, v, upstream = (x.double() for x in inputs)
    exact = gradients((q, k, v, upstream), layout, scale, shared_prefix_attention_reference)
    dense = relative_errors(gradients(inputs, layout, scale, shared_prefix_attention_reference), exact)
    errors = relative_errors(gradients(inputs, layout, scale), exact)
    for error, bound in zip(errors, dense, strict=True):
        assert error <= 2 * bound


@pytest.mark.parametrize(
    ("dtype", "head_width", "isa", "taken"),
    [
        (torch.bfloat16, 64, "amx_bf16", True),
        (torch.bfloat16, 40, "amx_bf16", False),
        (torch.float32, 64, "amx_bf16", False),
        (torch.bfloat16, 64, "avx512_bf16", False),
    ],
)
def test_amx_path_is_taken_where_it_can_be(
    amx: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_width: int, isa: str, taken: bool
) -> None:
    calls = []
    whole = shared_prefix_attention_cpu._amx_backward
    monkeypatch.setattr(
        shared_prefix_attention_cpu, "_amx_backward", lambda *args: calls.append(args) or whole(*args)
    )
    extension.load().use_cpu_isa(isa)
    q_TNH, k_TKH, v_TKH = random_qkv(LAYOUTS["uneven"], 4, 2, dtype, head_width)
    shared_prefix_attention(q_TNH, k_TKH, v_TKH, LAYOUTS["uneven"]).sum().backward()
    assert bool(calls) is taken


@each_amx_layout
def test_amx_runs_are_bitwise_equal_and_close_for_any_number_of_threads(
    amx: None, monkeypatch: pytest.MonkeyPatch, layout: SharedPrefixLayout
) -> None:
    inputs = backward_inputs(layout, 14, 2, 64)
    results = []
    for num_threads in (1, 1, 2, 2, 7, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=num_threads: count)
        results.append(gradients(inputs, layout))
    for first, second in zip(results[::2], results[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert max(relative_errors(second, (x.double() for x in results[0]))) < 1e-3


def test_amx_on_one_thread_is_close_to_two(amx: None) -> None:
    """Up to the order of sums: as many pieces as threads."""
    inputs = backward_inputs(AMX_LAYOUTS["odd lengths"], 14, 2, 64)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(inputs, AMX_LAYOUTS["odd lengths"])
        torch.set_num_threads(2)
        both = gradients(inputs, AMX_LAYOUTS["odd lengths"])
    finally:
        torch.set_num_threads(num_threads)
    assert max(relative_errors(both, (x.double() for x in alone))) < 1e-3


def test_amx_takes_strided_and_expanded_inputs(amx: None) -> None:
    layout = AMX_LAYOUTS["several groups"]
    q, k, v, upstream = backward_inputs(layout, 6, 2, 32)
    upstream = upstream[:, :, :1].expand_as(q)
    expected = gradients((q, k, v, upstream.contiguous()), layout)
    fused = torch.cat([q, k, v], dim=1)
    for inputs in (
        (*fused.split((6, 2, 2), dim=1), upstream),
        tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v, upstream)),
        tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, upstream)),
    ):
        for actual, wanted in zip(gradients(inputs, layout), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_amx_keeps_other_groups_from_what_is_not_finite(amx: None, value: float) -> None:
    """The middle group's rows are bad, all of them; its neighbours' end within a strip."""
    layout = AMX_LAYOUTS["several groups"]
    inputs = backward_inputs(layout, 14, 2, 64)
    expected = gradients(inputs, layout)
    start, length = layout.group_starts[1], layout.group_lengths[1]
    bad = tuple(x.clone() for x in inputs)
    for x in bad:
        x[start : start + length] = value
    others = [*range(start), *range(start + length, layout.num_rows)]
    for actual, wanted in zip(gradients(bad, layout), expected, strict=True):
        assert torch.equal(actual[others], wanted[others])


def test_cpu_kernels_are_registered() -> None:
    for op in ("shared_prefix_attention", "shared_prefix_attention_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"omnigrpo::{op}", "CPU")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_the_same(use_reentrant: bool) -> None:
    layout = LAYOUTS["uneven"]
    qkv = random_qkv(layout, 4, 2)
    plain = torch.autograd.grad(shared_prefix_attention(*qkv, layout).square().sum(), qkv)
    kept = checkpoint(shared_prefix_attention, *qkv, layout, use_reentrant=use_reentrant)
    assert isinstance(kept, Tensor)
    kept.square().sum().backward()
    assert all(torch.equal(x.grad, grad) for x, grad in zip(qkv, plain, strict=True) if x.grad is not None)
    assert all(x.grad is not None for x in qkv)


def test_only_wanted_gradients() -> None:
    layout = LAYOUTS["uneven"]
    q_TNH, k_TKH, v_TKH = random_qkv(layout, 4, 2)
    whole = torch.autograd.grad(shared_prefix_attention(q_TNH, k_TKH, v_TKH, layout).sum(), (k_TKH,))
    out = shared_prefix_attention(q_TNH.detach(), k_TKH, v_TKH.detach(), layout)
    assert torch.equal(torch.autograd.grad(out.sum(), (k_TKH,))[0], whole[0])
    assert not shared_prefix_attention(q_TNH.detach(), k_TKH.detach(), v_TKH.detach(), layout).requires_grad


def test_no_grad_saves_nothing() -> None:
    qkv = random_qkv(LAYOUTS["uneven"], 4, 2)
    with torch.no_grad():
        assert not shared_prefix_attention(*qkv, LAYOUTS["uneven"]).requires_grad


def test_group_mask_by_hand() -> None:
    mask = group_mask(2, (2, 0, 1), torch.device("cpu"))
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert mask.int().tolist() == expected


def test_layout_counts_and_starts() -> None:
    layout = SharedPrefixLayout(prefix_lengths=(3, 2, 4), completion_lengths=((2, 0, 1), (), (5,)))
    assert (layout.num_groups, layout.num_rows) == (3, 17)
    assert layout.group_lengths == (6, 2, 9)
    assert layout.group_starts == (0, 6, 8)
    assert layout.completion_starts == ((3, 5, 5), (), (12,))


@pytest.mark.parametrize(
    ("prefix_lengths", "completion_lengths", "message"),
    [
        ((), (), "at least one group"),
        ((3,), ((1,), (2,)), "1 prefix lengths but 2"),
        ((0,), ((1,),), r"prefix_lengths\[0\] is 0; it must be at least 1"),
        ((3, 2), ((1,), (4, -1)), r"completion_lengths\[1\]\[1\] is -1"),
        ((3.0,), ((1,),), "give a tuple of integers"),
        ([3], ((1,),), "give a tuple of integers"),
        ((3,), ([1],), r"completion_lengths\[0\] is \[1\]"),
        ((3,), [(1,)], "completion_lengths is a list"),
    ],
)
def test_bad_layout_is_refused(prefix_lengths: tuple, completion_lengths: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedPrefixLayout(prefix_lengths=prefix_lengths, completion_lengths=completion_lengths)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape", "message"),
    [
        ((17, 4), (17, 2, 8), (17, 2, 8), r"q \(17, 4\).*give q \[T, N, H\]"),
        ((17, 4, 8), (17, 2, 8), (17, 2, 9), "k, v of one shape"),
        ((17, 4, 9), (17, 2, 8), (17, 2, 8), "H of q, k and v must be equal"),
        ((17, 4, 8), (16, 2, 8), (16, 2, 8), "17 rows of q and 17 of k and v"),
        ((17, 4, 8), (17, 3, 8), (17, 3, 8), "N must be a multiple of K"),
        ((18, 4, 8), (18, 2, 8), (18, 2, 8), "layout of 17 rows of q"),
        ((17, 4, 0), (17, 2, 0), (17, 2, 0), r"q \(17, 4, 0\).*H must be at least 1"),
        ((17, 0, 8), (17, 2, 8), (17, 2, 8), r"q \(17, 0, 8\).*N must be a multiple of K"),
    ],
)
def test_bad_shapes_are_refused(q_shape: tuple, k_shape: tuple, v_shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared_prefix_attention(
            torch.zeros(q_shape), torch.zeros(k_shape), torch.zeros(v_shape), LAYOUTS["uneven"]
        )


def test_mixed_and_integer_dtypes_are_refused() -> None:
    q_TNH, k_TKH, v_TKH = random_qkv(LAYOUTS["uneven"], 4, 2)
    with pytest.raises(ValueError, match="give one float dtype"):
        shared_prefix_attention(q_TNH.float(), k_TKH, v_TKH, LAYOUTS["uneven"])
    with pytest.raises(ValueError, match="give one float dtype"):
        shared_prefix_attention(q_TNH.long(), k_TKH.long(), v_TKH.long(), LAYOUTS["uneven"])


def test_two_devices_are_refused() -> None:
    q_TNH, k_TKH, v_TKH = random_qkv(LAYOUTS["uneven"], 4, 2)
    with pytest.raises(ValueError, match="q on cpu, k on meta, v on cpu; give one device"):
        shared_prefix_attention(q_TNH, k_TKH.to("meta"), v_TKH, LAYOUTS["uneven"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_dtypes_without_a_kernel_are_refused(dtype: torch.dtype) -> None:
    q_TNH, k_TKH, v_TKH = (x.detach().to(dtype) for x in random_qkv(LAYOUTS["uneven"], 4, 2))
    with pytest.raises(ValueError, match=f"got {dtype}; give bfloat16, float16, float32 or float64"):
        shared_prefix_attention(q_TNH, k_TKH, v_TKH, LAYOUTS["uneven"])
