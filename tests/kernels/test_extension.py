"""The compiled extension: that its ops run, on every instruction set of this CPU, and what happens without it."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omnigrpo_kernels import extension, liger
from omnigrpo_kernels.extension import DECODE_OPS, HEAD_OPS, KernelStatus, kernel_status
from omnigrpo_kernels.grpo_head import grpo_head
from omnigrpo_kernels.grpo_objective import ObjectiveConfig, TokenBatch
from omnigrpo_kernels.linear_logprob import linear_logprob, linear_logprob_reference

ISAS = ["amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline"]
"""From the widest on."""


class OpRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def compiled() -> Iterator[ModuleType]:
    """The extension; afterwards the instruction set is what it was."""
    module = extension.load()
    before = module.cpu_isa()
    yield module
    module.use_cpu_isa(before)


def available_isas(compiled: ModuleType) -> list[str]:
    found = []
    for isa in ISAS:
        try:
            compiled.use_cpu_isa(isa)
        except ValueError:
            continue
        found.append(isa)
    return found


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def ran_compiled_ops(recorder: OpRecorder) -> bool:
    assert "aten._log_softmax.default" not in recorder.names
    return {"omnigrpo.head_exps.default", "omnigrpo.head_gradients.default"} <= set(recorder.names)


def test_linear_logprob_runs_the_compiled_ops() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    with OpRecorder() as recorder:
        linear_logprob(hidden, torch.randn(5, 4), torch.tensor([0, 1, 4])).logprob_T.sum().backward()
    assert ran_compiled_ops(recorder)


def test_grpo_head_runs_the_compiled_ops() -> None:
    hidden, ones = torch.randn(3, 4, requires_grad=True), torch.ones(3)
    batch = TokenBatch(advantage_C=ones, weight_C=ones, sequence_C=ones.long())
    with OpRecorder() as recorder:
        grpo_head(
            hidden, torch.randn(5, 4), torch.tensor([0, 1, 4]), batch, ObjectiveConfig(kl_coefficient=0.0)
        )
    assert ran_compiled_ops(recorder)


def test_extension_is_one_abi3_file_and_registers_cpu_kernels() -> None:
    assert str(extension.load().__file__).endswith("_C.abi3.so")
    for op in ("omnigrpo::head_exps", "omnigrpo::head_gradients"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")


def test_unknown_instruction_set_is_refused(compiled: ModuleType) -> None:
    before = compiled.cpu_isa()
    with pytest.raises(ValueError, match=f"no 'sse9'; the active one is '{before}'"):
        compiled.use_cpu_isa("sse9")
    assert compiled.cpu_isa() == before


def test_widest_instruction_set_is_the_default(compiled: ModuleType) -> None:
    available = available_isas(compiled)
    assert available[-1] == "baseline"
    result = run_python("from omnigrpo_kernels import extension; print(extension.load().cpu_isa())")
    assert result.stdout.strip() == available[0]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="needs /proc/cpuinfo of x86"
)
def test_instruction_sets_are_those_of_the_cpu(compiled: ModuleType) -> None:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"} <= flags
    bf16 = wide and "avx512_bf16" in flags
    amx = bf16 and {"amx_tile", "amx_bf16"} <= flags
    expected = ["amx_bf16"] * amx + ["avx512_bf16"] * bf16 + ["avx512"] * wide
    assert available_isas(compiled) == [*expected, *["avx2"] * ({"avx2", "fma"} <= flags), "baseline"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_instruction_sets_agree(compiled: ModuleType, dtype: torch.dtype) -> None:
    """They sum in different orders, and differ by rounding."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(37, 65, generator=generator) / 3).to(dtype).requires_grad_()
    weight = torch.randn(1031, 65, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(1031, (37,), generator=generator)
    exact = linear_logprob_reference(hidden.detach().double(), weight.detach().double(), targets)
    results: list[tuple[Tensor, ...]] = []
    for isa in available_isas(compiled):
        compiled.use_cpu_isa(isa)
        assert compiled.cpu_isa() == isa
        result = linear_logprob(hidden, weight, targets)
        loss = result.logprob_T.sum() + result.entropy_T.sum()
        results.append((result.logprob_T.detach(), *torch.autograd.grad(loss, (hidden, weight))))
        tolerance = 1e-12 if dtype == torch.float64 else 5e-6
        torch.testing.assert_close(result.logprob_T.double(), exact.logprob_T, rtol=0, atol=tolerance)
    bound = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-7}[dtype]
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert (actual.double() - expected.double()).norm() <= bound * expected.double().norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("column", [3, 200, 299])
def test_broken_weights_never_give_a_number(compiled: ModuleType, dtype: torch.dtype, column: int) -> None:
    """NaN and infinity among the logits reach the results; -infinity is a mask."""
    weight = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    for isa in available_isas(compiled):
        compiled.use_cpu_isa(isa)
        for value in (torch.nan, torch.inf, -torch.inf):
            broken = weight.clone()
            broken[column] = value
            result = linear_logprob(torch.ones(1, 1, dtype=dtype), broken, torch.tensor([7]))
            if value == -torch.inf:
                kept = torch.arange(300) != column
                exact = broken.double().squeeze(1)[kept].logsumexp(0)
                torch.testing.assert_close(result.lse_T[0].double(), exact, rtol=1e-6, atol=0)
            else:
                assert not result.logprob_T.isfinite()
                assert not result.entropy_T.isfinite()
                assert not result.lse_T.isfinite()
            at_target = linear_logprob(torch.ones(1, 1, dtype=dtype), broken, torch.tensor([column]))
            assert not at_target.logprob_T.isfinite()


def test_status_names_each_op_and_why_a_kernel_is_not_active() -> None:
    statuses = kernel_status()
    named = [(status.op, status.device) for status in statuses]
    assert len(set(named)) == len(named)
    ops = (*HEAD_OPS, "shared_prefix_attention", "rms_norm", "rope", "swiglu")
    on_both = {(op, device) for op in ops for device in ("cpu", "cuda")}
    on_cpu = {(op, "cpu") for op in (*DECODE_OPS, "yuv420_to_rgb")}
    assert set(named) == on_both | on_cpu | {("decoder_layer", "cuda"), ("decode_attention", "cuda")}
    assert {"linear_logprob", "grpo_head"} <= set(HEAD_OPS)
    assert all((status.reason is None) == status.active for status in statuses)
    for op in HEAD_OPS:
        assert (
            KernelStatus(
                op=op,
                device="cpu",
                implementation=f"C++ ({extension.load().cpu_isa()})",
                active=True,
                reason=None,
            )
            in statuses
        )


def test_status_of_shared_prefix_attention() -> None:
    cpu, cuda = (status for status in kernel_status() if status.op == "shared_prefix_attention")
    assert (cpu.device, cpu.active) == ("cpu", True)
    head_reasons = {s.reason for s in kernel_status() if s.device == "cuda" and s.op in HEAD_OPS}
    assert (cuda.device, cuda.active, {cuda.reason}) == (
        "cuda",
        cuda.implementation == "Triton",
        head_reasons,
    )


def test_status_follows_the_instruction_set(compiled: ModuleType) -> None:
    compiled.use_cpu_isa("baseline")
    assert kernel_status()[0].implementation == "C++ (baseline)"


def test_status_of_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = [status.reason for status in kernel_status() if status.device == "cuda"]
    assert all(reason is not None for reason in reasons)
    assert any(
        "no CUDA device" in str(reason) or "triton is not installed" in str(reason) for reason in reasons
    )


@pytest.mark.parametrize("installed", [True, False])
def test_status_says_whether_liger_kernel_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(liger, "is_installed", lambda: installed)
    (status,) = (s for s in kernel_status() if (s.op, s.device) == ("rms_norm", "cuda"))
    assert status.implementation == ("liger-kernel" if installed else "PyTorch")
    assert ("pip install liger-kernel" in str(status.reason)) is not installed


def test_without_the_extension_the_op_says_how_to_build_it() -> None:
    hide = "import sys; sys.modules['omnigrpo_kernels._C'] = None; "
    for module in ("linear_logprob", "grpo_head"):
        result = run_python(f"{hide}import omnigrpo_kernels.{module}")
        assert result.returncode == 1
        assert "omnigrpo_kernels._C is not built: run `make setup`" in result.stderr
    result = run_python(
        hide + "from omnigrpo_kernels.extension import kernel_status; print(kernel_status()[0])"
    )
    assert result.returncode == 0, result.stderr
    assert "active=False" in result.stdout
    assert "is not built" in result.stdout


def test_kernels_import_neither_the_engine_nor_transformers() -> None:
    result = run_python(
        "import sys, omnigrpo_kernels.linear_logprob, omnigrpo_kernels.grpo_head; "
        "import omnigrpo_kernels.shared_prefix_attention; "
        "names = {name.partition('.')[0] for name in sys.modules}; "
        "print(sorted(names & {'omnigrpo', 'transformers', 'tokenizers'}))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
