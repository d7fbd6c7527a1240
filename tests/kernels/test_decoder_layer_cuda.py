"""The decoder layer on CUDA: on a device, interpreted on the CPU, and compiled ahead of time.

Triton reads TRITON_INTERPRET when it is first imported, so the interpreted cases run in a process of their own, which
`test_layer_under_the_interpreter` starts with this file.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from omnigrpo.model import qwen2
from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Qwen2Decoder
from omnigrpo_kernels import decoder_layer_cuda as module
from omnigrpo_kernels import shared_prefix_attention_cuda as attention
from omnigrpo_kernels import triton_launch
from omnigrpo_kernels.rms_norm import rms_norm_reference
from omnigrpo_kernels.rope import rotate_reference
from omnigrpo_kernels.shared_prefix_attention_cuda import AttentionPlan, Blocks, Tiling
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout
from omnigrpo_kernels.swiglu import swiglu_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = Blocks(rows=16, step=16, num_warps=4, num_stages=1)
EPS = 1e-6

compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves no kernel to compile")
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])

CONFIG = DecoderConfig(
    vocab_size=7,
    width=24,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    ffn_width=40,
    rope_theta=1e4,
    rms_norm_eps=EPS,
    max_positions=128,
)
LAYOUT = SharedPrefixLayout(prefix_lengths=(9, 1), completion_lengths=((4, 0, 7), (1, 5)))


@pytest.fixture(
    params=[pytest.param("cpu", id="interpreted")]
    if INTERPRETED
    else [pytest.param("cuda", marks=pytest.mark.gpu)]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where the kernels run; the interpreter is slow, so there tiles are small."""
    if INTERPRETED:
        for name in ("NARROW_HEADS", "WIDE_HEADS", "FLOAT32"):
            monkeypatch.setattr(attention, name, Tiling(forward=SMALL, queries=SMALL, keys=SMALL))
        monkeypatch.setattr(qwen2, "_fuses", lambda rows_TD: rows_TD.dtype != torch.float64)
    attention.attention_plan.cache_clear()
    with torch.device(request.param):
        yield request.param
    attention.attention_plan.cache_clear()


def plan_of(
    num_rows: int, dtype: torch.dtype, device: str, heads: tuple[int, int] = (3, 1), width: int = 8
) -> AttentionPlan:
    layout = SharedPrefixLayout(prefix_lengths=(num_rows,), completion_lengths=((),))
    return AttentionPlan(layout, torch.device(device), dtype, *heads, width)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device=torch.get_default_device()).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def assert_no_worse(ours: list[Tensor], plain: list[Tensor], exact: list[Tensor]) -> None:
    """At most twice the error of plain PyTorch in the same dtype."""
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert mine.shape == true.shape
        assert mine.dtype == theirs.dtype
        error, allowed = (mine.double() - true).norm(), (theirs.double() - true).norm()
        times = 8 if INTERPRETED and mine.dtype == torch.bfloat16 else 2  # the interpreter truncates
        assert error <= times * allowed + true.norm() * 3e-7


def parameters_of(config: DecoderConfig, dtype: torch.dtype) -> Any:
    """Weights of a layer; only what a kernel reads matters here."""
    layer = qwen2.DecoderLayer(config).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(drawn(*parameter.shape, dtype=dtype))
    return qwen2._plain_parameters(layer, dtype)


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 7, 19])
@pytest.mark.parametrize("width", [24, 40])
def test_norm_and_its_gradients(device: str, dtype: torch.dtype, num_rows: int, width: int) -> None:
    rows, delta, grad, residual = (drawn(num_rows, width, seed, dtype=dtype)[..., 0] for seed in (1, 2, 3, 4))
    rows, delta, grad, residual = (x.contiguous() for x in (rows, delta, grad, residual))
    weight = drawn(width, dtype=dtype)

    def reference(wide: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wide).requires_grad_() for x in (rows, delta, weight)]
        total = leaves[0] + leaves[1]
        normal = rms_norm_reference(total, leaves[2], EPS)
        loss = (normal * grad.to(wide)).sum() + (total * residual.to(wide)).sum()
        grad_x, _, grad_weight = torch.autograd.grad(loss, leaves)
        return [total.detach(), normal.detach(), grad_x, grad_weight]

    normal = torch.empty_like(rows)
    total, scale = module._add_and_norm(rows, delta.clone(), normal, weight, EPS)
    sums = module._RowSums(rows, 0)
    grad_x = grad.clone()
    again = sums.norm_gradient_(grad_x, total, scale, weight, residual, first=0)
    assert torch.equal(again, normal)
    sums.norm_gradient_(grad.clone(), total, scale, weight, residual, first=width)
    grad_weight = sums._partials[:, :width].sum(0)
    assert torch.equal(sums._partials[:, width:].sum(0), grad_weight)
    ours = [total, normal, grad_x, grad_weight.to(dtype)]
    assert_no_worse(ours, reference(dtype), reference(torch.float64))
    alone, _ = module._norm(total, weight, EPS)
    assert torch.equal(alone, normal)


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("width", [24, 1030])
def test_gate_and_its_gradients(device: str, dtype: torch.dtype, num_rows: int, width: int) -> None:
    gate_up, grad = drawn(num_rows, 2 * width, dtype=dtype), drawn(num_rows, width, dtype=dtype)

    def reference(wide: torch.dtype) -> list[Tensor]:
        leaf = gate_up.to(wide).requires_grad_()
        out = swiglu_reference(*leaf.split(width, dim=1))
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(wide))]

    out = module._gated(gate_up)
    again = grad.clone()
    grad_gate_up = module._gate_gradient_(again, gate_up)
    assert torch.equal(again, out)
    assert_no_worse([out, grad_gate_up], reference(dtype), reference(torch.float64))


@each_dtype
@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, width=96, num_heads=6, num_kv_heads=2)], ids=str)
def test_rotation_and_its_gradients(
    device: str, dtype: torch.dtype, num_rows: int, config: DecoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TURNED_PAIRS", 16)  # Several tiles of columns.
    parameters = parameters_of(config, dtype)
    heads = config.num_heads, config.num_kv_heads
    plan = plan_of(num_rows, dtype, device, heads, config.head_width)
    rotation = qwen2.rotary_angles(torch.arange(num_rows) * 3, config, dtype)
    columns = (heads[0] + 2 * heads[1]) * config.head_width
    qkv, grad = drawn(num_rows, columns, dtype=dtype), drawn(num_rows, columns + 1, dtype=dtype)[:, 1:]

    def reference(wide: torch.dtype) -> list[Tensor]:
        leaf = qkv.to(wide).requires_grad_()
        bias = torch.cat([parameters.q_bias, parameters.k_bias, parameters.v_bias]).to(wide).requires_grad_()
        cos, sin = (x.to(torch.promote_types(wide, torch.float32)) for x in rotation)
        rows = (leaf + bias).unflatten(1, (-1, config.head_width))
        turned = torch.cat(
            [rotate_reference(rows[:, : sum(heads)], cos, sin), rows[:, sum(heads) :]], dim=1
        ).flatten(1)
        return [turned.detach(), *torch.autograd.grad(turned, [leaf, bias], grad.to(wide))]

    turned, turned_back = qkv.clone(), grad.contiguous()
    module._turn_(turned, parameters, *rotation, plan)
    sums = module._RowSums(drawn(num_rows, config.width), columns)
    sums._partials.zero_()
    sums.turn_back_(turned_back, parameters, *rotation, plan)
    grad_bias = sums._partials[:, 2 * config.width :].sum(0).to(dtype)
    assert_no_worse([turned, turned_back, grad_bias], reference(dtype), reference(torch.float64))

    bare = parameters._replace(q_bias=None, k_bias=None, v_bias=None)
    unbiased = qkv.clone()
    module._turn_(unbiased, bare, *rotation, plan)
    zeros = parameters._replace(
        **{name: torch.zeros_like(getattr(parameters, name)) for name in ("q_bias", "k_bias", "v_bias")}
    )
    turned = qkv.clone()
    module._turn_(turned, zeros, *rotation, plan)
    assert torch.equal(unbiased, turned)


def decoder_of(config: DecoderConfig, dtype: torch.dtype) -> Qwen2Decoder:
    torch.manual_seed(0)
    decoder = Qwen2Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return decoder.to(dtype)


def positions_of(layout: SharedPrefixLayout) -> Tensor:
    parts = []
    for prefix, lengths in zip(layout.prefix_lengths, layout.completion_lengths, strict=True):
        parts += [torch.arange(prefix), *(torch.arange(prefix, prefix + length) for length in lengths)]
    return torch.cat(parts)


Pass = Callable[[Qwen2Decoder, Tensor], Tensor]


def forward(layout: SharedPrefixLayout) -> Pass:
    return lambda decoder, rows: decoder(rows, positions_of(layout), layout)


def prefill_and_extend(decoder: Qwen2Decoder, rows: Tensor) -> Tensor:
    """Hidden states of prefix and completions; the completions come in two parts."""
    prefix, lengths = 5, ((3, 1), (6,))
    layout = SharedPrefixLayout(prefix_lengths=(prefix,), completion_lengths=((),))
    states = decoder.prefill(rows[:prefix], torch.arange(prefix), layout)
    hidden, start = [states.hidden_TD], prefix
    for part in lengths:
        positions = torch.cat([torch.arange(prefix, prefix + length) for length in part])
        hidden.append(decoder.extend(states, rows[start : start + sum(part)], positions, part))
        start += sum(part)
    return torch.cat(hidden)


PASSES = {"forward": (forward(LAYOUT), LAYOUT.num_rows), "prefill and extend": (prefill_and_extend, 15)}
each_pass = pytest.mark.parametrize(("run", "num_rows"), PASSES.values(), ids=PASSES.keys())


def passed(decoder: Qwen2Decoder, run: Pass, rows: Tensor) -> list[Tensor]:
    """Hidden states, and gradients of the rows and of all trained parameters of the layers."""
    leaf = rows.requires_grad_()
    trained = [p for p in decoder.layers.parameters() if p.requires_grad]
    hidden = run(decoder, leaf)
    upstream = torch.arange(hidden.numel(), dtype=torch.float64).cos().view(hidden.shape).to(hidden.dtype)
    return [hidden.detach(), *torch.autograd.grad(hidden, [leaf, *trained], upstream)]


def assert_layers_no_worse(
    decoder: Qwen2Decoder, run: Pass, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the plain path in the same dtype, both against float64 on the CPU."""
    dtype = decoder.norm.weight.dtype
    rows = drawn(num_rows, decoder.config.width, dtype=dtype)
    ours = passed(decoder, run, rows.clone())
    with monkeypatch.context() as patch:
        patch.setattr(qwen2, "_fuses", lambda rows_TD: False)
        plain = passed(decoder, run, rows.clone())
        exact_decoder = Qwen2Decoder(decoder.config).double().cpu()
        exact_decoder.load_state_dict(decoder.state_dict())
        for exact, parameter in zip(exact_decoder.parameters(), decoder.parameters(), strict=True):
            exact.requires_grad_(parameter.requires_grad)
        with torch.device("cpu"):
            exact = passed(exact_decoder, run, rows.detach().cpu().double())
    assert_no_worse([x.cpu() for x in ours], [x.cpu() for x in plain], exact)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@each_pass
def test_layers(
    device: str, run: Pass, num_rows: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(CONFIG, torch.float32)
    decoder.checkpoint_activations = recompute
    assert_layers_no_worse(decoder, run, num_rows, monkeypatch)


@pytest.mark.parametrize(
    "frozen",
    [r"norm", r"bias", r"[qk]_proj|up_proj", r"v_proj\.weight|down|o_proj|q_proj\.bias", r"proj|norm"],
)
def test_frozen_parameters(device: str, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(CONFIG, torch.float32)
    for name, parameter in decoder.named_parameters():
        parameter.requires_grad_(re.search(frozen, name) is None)
    assert_layers_no_worse(decoder, forward(LAYOUT), LAYOUT.num_rows, monkeypatch)


def test_without_biases(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(CONFIG, torch.float32)
    for layer in decoder.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).bias = None
    rows = drawn(LAYOUT.num_rows, CONFIG.width)
    ours = passed(decoder, forward(LAYOUT), rows.clone())
    monkeypatch.setattr(qwen2, "_fuses", lambda rows_TD: False)
    for mine, theirs in zip(ours, passed(decoder, forward(LAYOUT), rows.clone()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_layers_accumulate_their_gradients_in_float32(device: str) -> None:
    decoder = decoder_of(CONFIG, torch.bfloat16)
    decoder.norm.requires_grad_(False)
    rows = drawn(LAYOUT.num_rows, CONFIG.width, dtype=torch.bfloat16)
    expected = passed(decoder, forward(LAYOUT), rows.clone())[2:]
    for parameter in decoder.layers.parameters():
        parameter.grad_dtype = torch.float32
    hidden = decoder(rows, positions_of(LAYOUT), LAYOUT)
    upstream = torch.arange(hidden.numel(), dtype=torch.float64).cos().view(hidden.shape)
    hidden.backward(upstream.bfloat16())
    for parameter, rounded in zip(decoder.layers.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad.bfloat16(), rounded, rtol=2**-7, atol=1e-2)
        assert not torch.equal(parameter.grad, parameter.grad.bfloat16().float())


@each_pass
def test_two_backward_passes_through_one_graph(device: str, run: Pass, num_rows: int) -> None:
    decoder = decoder_of(CONFIG, torch.float32)
    rows = drawn(num_rows, CONFIG.width).requires_grad_()
    loss = run(decoder, rows).square().sum()
    leaves = [rows, *decoder.layers.parameters()]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for mine, again in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(mine, again)


@torch.no_grad()
def test_states_without_a_graph_hold_no_queries(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(CONFIG, torch.float32)
    rows = drawn(LAYOUT.num_rows, CONFIG.width)
    states = decoder.prefill(rows, positions_of(LAYOUT), LAYOUT)
    monkeypatch.setattr(qwen2, "_fuses", lambda rows_TD: False)
    plain = decoder.prefill(rows, positions_of(LAYOUT), LAYOUT)
    for mine, theirs in zip((*states.keys, *states.values), (*plain.keys, *plain.values), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        assert mine.untyped_storage().nbytes() == mine.numel() * mine.element_size()


def test_gradients_of_states_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(CONFIG, torch.float32)
    rows = drawn(LAYOUT.num_rows, CONFIG.width).requires_grad_()
    results = []
    for fuses in (True, False):
        monkeypatch.setattr(qwen2, "_fuses", lambda rows_TD, fuses=fuses: fuses)
        states = decoder.prefill(rows, positions_of(LAYOUT), LAYOUT)
        loss = states.keys[-1].square().sum() + states.values[0].square().sum()
        weights = [p for name, p in decoder.named_parameters() if name.endswith("1.self_attn.k_proj.weight")]
        results.append(torch.autograd.grad(loss, [rows, *weights]))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_other_rows_than_the_layouts_are_refused(device: str) -> None:
    decoder = decoder_of(CONFIG, torch.float32)
    with pytest.raises(ValueError, match="got 5 rows and 5 with the prefix for a layout of 27 and 27"):
        decoder(drawn(5, CONFIG.width), torch.arange(5), LAYOUT)


class Wrapped(nn.Module):
    """A projection as peft wraps it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, rows: Tensor) -> Tensor:
        return 2 * self.base_layer(rows)


def _wrap(layer: qwen2.DecoderLayer) -> None:
    layer.self_attn.q_proj = Wrapped(layer.self_attn.q_proj)  # pyright: ignore[reportAttributeAccessIssue]


def _hook(layer: qwen2.DecoderLayer) -> None:
    layer.mlp.down_proj.register_forward_hook(lambda *_: None)


def _parametrize(layer: qwen2.DecoderLayer) -> None:
    nn.utils.parametrizations.weight_norm(layer.self_attn.o_proj)


def _replace_norm(layer: qwen2.DecoderLayer) -> None:
    layer.input_layernorm = nn.RMSNorm(CONFIG.width)  # pyright: ignore[reportAttributeAccessIssue]


def _add_bias(layer: qwen2.DecoderLayer) -> None:
    layer.mlp.up_proj = qwen2.Projection(CONFIG.width, CONFIG.ffn_width)


def _change_dtype(layer: qwen2.DecoderLayer) -> None:
    layer.post_attention_layernorm.double()


def _replace_forward(layer: qwen2.DecoderLayer) -> None:
    layer.mlp.forward = lambda rows_TD: rows_TD


CHANGES = (_wrap, _hook, _parametrize, _replace_norm, _add_bias, _change_dtype, _replace_forward)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_not_plain(change: Callable[[qwen2.DecoderLayer], None]) -> None:
    layer = qwen2.DecoderLayer(CONFIG)
    assert qwen2._plain_parameters(layer, torch.float32) is not None
    assert qwen2._plain_parameters(layer, torch.bfloat16) is None
    change(layer)
    assert qwen2._plain_parameters(layer, torch.float32) is None


class Count(TorchDispatchMode):
    """Counts operators that launch something."""

    FREE = (
        "view", "_unsafe_view", "split", "split_with_sizes", "slice", "t", "alias", "detach", "empty", "empty_like",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.operators[name] += 1
        return func(*args, **(kwargs or {}))


@compiled
def test_launches_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host pays for: none of it depends on the machine."""
    pytest.importorskip("triton")
    launches: Counter[str] = Counter()
    for each in (module, attention):
        monkeypatch.setattr(
            each, "launch", lambda kernel, *args, **kwargs: launches.update([kernel.__name__])
        )
    monkeypatch.setattr(qwen2, "_fuses", lambda rows_TD: True)
    decoder = decoder_of(CONFIG, torch.float32)
    layer, rotation = decoder.layers[0], qwen2.rotary_angles(positions_of(LAYOUT), CONFIG, torch.float32)
    rows = drawn(LAYOUT.num_rows, CONFIG.width).requires_grad_()
    attend = qwen2.PackedAttend(layout=LAYOUT)
    layer(rows, rotation, attend).sum().backward()
    launches.clear()
    layer.zero_grad()
    rows.grad = None
    with Count() as count:
        out = layer(rows, rotation, attend)
    assert launches == Counter(norm_rows=2, turn_heads=1, attend_tiles=1, gate_rows=1)
    assert count.operators == Counter(mm=6, addmm=1)
    launches.clear()
    grad = torch.ones_like(out)
    with Count() as count:
        out.backward(grad)
    assert launches == Counter(
        gate_gradient_rows=1, norm_gradient_rows=2, query_gradient_tiles=1, key_gradient_tiles=1, turn_heads=1
    )
    assert count.operators == Counter(mm=8, addmm_=3, sum=1)


@compiled
def test_a_launch_uses_what_was_compiled_for_arguments_like_these(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "_compiled", {})
    ran: list[str] = []

    class Binary:
        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *args: ran.append(f"kept {grid[0]} {args[3:]}")

    class Kernel:
        arg_names = ("rows", "number", "factor", "FIRST", "SECOND")

        def __getitem__(self, grid: tuple[int]) -> Callable[..., Binary]:
            return lambda *args, **options: ran.append(f"compiled {grid[0]}") or Binary()

    kernel, rows = Kernel(), torch.zeros(33)
    assert rows.data_ptr() % 16 == 0

    def launched(*args: Any, second: int = 8, num_warps: int = 4) -> str:
        triton_launch.launch(kernel, 5, *args, SECOND=second, FIRST=7, num_warps=num_warps)
        return ran.pop()

    assert launched(rows, 32, 0.5) == "compiled 5"
    for same in ((rows[4:], 32, 0.5), (rows, 48, 0.25)):
        assert launched(*same) == "kept 5 (7, 8)"
    others = (
        (rows[1:], 32, 0.5),
        (rows.double(), 32, 0.5),
        (rows, 1, 0.5),
        (rows, 33, 0.5),
        (rows, 2**32, 0.5),
    )
    for other in others:
        assert launched(*other) == "compiled 5"
        assert launched(*other) == "kept 5 (7, 8)"
    assert launched(rows, 32, 0.5, second=16) == "compiled 5"
    assert launched(rows, 32, 0.5, num_warps=8) == "compiled 5"


@compiled
@pytest.mark.slow
def test_layer_under_the_interpreter() -> None:
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


SIZES = {
    "0.5B": replace(CONFIG, width=896, num_heads=14, num_kv_heads=2, ffn_width=4864),
    "7B": replace(CONFIG, width=3584, num_heads=28, num_kv_heads=4, ffn_width=18944),
}


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())
def test_every_kernel_compiles_for_sm_90(
    ahead_of_time: ModuleType,
    dtype: torch.dtype,
    config: DecoderConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = ahead_of_time.AheadOfTime(monkeypatch, tmp_path, 90, {"num_rows", "rows_per_program"})
    heads, num_rows = (config.num_heads, config.num_kv_heads), 8
    columns = (heads[0] + 2 * heads[1]) * config.head_width
    plan = plan_of(num_rows, dtype, "cpu", heads, config.head_width)
    rotation = qwen2.rotary_angles(torch.arange(num_rows), config, dtype)
    rows, qkv = torch.zeros(num_rows, config.width, dtype=dtype), torch.zeros(num_rows, columns, dtype=dtype)
    gate_up = torch.zeros(num_rows, 2 * config.ffn_width, dtype=dtype)
    bias = torch.zeros(columns, dtype=dtype)
    biased = module.LayerParameters(*[bias] * 12)
    sums = module._RowSums(rows, columns)

    _, scale = module._norm(rows, rows[0], EPS)
    module._add_and_norm(rows, rows, rows, rows[0], EPS)
    sums.norm_gradient_(rows, rows, scale, rows[0], rows, first=config.width)
    module._gate_gradient_(module._gated(gate_up), gate_up)
    for parameters in (biased, biased._replace(q_bias=None)):
        module._turn_(qkv, parameters, *rotation, plan)
        sums.turn_back_(qkv, parameters, *rotation, plan)

    built = {name: len(binaries) for name, binaries in ahead.binaries.items()}
    once = ("norm_gradient_rows", "gate_rows", "gate_gradient_rows")
    assert built == {"norm_rows": 2, "turn_heads": 4} | dict.fromkeys(once, 1)
    for binary in (binary for binaries in ahead.binaries.values() for binary in binaries):
        assert ".target sm_90" in binary.asm["ptx"]
        assert "atom" not in binary.asm["ptx"]
        registers, stack = ahead_of_time.used_resources(binary, tmp_path)
        assert registers <= 128
        assert stack == 0


LARGE = replace(SIZES["0.5B"], ffn_width=1216)
LARGE_LAYOUT = SharedPrefixLayout(prefix_lengths=(700, 64), completion_lengths=((200, 131, 1, 0), (300, 90)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("config", [LARGE, replace(LARGE, num_heads=7, num_kv_heads=1)], ids=["64", "128"])
def test_layers_on_the_device(
    dtype: torch.dtype, config: DecoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.device("cuda"):
        decoder = decoder_of(config, dtype)
        with torch.no_grad():
            for parameter in decoder.layers.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(0.1)
        assert_layers_no_worse(decoder, forward(LARGE_LAYOUT), LARGE_LAYOUT.num_rows, monkeypatch)


@pytest.mark.gpu
@each_dtype
@each_pass
def test_runs_on_the_device_are_bitwise_equal(dtype: torch.dtype, run: Pass, num_rows: int) -> None:
    with torch.device("cuda"):
        decoder = decoder_of(LARGE, dtype)
        if run is not prefill_and_extend:
            run, num_rows = forward(LARGE_LAYOUT), LARGE_LAYOUT.num_rows
        rows = drawn(num_rows, LARGE.width, dtype=dtype)
        first, second = (passed(decoder, run, rows.clone()) for _ in range(2))
        for mine, again in zip(first, second, strict=True):
            assert torch.equal(mine, again)


@pytest.mark.gpu
def test_a_wrapped_projection_takes_the_plain_path_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    fused = qwen2.decoder_layer
    monkeypatch.setattr(qwen2, "decoder_layer", lambda *args: taken.append(1) or fused(*args))
    with torch.device("cuda"):
        decoder = decoder_of(CONFIG, torch.bfloat16)
        rows = drawn(LAYOUT.num_rows, CONFIG.width, dtype=torch.bfloat16)
        _wrap(decoder.layers[0])  # pyright: ignore[reportArgumentType]
        passed(decoder, forward(LAYOUT), rows)
    assert len(taken) == CONFIG.num_layers - 1
