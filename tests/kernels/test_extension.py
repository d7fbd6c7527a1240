"""The compiled extension: that its ops run, on every instruction set of this CPU, and what happens without it."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omnigrpo_kernels import extension
from omnigrpo_kernels import linear_logprob as linear_logprob_module
from omnigrpo_kernels.extension import KernelStatus, kernel_status
from omnigrpo_kernels.linear_logprob import linear_logprob

ISAS = ["avx512", "avx2", "baseline"]
STATS_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


class OpRecorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=ISAS)
def compiled(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The extension with one of its instruction sets active."""
    module = extension.load()
    before = module.cpu_isa()
    try:
        module.use_cpu_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield module
    module.use_cpu_isa(before)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def exact_stats(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    z = logits.double() / temperature
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp.clamp_min(-1e300)).sum(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), entropy, z.logsumexp(-1)


def exact_grads(logits: Tensor, targets: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    leaf = logits.double().requires_grad_()
    stats = exact_stats(leaf, targets, temperature)
    return torch.autograd.grad(stats, leaf, list(upstream.double()))[0]


def test_linear_logprob_runs_the_compiled_ops() -> None:
    hidden = torch.randn(3, 4, requires_grad=True)
    with OpRecorder() as recorder:
        linear_logprob(hidden, torch.randn(5, 4), torch.tensor([0, 1, 4])).logprob_T.sum().backward()
    assert "omnigrpo.logit_row_stats.default" in recorder.names
    assert "omnigrpo.logit_row_grads_.default" in recorder.names
    assert "aten._log_softmax.default" not in recorder.names


def test_extension_is_one_abi3_file_and_registers_cpu_kernels() -> None:
    assert str(extension.load().__file__).endswith("_C.abi3.so")
    for op in ("omnigrpo::logit_row_stats", "omnigrpo::logit_row_grads_"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU")


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no 'sse9'"):
        extension.load().use_cpu_isa("sse9")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 17, 1023, 1024, 1025, 5003])
def test_stats_and_grads_on_every_instruction_set(
    compiled: ModuleType, dtype: torch.dtype, vocabulary: int
) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = (torch.randn(9, vocabulary, generator=generator) * 6).to(dtype)
    targets = torch.randint(vocabulary, (9,), generator=generator)
    stat_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = torch.randn(3, 9, generator=generator).to(stat_dtype)
    stats = torch.ops.omnigrpo.logit_row_stats(logits, targets, 0.7)
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    for actual, exact in zip(stats, exact_stats(logits, targets, 0.7), strict=True):
        assert actual.dtype == stat_dtype
        torch.testing.assert_close(actual.double(), exact, rtol=tolerance, atol=tolerance)
    grads = logits.clone()
    torch.ops.omnigrpo.logit_row_grads_(grads, targets, *stats, *upstream, 0.7)
    tolerance = 2**-8 if dtype == torch.bfloat16 else tolerance * 10
    exact = exact_grads(logits, targets, upstream, 0.7)
    torch.testing.assert_close(
        grads.double(), exact, rtol=tolerance, atol=1e-13 if dtype == torch.float64 else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torch_ops_for_other_devices_agree_with_the_compiled_ones(dtype: torch.dtype) -> None:
    logits = (torch.randn(7, 300) * 4).to(dtype)
    logits[2, 10:200] = -torch.inf
    targets = torch.tensor([0, 299, 5, 100, 200, 7, 7])
    stats = torch.ops.omnigrpo.logit_row_stats(logits, targets, 0.7)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(
        linear_logprob_module._logit_row_stats_torch(logits, targets, 0.7), stats, rtol=0, atol=tolerance
    )
    upstream = [torch.randn_like(stats[0]) for _ in range(3)]
    compiled, plain = logits.clone(), logits.clone()
    plain_grads_: Callable[..., None] = linear_logprob_module._logit_row_grads_torch_
    torch.ops.omnigrpo.logit_row_grads_(compiled, targets, *stats, *upstream, 0.7)
    plain_grads_(plain, targets, *stats, *upstream, 0.7)
    tolerance = 2**-7 if dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(plain, compiled, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_masked_and_broken_logits(compiled: ModuleType, dtype: torch.dtype) -> None:
    logits = torch.randn(6, 2000).to(dtype)
    logits[0, :1024] = -torch.inf  # a whole block masked, target elsewhere
    logits[1, 5] = -torch.inf  # the target masked
    logits[2, 1500] = torch.nan
    logits[3] = -torch.inf
    logits[4, 1990] = torch.inf
    targets = torch.tensor([1999, 5, 7, 0, 3, 9])
    logprob, entropy, lse = torch.ops.omnigrpo.logit_row_stats(logits, targets, 1.0)
    exact = exact_stats(logits, targets, 1.0)
    for actual, expected in zip((logprob, entropy, lse), exact, strict=True):
        torch.testing.assert_close(actual[[0, 1, 5]].double(), expected[[0, 1, 5]], rtol=2e-6, atol=2e-6)
    assert logprob[1] == -torch.inf
    assert logprob[2:5].isnan().all()
    assert entropy[2:5].isnan().all()
    assert lse[3] == -torch.inf
    ones = torch.ones_like(logprob)
    torch.ops.omnigrpo.logit_row_grads_(logits, targets, logprob, entropy, lse, ones, 0 * ones, 0 * ones, 1.0)
    assert torch.equal(logits[0, :1024], torch.zeros(1024, dtype=dtype))
    assert logits[1, 5] == 1
    assert logits[[0, 1, 5]].isfinite().all()
    assert logits[2].isnan().all()


def test_row_without_upstream_gradient_gets_exact_zeros(compiled: ModuleType) -> None:
    logits = torch.randn(2, 40)
    logits[0, 0] = torch.nan
    targets = torch.tensor([1, 2])
    stats = torch.ops.omnigrpo.logit_row_stats(logits, targets, 1.0)
    upstream = torch.tensor([0.0, 1.0])
    torch.ops.omnigrpo.logit_row_grads_(logits, targets, *stats, upstream, 0 * upstream, 0 * upstream, 1.0)
    assert torch.equal(logits[0], torch.zeros(40))
    assert logits[1].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, targets = torch.randn(3, 20).to(dtype), torch.tensor([0, 19, 4])
    torch.library.opcheck(
        torch.ops.omnigrpo.logit_row_stats.default, (logits, targets, 1.5), test_utils=STATS_CHECKS
    )
    stats = torch.ops.omnigrpo.logit_row_stats(logits, targets, 1.5)
    upstream = tuple(torch.randn_like(stat) for stat in stats)
    torch.library.opcheck(
        torch.ops.omnigrpo.logit_row_grads_.default,
        (logits, targets, *stats, *upstream, 1.5),
        test_utils=STATS_CHECKS,
    )


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (
            torch.zeros(2, 3, dtype=torch.float16),
            torch.tensor([0, 0]),
            "must be float32, float64 or bfloat16",
        ),
        (torch.zeros(3, 2).T, torch.tensor([0, 0]), "logits must be contiguous"),
        (torch.zeros(2, 3), torch.tensor([0]), "targets must be contiguous int64"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"targets\[1\] is 3"),
    ],
)
def test_op_refuses_what_it_cannot_read(logits: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.omnigrpo.logit_row_stats(logits, targets, 1.0)


def test_status_names_each_op_and_why_a_kernel_is_not_active() -> None:
    statuses = kernel_status()
    assert {(status.op, status.device) for status in statuses} == {
        (op, device) for op in ("linear_logprob", "shared_prefix_attention") for device in ("cpu", "cuda")
    }
    assert all((status.reason is None) == status.active for status in statuses)
    assert statuses[0] == KernelStatus(
        op="linear_logprob",
        device="cpu",
        implementation=f"C++ ({extension.load().cpu_isa()})",
        active=True,
        reason=None,
    )


def test_without_the_extension_the_op_says_how_to_build_it() -> None:
    hide = "import sys; sys.modules['omnigrpo_kernels._C'] = None; "
    result = run_python(hide + "import omnigrpo_kernels.linear_logprob")
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
        "import sys, omnigrpo_kernels.linear_logprob, omnigrpo_kernels.shared_prefix_attention; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'omnigrpo', 'transformers', 'tokenizers'}))"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
