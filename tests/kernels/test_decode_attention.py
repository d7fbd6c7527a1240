"""Decode attention over paged keys and values: against the reference on every instruction set, and in Triton."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels import decode_attention_cuda as cuda_module
from omnigrpo_kernels.decode_attention import (
    BLOCK_TOKENS,
    DecodeLayout,
    decode_attention,
    decode_attention_reference,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PREFIX_LENGTHS = (300, 0, 31)
OWN_LENGTHS = ((1, 33, 270), (64, 2), (32,))
HEADS = [(6, 2, 8), (14, 2, 64), (3, 3, 20), (24, 2, 16), (9, 1, 96)]
"""N, K, H: more query heads than a tile, widths that vectors do not divide."""


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted")]
    if INTERPRETED
    else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
def triton_device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels run."""
    return torch.device(request.param)


class Work:
    """Rows of three groups in scattered blocks; blocks without an owner and places beyond a length are NaN."""

    def __init__(self, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        num_heads, kv_heads, width = heads
        generator = torch.Generator().manual_seed(num_heads)
        own = [length for group in OWN_LENGTHS for length in group]
        counts = [-(-length // BLOCK_TOKENS) for length in (*PREFIX_LENGTHS, *own)]
        blocks = iter(torch.randperm(sum(counts) + 5, generator=generator).tolist())
        tables = [[next(blocks) for _ in range(count)] for count in counts]
        num_blocks = sum(counts) + 5
        self.keys = torch.full((num_blocks, kv_heads, width, BLOCK_TOKENS), torch.nan, dtype=dtype)
        self.values = torch.full((num_blocks, kv_heads, BLOCK_TOKENS, width), torch.nan, dtype=dtype)
        for table, length in zip(tables, (*PREFIX_LENGTHS, *(n - 1 for n in own)), strict=True):
            for token in range(length):
                block, slot = table[token // BLOCK_TOKENS], token % BLOCK_TOKENS
                self.keys[block, :, :, slot] = torch.randn(kv_heads, width, generator=generator).to(dtype)
                self.values[block, :, slot] = torch.randn(kv_heads, width, generator=generator).to(dtype)
        shapes = ((num_heads, width), (kv_heads, width), (kv_heads, width))
        rows = (torch.randn(len(own), *shape, generator=generator).to(dtype, copy=True) for shape in shapes)
        self.q, self.k, self.v = (x.to(device) for x in rows)
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        self.layout = DecodeLayout(
            groups_S=torch.tensor([0, 0, 0, 1, 1, 2], device=device),
            prefix_blocks_BP=padded(tables[:3], device),
            prefix_lengths_B=torch.tensor(PREFIX_LENGTHS, device=device),
            own_blocks_SR=padded(tables[3:], device),
            own_lengths_S=torch.tensor(own, device=device),
        )

    def run(self, attend=decode_attention) -> tuple[Tensor, Tensor, Tensor]:
        """Output and pools; this object's pools stay as they are."""
        keys, values = self.keys.clone(), self.values.clone()
        out = attend(self.q, self.k, self.v, keys, values, self.layout, scale=0.3)
        return out, keys, values


def padded(tables: list[list[int]], device: torch.device) -> Tensor:
    width = max(len(table) for table in tables)
    return torch.tensor([table + [0] * (width - len(table)) for table in tables], device=device)


def assert_near_reference(work: Work, found: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
    expected = work.run(decode_attention_reference)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for pool, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(pool, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_output_and_pools_equal_the_references(
    each_isa: str, heads: tuple[int, int, int], dtype: torch.dtype
):
    work = Work(heads, dtype, torch.device("cpu"))
    assert_near_reference(work, work.run(), dtype)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_does_not_depend_on_its_neighbours_or_threads(threads: int):
    work = Work(HEADS[1], torch.float32, torch.device("cpu"))
    together = work.run()[0]
    torch.set_num_threads(threads)
    assert torch.equal(work.run()[0], together)
    for row in range(6):
        one = slice(row, row + 1)
        layout = replace(
            work.layout,
            groups_S=work.layout.groups_S[one],
            own_blocks_SR=work.layout.own_blocks_SR[one],
            own_lengths_S=work.layout.own_lengths_S[one],
        )
        alone = decode_attention(
            work.q[one], work.k[one], work.v[one], work.keys.clone(), work.values.clone(), layout, scale=0.3
        )
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("size", [1e-3, 300.0])
def test_flat_and_peaked_scores(each_isa: str, size: float):
    work = Work(HEADS[0], torch.float32, torch.device("cpu"))
    work.q *= size
    out = work.run()[0]
    exact = decode_attention_reference(
        work.q.double(),
        work.k.double(),
        work.v.double(),
        work.keys.double(),
        work.values.double(),
        work.layout,
        scale=0.3,
    )
    torch.testing.assert_close(out.double(), exact, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("own_lengths_S", 0, "new token"),
        ("own_lengths_S", 10_000, "room for"),
        ("groups_S", 3, "group 3 of 3"),
        ("prefix_lengths_B", -1, "length is -1"),
        ("own_blocks_SR", 999, "names block 999"),
        ("prefix_blocks_BP", -2, "names block -2"),
    ],
)
def test_tables_that_lead_outside_are_refused(field: str, value: int, message: str):
    work = Work(HEADS[0], torch.float32, torch.device("cpu"))
    table = getattr(work.layout, field).clone()
    table.view(-1)[0] = value
    work.layout = replace(work.layout, **{field: table})
    with pytest.raises(RuntimeError, match=message):
        work.run()


def test_pools_of_another_dtype_or_shape_are_refused():
    work = Work(HEADS[0], torch.float32, torch.device("cpu"))
    for keys, values in (
        (work.keys.double(), work.values),
        (work.keys, work.values[:, :1].contiguous()),
        (work.values, work.keys),
    ):
        with pytest.raises(RuntimeError, match="pool"):
            decode_attention(work.q, work.k, work.v, keys, values, work.layout, scale=1.0)


def test_fake_tensors_have_the_real_shape():
    work = Work(HEADS[0], torch.float32, torch.device("cpu"))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(6, 6, 8)
        out = torch.ops.omnigrpo.decode_attention(
            q, q[:, :2], q[:, :2], work.keys, work.values, *(torch.empty(0),) * 5, 1.0
        )
    assert out.shape == (6, 6, 8)


def attend_in_triton(q, k, v, keys, values, layout: DecodeLayout, *, scale: float) -> Tensor:
    return cuda_module.decode_attention_cuda(
        q,
        k,
        v,
        keys,
        values,
        layout.groups_S,
        layout.prefix_blocks_BP,
        layout.prefix_lengths_B,
        layout.own_blocks_SR,
        layout.own_lengths_S,
        scale,
    )


@pytest.mark.parametrize("blocks_per_part", [2, 100], ids=["parts", "one_part"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_equals_the_reference(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, blocks_per_part: int
):
    monkeypatch.setattr(cuda_module, "BLOCKS_PER_PART", blocks_per_part)
    work = Work((6, 2, 20), dtype, triton_device)
    found, expected = work.run(attend_in_triton), work.run(decode_attention_reference)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for pool, other in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(pool, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves no kernel to compile")
@pytest.mark.parametrize("heads", [(14, 2, 64), (28, 4, 128)], ids=str)
def test_kernels_compile_ahead_of_time_without_spills(ahead_of_time, monkeypatch, tmp_path, heads):
    pytest.importorskip("triton")
    from omnigrpo_kernels import triton_launch

    monkeypatch.setattr(triton_launch, "_compiled", {})
    built = ahead_of_time.AheadOfTime(monkeypatch, tmp_path, 90, {"prefix_stride", "own_stride", "scale"})
    work = Work(heads, torch.bfloat16, torch.device("cpu"))
    work.run(attend_in_triton)
    assert set(built.binaries) == {"append", "attend"}
    for binaries in built.binaries.values():
        registers, stack = ahead_of_time.used_resources(binaries[0], tmp_path)
        assert registers <= 255
        assert stack == 0
    assert "mma.sync" in built.binaries["attend"][0].asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
def test_triton_kernels_are_right_when_interpreted():
    pytest.importorskip("triton")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton_equals"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 passed" in result.stdout
