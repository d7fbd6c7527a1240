"""Shared-prefix attention on CUDA: on a device, interpreted on the CPU, and compiled ahead of time.

Triton reads TRITON_INTERPRET when it is first imported, so the interpreted cases run in a process of their own, which
`test_kernels_under_the_interpreter` starts with this file.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omnigrpo_kernels import shared_prefix_attention_cuda as module
from omnigrpo_kernels import shared_prefix_tiles
from omnigrpo_kernels.shared_prefix_attention import group_mask, shared_prefix_attention_reference
from omnigrpo_kernels.shared_prefix_attention_cuda import (
    Blocks,
    Tiling,
    attention_backward,
    attention_forward,
)
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = Blocks(rows=16, step=16, num_warps=4, num_stages=1)

compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves no kernel to compile")
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
each_prefix_queries = pytest.mark.parametrize(
    "prefix_queries", [True, False], ids=["all queries", "completions' queries"]
)

LAYOUTS = {
    "uneven": SharedPrefixLayout(prefix_lengths=(37,), completion_lengths=((20, 0, 3, 35, 1),)),
    "several groups": SharedPrefixLayout(
        prefix_lengths=(32, 5, 18), completion_lengths=((16, 7), (40,), (1, 1, 1))
    ),
    "one row": SharedPrefixLayout(prefix_lengths=(1,), completion_lengths=((1,),)),
    "G=1": SharedPrefixLayout(prefix_lengths=(17,), completion_lengths=((33,),)),
    "prefill": SharedPrefixLayout(prefix_lengths=(50, 3), completion_lengths=((), ())),
    "prefill beside a group": SharedPrefixLayout(prefix_lengths=(20, 19), completion_lengths=((), (5, 22))),
    "only empty completions": SharedPrefixLayout(prefix_lengths=(21,), completion_lengths=((0, 0),)),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """Inputs of both directions."""

    q_TNH: Tensor
    k_TKH: Tensor
    v_TKH: Tensor
    do_TNH: Tensor
    layout: SharedPrefixLayout
    scale: float

    def run(self) -> tuple[Tensor, ...]:
        """o, lse, dq, dk and dv of the kernels."""
        qkv = self.q_TNH, self.k_TKH, self.v_TKH
        torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
        try:
            o_TNH, lse_NT = attention_forward(*qkv, self.layout, self.scale)
            grads = attention_backward(self.do_TNH, *qkv, o_TNH, lse_NT, self.layout, self.scale)
        finally:
            torch.use_deterministic_algorithms(False)
        return o_TNH, lse_NT, *grads

    def dense(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """o, dq, dk and dv of the reference, in this dtype."""
        qkv = [x.to(dtype).requires_grad_() for x in (self.q_TNH, self.k_TKH, self.v_TKH)]
        q_TNH, k_TKH, v_TKH = qkv
        o_TNH = shared_prefix_attention_reference(q_TNH, k_TKH, v_TKH, self.layout, scale=self.scale)
        return o_TNH.detach(), *torch.autograd.grad(o_TNH, qkv, self.do_TNH.to(dtype))

    def exact_lse(self) -> Tensor:
        """``[N, Q]`` in float64."""
        parts, start, queries = [], 0, 0
        heads_per_kv = self.q_TNH.shape[1] // self.k_TKH.shape[1]
        for prefix, lengths in zip(self.layout.prefix_lengths, self.layout.completion_lengths, strict=True):
            length = prefix + sum(lengths)
            mask = group_mask(prefix, lengths, self.q_TNH.device)
            mask = mask if self.layout.prefix_queries else mask[prefix:]
            q_LNH = self.q_TNH[queries : queries + len(mask)].double()
            k_LNH = self.k_TKH[start : start + length].double().repeat_interleave(heads_per_kv, dim=1)
            scores = torch.einsum("inh,jnh->nij", q_LNH, k_LNH) * self.scale
            parts.append(scores.masked_fill(~mask, -math.inf).logsumexp(dim=2))
            start, queries = start + length, queries + len(mask)
        return torch.cat(parts, dim=1)


def random_attention(
    layout: SharedPrefixLayout,
    dtype: torch.dtype,
    *,
    heads: tuple[int, int] = (6, 2),
    width: int = 16,
    spread: float = 1.5,
) -> Attention:
    generator = torch.Generator(device=torch.get_default_device()).manual_seed(layout.num_rows)
    (num_heads, num_kv_heads), queries = heads, layout.num_query_rows
    shapes = [(queries, num_heads), (layout.num_rows, num_kv_heads), (layout.num_rows, num_kv_heads)]
    q_TNH, k_TKH, v_TKH, do_TNH = (
        torch.randn(*shape, width, generator=generator).mul(spread).to(dtype)
        for shape in (*shapes, (queries, num_heads))
    )
    return Attention(q_TNH=q_TNH, k_TKH=k_TKH, v_TKH=v_TKH, do_TNH=do_TNH, layout=layout, scale=width**-0.5)


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted")]
    if INTERPRETED
    else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernels run; the interpreter is slow, so there tiles are small."""
    if INTERPRETED:
        for name in ("NARROW_HEADS", "WIDE_HEADS", "FLOAT32"):
            monkeypatch.setattr(module, name, Tiling(forward=SMALL, queries=SMALL, keys=SMALL))
    monkeypatch.setattr(shared_prefix_tiles, "MIN_BLOCKS", 2)
    module.attention_plan.cache_clear()
    with torch.device(request.param):
        yield request.param
    module.attention_plan.cache_clear()


def assert_at_most_twice_the_error(attention: Attention) -> None:
    """Of outputs and gradients in norm and at the worst, against the reference in the same dtype."""
    o, lse, *grads = attention.run()
    dtype = attention.q_TNH.dtype
    exact, dense = attention.dense(torch.float64), attention.dense(dtype)
    for name, ours, reference, plain in zip(("o", "dq", "dk", "dv"), (o, *grads), exact, dense, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == reference.shape
        if not ours.numel():
            continue
        error, allowed = (ours.double() - reference).abs(), (plain.double() - reference).abs()
        rounding = reference.abs().max() * torch.finfo(dtype).eps + 2e-6
        times = 4 if INTERPRETED and dtype == torch.bfloat16 else 2  # the interpreter truncates
        assert error.norm() <= times * allowed.norm() + rounding, name
        assert error.max() <= times * allowed.max() + rounding, name
    assert lse.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
    torch.testing.assert_close(lse.double(), attention.exact_lse(), rtol=1e-6, atol=2e-5)


@each_layout
@each_dtype
@each_prefix_queries
def test_outputs_and_gradients(
    device: str, layout: SharedPrefixLayout, dtype: torch.dtype, prefix_queries: bool
) -> None:
    layout = replace(layout, prefix_queries=prefix_queries)
    assert_at_most_twice_the_error(random_attention(layout, dtype))


@each_dtype
@pytest.mark.parametrize(
    ("heads", "width"), [((3, 3), 32), ((7, 1), 24), ((4, 2), 40)], ids=["MHA", "MQA", "odd width"]
)
def test_heads(device: str, dtype: torch.dtype, heads: tuple[int, int], width: int) -> None:
    assert_at_most_twice_the_error(
        random_attention(LAYOUTS["several groups"], dtype, heads=heads, width=width)
    )


@pytest.mark.parametrize("prefix", [15, 16, 17, 31, 32, 33])
def test_prefixes_beside_whole_blocks(device: str, prefix: int) -> None:
    layout = SharedPrefixLayout(prefix_lengths=(prefix, 4), completion_lengths=((15, 17, 2), (16,)))
    assert_at_most_twice_the_error(random_attention(layout, torch.float32))


@each_dtype
def test_runs_are_bitwise_equal(device: str, dtype: torch.dtype) -> None:
    attention = random_attention(LAYOUTS["uneven"], dtype)
    for first, second in zip(attention.run(), attention.run(), strict=True):
        assert torch.equal(first, second)


def test_views_of_one_projection_and_an_expanded_gradient(device: str) -> None:
    layout = LAYOUTS["uneven"]
    generator = torch.Generator(device=torch.get_default_device()).manual_seed(1)
    qkv = torch.randn(layout.num_rows, 10, 16, generator=generator)
    attention = Attention(
        q_TNH=qkv[:, :6],
        k_TKH=qkv[:, 6:8],
        v_TKH=qkv[:, 8:],
        do_TNH=torch.randn(layout.num_rows, 1, 16, generator=generator).expand(-1, 6, -1),
        layout=layout,
        scale=0.3,
    )
    assert_at_most_twice_the_error(attention)


def test_large_scores(device: str) -> None:
    assert_at_most_twice_the_error(random_attention(LAYOUTS["uneven"], torch.float32, spread=12))


def test_scores_far_from_zero_that_differ_by_a_few_bits(device: str) -> None:
    """What a rounded log-sum-exp does to P alone: the scores are whole numbers, so no order of sums rounds them.

    A term of dv is off by 2^-22 for exp2 in each direction, as much for the logarithm of the total, and by sums of the
    few terms that are not near zero; each rounding of a log-sum-exp of 2,000 bits to a float32 would add up to 2^-14.
    """
    layout = LAYOUTS["uneven"]
    generator = torch.Generator(device=torch.get_default_device()).manual_seed(2)

    def integers(num_heads: int, low: int, high: int, *, width: int = 16) -> Tensor:
        shape = (layout.num_rows, num_heads, width)
        return torch.randint(low, high + 1, shape, generator=generator).float()

    q_TNH, k_TKH = integers(6, -24, 24), integers(2, -24, 24)[:1].repeat(layout.num_rows, 1, 1)
    q_TNH[..., 15:], k_TKH[..., 15:] = integers(6, 1, 2, width=1), integers(2, -3, 3, width=1)
    attention = Attention(
        q_TNH=q_TNH,
        k_TKH=k_TKH,
        v_TKH=torch.randn(k_TKH.shape, generator=generator),
        do_TNH=torch.randn(q_TNH.shape, generator=generator),
        layout=layout,
        scale=math.log(2),
    )
    assert attention.exact_lse().abs().max() > 2000 * math.log(2)
    *_, dv_TKH = attention.run()
    exact = attention.dense(torch.float64)[-1]
    terms = replace(attention, do_TNH=attention.do_TNH.abs()).dense(torch.float64)[-1]
    assert ((dv_TKH.double() - exact).abs() <= terms * 2**-18).all()


def test_completions_do_not_see_each_other(device: str) -> None:
    attention = random_attention(LAYOUTS["uneven"], torch.float32)
    before = attention.run()[0]
    attention.v_TKH[37:57] += 1  # the first completion
    after = attention.run()[0]
    assert torch.equal(before[:37], after[:37])
    assert torch.equal(before[57:], after[57:])
    assert not torch.equal(before[37:57], after[37:57])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "width"), [((14, 2), 64), ((28, 4), 128), ((4, 2), 80), ((4, 4), 32), ((4, 1), 96)]
)
@each_prefix_queries
def test_on_the_device(dtype: torch.dtype, heads: tuple[int, int], width: int, prefix_queries: bool) -> None:
    with torch.device("cuda"):
        for prefixes, completions in (
            ((512,), ((100,) * 6,)),
            ((300, 1, 700), ((257, 1, 0, 64), (90,), (31,) * 9)),
        ):
            layout = SharedPrefixLayout(
                prefix_lengths=prefixes, completion_lengths=completions, prefix_queries=prefix_queries
            )
            assert_at_most_twice_the_error(
                random_attention(layout, dtype, heads=heads, width=width, spread=1)
            )


@pytest.mark.gpu
@each_dtype
def test_runs_on_the_device_are_bitwise_equal(dtype: torch.dtype) -> None:
    layout = SharedPrefixLayout(prefix_lengths=(1100, 64), completion_lengths=((300, 200, 1), (511,)))
    with torch.device("cuda"):
        attention = random_attention(layout, dtype, heads=(14, 2), width=64)
        for first, second in zip(attention.run(), attention.run(), strict=True):
            assert torch.equal(first, second)


@pytest.mark.gpu
def test_more_programs_than_a_second_grid_axis_has() -> None:
    layout = SharedPrefixLayout(prefix_lengths=(40,) * 9000, completion_lengths=((9, 11),) * 9000)
    one = SharedPrefixLayout(prefix_lengths=(40,), completion_lengths=((9, 11),))
    with torch.device("cuda"):
        attention = random_attention(layout, torch.bfloat16, heads=(8, 8), width=32)
        last = replace(
            attention,
            layout=one,
            **{name: getattr(attention, name)[-60:] for name in ("q_TNH", "k_TKH", "v_TKH", "do_TNH")},
        )
        o, lse, *grads = attention.run()
        expected = last.run()
        for ours, alone in zip((o[-60:], lse[:, -60:], *(x[-60:] for x in grads)), expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-2, atol=1e-3)


def visible_pairs(layout: SharedPrefixLayout) -> Tensor:
    """Bool ``[Q, T]``."""
    masks = []
    for prefix, lengths in zip(layout.prefix_lengths, layout.completion_lengths, strict=True):
        mask = group_mask(prefix, lengths, torch.device("cpu"))
        masks.append(mask if layout.prefix_queries else mask[prefix:])
    return torch.block_diag(*(mask.int() for mask in masks)).bool()


@each_layout
@each_prefix_queries
@pytest.mark.parametrize("heads_per_kv", [1, 3])
def test_query_tiles_cover_each_pair_once(
    layout: SharedPrefixLayout, prefix_queries: bool, heads_per_kv: int
) -> None:
    layout = replace(layout, prefix_queries=prefix_queries)
    segments = shared_prefix_tiles.find_segments(layout)
    tiles = shared_prefix_tiles.query_tiles(layout, segments, heads_per_kv=heads_per_kv, rows=16)
    seen = torch.zeros(heads_per_kv, layout.num_query_rows, layout.num_rows, dtype=torch.int32)
    lengths = []
    for region, region_rows, offset, shift, prefix, prefix_length, own, own_full, own_end in tiles.tolist():
        lengths.append(prefix_length + own_end - own)
        for pair in range(offset, min(offset + 16, region_rows)):
            row, head = region + pair // heads_per_kv, pair % heads_per_kv
            seen[head, row - shift, prefix : prefix + prefix_length] += 1
            seen[head, row - shift, own:own_full] += 1
            first = max(own_full, int(segments.first_T[row]))
            seen[head, row - shift, first : row + 1] += 1
            assert row < own_end
    assert torch.equal(seen, visible_pairs(layout).int().expand_as(seen))
    assert lengths == sorted(lengths, reverse=True)


@each_layout
@each_prefix_queries
@pytest.mark.parametrize("num_parts", [1, 40])
def test_key_tiles_cover_each_pair_once(
    layout: SharedPrefixLayout, prefix_queries: bool, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_prefix_tiles, "MIN_BLOCKS", 1)
    layout, block, heads_per_kv = replace(layout, prefix_queries=prefix_queries), 8, 3
    segments = shared_prefix_tiles.find_segments(layout)
    tiles = shared_prefix_tiles.key_tiles(
        layout,
        segments,
        heads_per_kv=heads_per_kv,
        num_kv_heads=2,
        rows=16,
        block=block,
        num_parts=num_parts,
    )
    seen = torch.zeros(heads_per_kv, layout.num_query_rows, layout.num_rows, dtype=torch.int32)
    written: dict[int, list[int]] = {}
    for part in tiles.table.tolist():
        key, key_end, shift, full, full_end, causal, causal_end, begin, end, masked, masked_end, slot = part
        written.setdefault(key, []).append(slot)
        whole, tail = divmod(full_end - full, block)
        for index in range(begin, end):
            start = full - shift + index % whole * block
            seen[index // whole, start : start + block, key:key_end] += 1
        per_head = bool(tail) + (causal_end - causal) // block
        for index in range(masked, masked_end):
            place = index % per_head - bool(tail)
            start = full + whole * block if place < 0 else causal + place * block
            for row in range(start, min(start + block, layout.num_rows)):
                sees = [k for k in range(key, key_end) if k <= row < segments.past_T[k]]
                seen[index // per_head, row - shift, sees] += 1
    assert torch.equal(seen, visible_pairs(layout).int().expand_as(seen))
    sums = {key: list(range(first, first + slots)) for key, _, first, slots in tiles.sums.tolist()}
    assert {key: sorted(slots) for key, slots in written.items() if slots != [-1]} == sums
    assert sorted(slot for slots in sums.values() for slot in slots) == list(range(tiles.num_slots))


@pytest.mark.parametrize(("num_kv_heads", "block"), [(2, 64), (4, 64)], ids=["14/2/64", "28/4/128"])
def test_the_keys_work_fills_a_card_evenly(num_kv_heads: int, block: int) -> None:
    """Seven query heads to a key/value head, P=2048, G=16, R=512, on 132 multiprocessors."""
    layout = SharedPrefixLayout(prefix_lengths=(2048,), completion_lengths=((512,) * 16,))
    tiles = shared_prefix_tiles.key_tiles(
        layout,
        shared_prefix_tiles.find_segments(layout),
        heads_per_kv=7,
        num_kv_heads=num_kv_heads,
        rows=128,
        block=block,
        num_parts=4 * 132,
    )
    work = tiles.table[:, 8] - tiles.table[:, 7] + tiles.table[:, 10] - tiles.table[:, 9]
    assert len(tiles.table) * num_kv_heads >= 4 * 132
    assert work.max() <= 1.5 * work.float().mean()
    pairs = 2048 * 2049 // 2 + 16 * (512 * 2048 + 512 * 513 // 2)
    assert int(work.sum()) * 128 * block <= 1.035 * 7 * pairs


@pytest.mark.parametrize(
    ("dtype", "width", "scale", "message"),
    [
        (torch.float64, 16, 1.0, r"got torch\.float64; give bfloat16, float16 or float32"),
        (torch.float32, 20, 1.0, "got heads 20 wide; give a multiple of 8 up to 128"),
        (torch.float32, 136, 1.0, "got heads 136 wide"),
        (torch.float32, 16, 0.0, "got scale 0.0; it must be finite and above 0"),
        (torch.float32, 16, math.nan, "got scale nan"),
    ],
)
def test_refuses(dtype: torch.dtype, width: int, scale: float, message: str) -> None:
    attention = random_attention(LAYOUTS["one row"], dtype, width=width)
    qkv = attention.q_TNH, attention.k_TKH, attention.v_TKH
    with pytest.raises(ValueError, match=message):
        attention_forward(*qkv, attention.layout, scale)
    with pytest.raises(ValueError, match=message):
        attention_backward(
            attention.do_TNH, *qkv, attention.do_TNH, torch.zeros(6, 2), attention.layout, scale
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_values_the_op_has_the_same_dtypes(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        rows = torch.empty(3, 2, 16, device="cuda", dtype=dtype)
        o, lse = torch.ops.omnigrpo.shared_prefix_attention(rows, rows, rows, [2], [1], [1], True, 1.0)
    assert o.dtype == dtype
    assert lse.dtype == module.lse_dtype(dtype)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def test_without_triton_the_package_imports_and_a_call_says_what_to_install() -> None:
    result = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from omnigrpo_kernels.shared_prefix_attention_cuda import attention_forward\n"
        "from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout\n"
        "layout = SharedPrefixLayout(prefix_lengths=(1,), completion_lengths=((),))\n"
        "row = torch.zeros(1, 1, 16); attention_forward(row, row, row, layout, 1.0)"
    )
    assert result.returncode == 1
    assert "ImportError: shared_prefix_attention on CUDA needs triton >= 3.6" in result.stderr


def test_importing_the_launchers_imports_no_triton() -> None:
    result = run_python(
        "import sys, omnigrpo_kernels.shared_prefix_attention_cuda; print('triton' in sys.modules)"
    )
    assert result.stdout.strip() == "False", result.stderr


@compiled
@pytest.mark.slow
def test_kernels_under_the_interpreter() -> None:
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    if triton.__version__ < "3.7" and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of triton 3.6 does not run with numpy 2.4 or later")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", str(Path(__file__))],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout)
    assert "skipped" not in result.stdout


def compile_all(
    ahead_of_time: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
    capability: int,
    dtype: torch.dtype,
    width: int,
) -> dict[str, Any]:
    """The kernels that the two directions launch, by name."""
    ahead = ahead_of_time.AheadOfTime(monkeypatch, cache, capability, {"num_query_rows"})
    monkeypatch.setattr(module, "num_multiprocessors", lambda device: 132)
    module.attention_plan.cache_clear()
    layout = SharedPrefixLayout(prefix_lengths=(1024,), completion_lengths=((256,) * 4,))
    attention = random_attention(layout, dtype, heads=(14, 2), width=width)
    qkv = attention.q_TNH, attention.k_TKH, attention.v_TKH
    attention_forward(*qkv, layout, 0.125)
    lse_NT = torch.zeros(14, layout.num_rows, dtype=module.lse_dtype(dtype))
    attention_backward(attention.do_TNH, *qkv, attention.do_TNH, lse_NT, layout, 0.125)
    module.attention_plan.cache_clear()
    assert {name: len(built) for name, built in ahead.binaries.items()} == {
        "attend_tiles": 1,
        "query_gradient_tiles": 1,
        "key_gradient_tiles": 1,
        "sum_partials": 1,
    }
    return {name: built for name, (built,) in ahead.binaries.items()}


LIMITS = {
    ("attend_tiles", 64): (255, 0, 113 * 1024),
    ("query_gradient_tiles", 64): (255, 0, 113 * 1024),
    ("key_gradient_tiles", 64): (255, 0, 113 * 1024),
    ("attend_tiles", 128): (255, 0, 227 * 1024),
    ("query_gradient_tiles", 128): (255, 0, 227 * 1024),
    ("key_gradient_tiles", 128): (255, 32, 227 * 1024),
}
"""Registers of a thread, bytes of spilled ones and of shared memory: two programs of narrow heads share 227 KiB."""


@compiled
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *((torch.bfloat16, width) for width in (32, 64, 80, 128)),
        (torch.float16, 64),
        *((torch.float32, width) for width in (64, 128)),
    ],
    ids=str,
)
def test_every_kernel_compiles_for_sm_90(
    ahead_of_time: ModuleType,
    dtype: torch.dtype,
    width: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, binary in compile_all(ahead_of_time, monkeypatch, tmp_path, 90, dtype, width).items():
        ptx = binary.asm["ptx"]
        assert ".target sm_90" in ptx
        assert len(binary.asm["cubin"]) > 1000
        assert "tf32" not in ptx
        assert "atom" not in ptx
        registers, stack = ahead_of_time.used_resources(binary, tmp_path)
        if name == "sum_partials":
            assert stack == 0
            continue
        assert "cp.async.bulk.tensor.2d" in ptx
        assert ("wgmma.mma_async.sync.aligned" in ptx) == (dtype != torch.float32)
        assert binary.metadata.shared <= 227 * 1024
        if dtype == torch.bfloat16 and width in (64, 128):
            most_registers, most_stack, most_shared = LIMITS[name, width]
            assert registers <= most_registers
            assert stack <= most_stack
            assert binary.metadata.shared <= most_shared


@compiled
@pytest.mark.slow
def test_other_cards_get_blocks_that_compile_for_sm_80(
    ahead_of_time: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WIDE_HEADS", module.ANY_CARD)
    for name, binary in compile_all(ahead_of_time, monkeypatch, tmp_path, 80, torch.bfloat16, 128).items():
        assert binary.metadata.shared <= 99 * 1024
        assert ("mma.sync.aligned" in binary.asm["ptx"]) == name.endswith("_tiles")
