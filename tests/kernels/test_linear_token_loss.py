import json
import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from omnigrpo_kernels import chunking
from omnigrpo_kernels.linear_logprob import linear_logprob_reference
from omnigrpo_kernels.linear_token_loss import TokenLoss, TokenLossResult, linear_token_loss

each_low_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
each_layout = pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """The ops are small: on a busy machine a second thread costs more than it gives. tests/conftest.py restores it."""
    torch.set_num_threads(1)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random_head(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64, spread: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocabulary)
    hidden_RD = torch.randn(rows, width, dtype=torch.float64, generator=generator) * spread / math.sqrt(width)
    weight_VD = torch.randn(vocabulary, width, dtype=torch.float64, generator=generator)
    targets_C = torch.randint(vocabulary, (rows,), generator=generator)
    return hidden_RD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_C


def shared_rows(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Rows and targets of twice as many tokens: row 0 predicts half of them, one target twice; the last row none."""
    generator = torch.Generator().manual_seed(vocabulary)
    rows_C = torch.cat([torch.zeros(rows, dtype=torch.int64), torch.randperm(rows, generator=generator)])
    rows_C = rows_C.where(rows_C != rows - 1, 0)[torch.randperm(2 * rows, generator=generator)]
    targets_C = torch.randint(vocabulary, (2 * rows,), generator=generator)
    first, second = (rows_C == 0).nonzero().squeeze(1)[:2].tolist()
    targets_C[second] = targets_C[first]
    return rows_C, targets_C


def smooth_loss(num_tokens: int) -> TokenLoss:
    """Different for every token, curved in the log-prob and the entropy, and with a product of both."""
    weight_C, entropy_weight_C = torch.randn(
        2, num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )

    def token_loss(tokens: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        weight, entropy_weight = weight_C[tokens].to(logprob_C), entropy_weight_C[tokens].to(logprob_C)
        curved = weight * (logprob_C + 0.1 * logprob_C.square() + logprob_C.exp())
        return (curved + entropy_weight * (entropy_C - 0.05 * entropy_C * logprob_C)).sum()

    return token_loss


def reference_loss(
    hidden_RD: Tensor, weight_VD: Tensor, targets_C: Tensor, token_loss: TokenLoss, **given: Any
) -> Tensor:
    dense = linear_logprob_reference(hidden_RD, weight_VD, targets_C, **given)
    return token_loss(slice(0, len(targets_C)), dense.logprob_T, dense.entropy_T)


def rows_per_chunk(monkeypatch: pytest.MonkeyPatch, rows: int, weight_VD: Tensor) -> None:
    budget = rows * weight_VD.shape[0] * weight_VD.element_size()
    monkeypatch.setattr(chunking, "CHUNK_BYTES", {"cpu": budget})


def surprisal(_: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
    return -logprob_C.sum()


class HeadCalls(TorchDispatchMode):
    """Arguments of every call of the low-level ops."""

    def __init__(self) -> None:
        super().__init__()
        self.exps: list[tuple[Any, ...]] = []
        self.gradients: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.omnigrpo.head_exps.default:
            self.exps.append(args)
        if func is torch.ops.omnigrpo.head_gradients.default:
            self.gradients.append(args)
        return func(*args, **(kwargs or {}))


class OnePass(torch.autograd.Function):
    """The op's loss and gradients, handed out as often as gradcheck asks."""

    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, compute: Callable[..., TokenLossResult]
    ) -> Tensor:
        leaves = hidden_RD.detach().requires_grad_(), weight_VD.detach().requires_grad_()
        with torch.enable_grad():
            loss = compute(*leaves).loss
        ctx.grads = torch.autograd.grad(loss, leaves)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_hidden_RD, grad_weight_VD = ctx.grads
        return upstream * grad_hidden_RD, upstream * grad_weight_VD, None


@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
@each_layout
def test_gradcheck(chunk_rows: int, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight_VD, targets_C = random_head(5, 4, 19)
    rows_C = None
    if shared:
        rows_C, targets_C = shared_rows(5, 19)
    rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
    token_loss = smooth_loss(len(targets_C))

    def compute(hidden_RD: Tensor, weight_VD: Tensor) -> TokenLossResult:
        return linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss, rows_C=rows_C, temperature=0.8)

    assert torch.autograd.gradcheck(lambda *head: OnePass.apply(*head, compute), (hidden_RD, weight_VD))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_rows", [4, 100], ids=["chunks", "one chunk"])
@each_layout
def test_float64_equals_the_reference(
    temperature: float, chunk_rows: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_RD, weight_VD, targets_C = random_head(13, 11, 1031)
    rows_C = None
    if shared:
        rows_C, targets_C = shared_rows(13, 1031)
    rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
    given: dict[str, Any] = {"rows_C": rows_C, "temperature": temperature}
    token_loss = smooth_loss(len(targets_C))
    ours = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss, **given)
    dense = linear_logprob_reference(hidden_RD, weight_VD, targets_C, **given)
    expected = reference_loss(hidden_RD, weight_VD, targets_C, token_loss, **given)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.logprob_C, dense.logprob_T.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.entropy_C, dense.entropy_T.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, (hidden_RD, weight_VD)),
        torch.autograd.grad(expected, (hidden_RD, weight_VD)),
        rtol=1e-11,
        atol=1e-11,
    )


def logprob_loss(num_tokens: int) -> TokenLoss:
    """A different coefficient for every token, no entropy."""
    weight_C = torch.randn(num_tokens, generator=torch.Generator().manual_seed(6))
    return lambda tokens, logprob_C, _: (weight_C[tokens].to(logprob_C) * logprob_C).sum()


def gradient_errors(
    head: tuple[Tensor, Tensor, Tensor], token_loss: TokenLoss, rows_C: Tensor | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Errors of the op and of the same-dtype reference, and the exact gradient: of hidden, of weight.

    The weight keeps a float32 gradient in both, so that no last rounding covers a larger error.
    """
    hidden_RD, weight_VD, targets_C = head
    weight_VD.grad_dtype = torch.float32
    given: dict[str, Any] = {"rows_C": rows_C, "temperature": 0.9}

    def gradients(loss: Tensor, hidden_RD: Tensor, weight_VD: Tensor) -> list[Tensor]:
        hidden_RD.grad = weight_VD.grad = None
        loss.backward()
        assert hidden_RD.grad is not None
        assert weight_VD.grad is not None
        return [hidden_RD.grad, weight_VD.grad]

    leaves = hidden_RD, weight_VD
    ours = gradients(linear_token_loss(*head, token_loss, **given).loss, *leaves)
    assert [grad.dtype for grad in ours] == [hidden_RD.dtype, torch.float32]
    peers = gradients(reference_loss(*head, token_loss, **given), *leaves)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = gradients(reference_loss(doubles[0], doubles[1], targets_C, token_loss, **given), *doubles)
    return [
        (actual.double() - truth, peer.double() - truth, truth)
        for actual, peer, truth in zip(ours, peers, exact, strict=True)
    ]


each_size = pytest.mark.parametrize("size", [(17, 48, 1531), (33, 896, 1031)], ids=["narrow", "wide"])
each_spread = pytest.mark.parametrize("spread", [2.0, 6.0], ids=["mild", "peaked"])


@each_low_dtype
@pytest.mark.parametrize("chunk_rows", [5, 100], ids=["chunks", "one chunk"])
@each_size
@each_spread
@each_layout
def test_low_precision_is_as_close_as_the_reference(
    dtype: torch.dtype,
    chunk_rows: int,
    size: tuple[int, int, int],
    spread: float,
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = random_head(*size, dtype, spread=spread)
    rows_per_chunk(monkeypatch, chunk_rows, head[1])
    rows_C = None
    if shared:
        rows_C, targets_C = shared_rows(size[0], size[2])
        head = (*head[:2], targets_C)
    for error, peer_error, truth in gradient_errors(head, logprob_loss(len(head[2])), rows_C):
        assert error.norm() <= 2 * peer_error.norm()
        assert error.abs().max() <= 2 * peer_error.abs().max() + 1e-7 * truth.abs().max()


@each_low_dtype
@each_size
@each_spread
@each_layout
def test_entropy_in_low_precision(
    dtype: torch.dtype, size: tuple[int, int, int], spread: float, shared: bool
) -> None:
    """Entropy and log-prob weigh alike. Where the target is tens of nats below the maximum, float32 loses a digit."""
    head = random_head(*size, dtype, spread=spread)
    rows_C = None
    if shared:
        rows_C, targets_C = shared_rows(size[0], size[2])
        head = (*head[:2], targets_C)
    for error, peer_error, truth in gradient_errors(head, smooth_loss(len(head[2])), rows_C):
        if dtype == torch.float32 and spread > 2:
            assert error.norm() <= 5e-6 * truth.norm()
        else:
            assert error.norm() <= 2 * peer_error.norm()
            assert error.abs().max() <= 2 * peer_error.abs().max() + 5e-7 * truth.abs().max()


@each_low_dtype
def test_chunks_change_no_bit_of_a_logprob_and_only_round_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_RD, weight_VD, targets_C = random_head(70, 33, 1031, dtype)
    token_loss = smooth_loss(70)
    results = []
    for chunk_rows in (70, 33, 5, 1):
        rows_per_chunk(monkeypatch, chunk_rows, weight_VD)
        with HeadCalls() as calls:
            result = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss)
        assert len(calls.exps) >= math.ceil(70 / chunk_rows)
        results.append((result, torch.autograd.grad(result.loss, (hidden_RD, weight_VD))))
    (whole, grads), *chunked = results
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for result, chunked_grads in chunked:
        assert torch.equal(result.logprob_C, whole.logprob_C)
        assert torch.equal(result.entropy_C, whole.entropy_C)
        torch.testing.assert_close(result.loss, whole.loss, rtol=1e-5, atol=1e-5)
        for actual, expected in zip(chunked_grads, grads, strict=True):
            torch.testing.assert_close(
                actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item()
            )


@each_low_dtype
def test_runs_and_thread_counts_give_the_same_bits(
    dtype: torch.dtype, restored_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_RD, weight_VD, _ = random_head(60, 33, 3001, dtype)
    rows_C, targets_C = shared_rows(60, 3001)
    rows_per_chunk(monkeypatch, 50, weight_VD)
    token_loss = smooth_loss(len(targets_C))
    runs = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        result = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss, rows_C=rows_C)
        grads = torch.autograd.grad(result.loss, (hidden_RD, weight_VD))
        runs.append((result.loss, result.logprob_C, result.entropy_C, *grads))
    for run in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(run, runs[0], strict=True))


def test_loss_is_called_once_a_chunk_in_token_order(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight_VD, targets_C = random_head(10, 4, 19)
    rows_per_chunk(monkeypatch, 4, weight_VD)
    seen: list[slice] = []

    def token_loss(tokens: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        seen.append(tokens)
        assert len(logprob_C) == len(entropy_C) == tokens.stop - tokens.start
        assert torch.is_grad_enabled()
        return logprob_C.sum()

    result = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss)
    assert seen == [slice(0, 4), slice(4, 8), slice(8, 10)]
    torch.testing.assert_close(result.loss, result.logprob_C.sum())


def test_chunks_keep_sequences_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight_VD, targets_C = random_head(10, 4, 19)
    rows_per_chunk(monkeypatch, 4, weight_VD)
    sequence_C = torch.tensor([7, 7, 7, 2, 2, 9, 9, 9, 9, 9])
    seen: list[slice] = []

    def token_loss(tokens: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        seen.append(tokens)
        return logprob_C.mean()

    linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss, keep_whole_C=sequence_C)
    assert seen == [slice(0, 3), slice(3, 5), slice(5, 10)]
    with pytest.raises(ValueError, match="tokens of a sequence must be neighbours"):
        linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss, keep_whole_C=sequence_C.roll(1))


def test_results_are_float32_and_detached() -> None:
    hidden_RD, weight_VD, targets_C = random_head(4, 6, 50, torch.bfloat16)
    result = linear_token_loss(hidden_RD, weight_VD, targets_C, surprisal)
    assert result.loss.shape == ()
    assert {part.dtype for part in (result.loss, result.logprob_C, result.entropy_C)} == {torch.float32}
    assert not result.logprob_C.requires_grad
    assert not result.entropy_C.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("upstream", [3.0, -0.5, 0.0])
def test_upstream_gradient_scales(dtype: torch.dtype, upstream: float) -> None:
    hidden_RD, weight_VD, targets_C = random_head(4, 6, 50, dtype)

    def gradients(times: float) -> tuple[Tensor, ...]:
        loss = linear_token_loss(hidden_RD, weight_VD, targets_C, surprisal).loss
        return torch.autograd.grad(loss * times, (hidden_RD, weight_VD))

    for scaled, plain in zip(gradients(upstream), gradients(1.0), strict=True):
        assert plain.count_nonzero() > 0
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(scaled, plain * upstream, rtol=tolerance, atol=0)


def test_gradients_are_handed_out_once() -> None:
    hidden_RD, weight_VD, targets_C = random_head(4, 6, 50)
    loss = linear_token_loss(hidden_RD, weight_VD, targets_C, surprisal).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hands its gradients out once; call it again"):
        loss.backward()


def test_gradients_accumulate_over_calls() -> None:
    hidden_RD, weight_VD, targets_C = random_head(4, 6, 50)
    for _ in range(2):
        linear_token_loss(hidden_RD, weight_VD, targets_C, surprisal).loss.backward()
    expected = torch.autograd.grad(
        reference_loss(hidden_RD, weight_VD, targets_C, surprisal), (hidden_RD, weight_VD)
    )
    for matrix, grad in zip((hidden_RD, weight_VD), expected, strict=True):
        torch.testing.assert_close(matrix.grad, 2 * grad, rtol=1e-11, atol=1e-11)


def test_frozen_head_costs_no_work_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight_VD, targets_C = random_head(9, 6, 50)
    rows_per_chunk(monkeypatch, 4, weight_VD)
    expected = torch.autograd.grad(
        linear_token_loss(hidden_RD, weight_VD, targets_C, surprisal).loss, hidden_RD
    )
    frozen_VD = weight_VD.detach()
    with HeadCalls() as calls:
        loss = linear_token_loss(hidden_RD, frozen_VD, targets_C, surprisal).loss
        loss.backward()
    assert [call[7] for call in calls.gradients] == [None] * 3
    assert [call[9] for call in calls.gradients] == [True] * 3
    assert frozen_VD.grad is None
    assert hidden_RD.grad is not None
    assert torch.equal(hidden_RD.grad, expected[0])


def test_frozen_trunk_costs_no_work_for_its_gradient() -> None:
    hidden_RD, weight_VD, targets_C = random_head(9, 6, 50)
    expected = torch.autograd.grad(
        linear_token_loss(hidden_RD, weight_VD, targets_C, surprisal).loss, weight_VD
    )
    with HeadCalls() as calls:
        linear_token_loss(hidden_RD.detach(), weight_VD, targets_C, surprisal).loss.backward()
    assert [call[9] for call in calls.gradients] == [False]
    assert weight_VD.grad is not None
    assert torch.equal(weight_VD.grad, expected[0])


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_loss_without_gradients_does_no_work_for_them(how: str) -> None:
    hidden_RD, weight_VD, targets_C = random_head(9, 6, 50)
    token_loss = smooth_loss(9)
    expected = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss)
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "frozen": torch.enable_grad}[
        how
    ]
    if how == "frozen":
        hidden_RD, weight_VD = hidden_RD.detach(), weight_VD.detach()
    with mode(), HeadCalls() as calls:
        result = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss)
    assert not calls.gradients
    assert [call[5] for call in calls.exps] == [False]
    assert not result.loss.requires_grad
    assert result.loss.item() == expected.loss.item()
    assert torch.equal(result.logprob_C, expected.logprob_C)
    assert result.dropped_share == 0


def test_tied_embedding_gets_both_gradients() -> None:
    """With ``grad_dtype`` float32 the head's share is never rounded to bfloat16, and two passes add up in float32."""
    embeddings_VD = torch.randn(101, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    inputs_C, targets_C = torch.arange(40) * 3 % 101, torch.arange(40) * 7 % 101

    def tied_loss(weight_VD: Tensor, loss: Callable[..., Tensor]) -> Tensor:
        return loss(0.3 * functional.embedding(inputs_C, weight_VD), weight_VD, targets_C, surprisal)

    def fused(*given: Any) -> Tensor:
        return linear_token_loss(*given).loss

    exact_VD = embeddings_VD.double().requires_grad_()
    tied_loss(exact_VD, reference_loss).backward()
    assert exact_VD.grad is not None
    errors: dict[tuple[str, bool], float] = {}
    for name, loss in (("ours", fused), ("reference", reference_loss)):
        for widened in (False, True):
            weight_VD = embeddings_VD.clone().requires_grad_()
            if widened:
                weight_VD.grad_dtype = torch.float32
            for _ in range(2):
                tied_loss(weight_VD, loss).backward()
            assert weight_VD.grad is not None
            assert weight_VD.grad.dtype == (torch.float32 if widened else torch.bfloat16)
            errors[name, widened] = float(
                (weight_VD.grad.double() / 2 - exact_VD.grad).norm() / exact_VD.grad.norm()
            )
    assert errors["ours", False] <= min(2 * errors["reference", False], 2**-7)
    assert errors["ours", True] <= min(2 * errors["reference", True], 2**-7)
    assert errors["ours", True] < errors["ours", False]


def test_loss_of_some_tokens_drops_the_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight_VD, targets_C = random_head(12, 6, 50)
    rows_per_chunk(monkeypatch, 5, weight_VD)
    kept_C = torch.arange(12) % 4 == 1

    def token_loss(tokens: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        return (logprob_C * kept_C[tokens]).sum()

    with HeadCalls() as calls:
        result = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss)
    assert sum(len(call[1]) for call in calls.gradients) == 3
    assert result.dropped_share == 9 / 12
    expected = reference_loss(hidden_RD, weight_VD, targets_C, token_loss)
    torch.testing.assert_close(
        torch.autograd.grad(result.loss, (hidden_RD, weight_VD)),
        torch.autograd.grad(expected, (hidden_RD, weight_VD)),
        rtol=1e-11,
        atol=1e-12,
    )


@pytest.mark.parametrize(
    "token_loss",
    [lambda _, logprob_C, __: 0 * logprob_C.sum(), lambda _, logprob_C, __: logprob_C.new_tensor(2.5)],
    ids=["coefficients 0", "constant"],
)
def test_loss_without_slope_gives_exact_zeros(token_loss: TokenLoss, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden_RD, weight_VD, targets_C = random_head(9, 6, 50, torch.float32)
    rows_per_chunk(monkeypatch, 4, weight_VD)
    with HeadCalls() as calls:
        result = linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss)
    assert not calls.gradients
    assert result.dropped_share == 1
    result.loss.backward()
    for matrix in (hidden_RD, weight_VD):
        assert matrix.grad is not None
        assert not matrix.grad.count_nonzero()


def test_loss_of_the_entropy_alone() -> None:
    hidden_RD, weight_VD, targets_C = random_head(9, 6, 50)

    def token_loss(_: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        return entropy_C.square().sum()

    torch.testing.assert_close(
        torch.autograd.grad(
            linear_token_loss(hidden_RD, weight_VD, targets_C, token_loss).loss, (hidden_RD, weight_VD)
        ),
        torch.autograd.grad(
            reference_loss(hidden_RD, weight_VD, targets_C, token_loss), (hidden_RD, weight_VD)
        ),
        rtol=1e-11,
        atol=1e-12,
    )


def test_strided_inputs() -> None:
    hidden_RD, weight_VD, targets_C = random_head(6, 8, 40)
    strided = linear_token_loss(
        hidden_RD.T.contiguous().T,
        weight_VD.T.contiguous().T,
        targets_C.repeat_interleave(2)[::2],
        surprisal,
        rows_C=torch.arange(6).repeat_interleave(2)[::2],
    ).loss
    torch.testing.assert_close(
        torch.autograd.grad(strided, (hidden_RD, weight_VD)),
        torch.autograd.grad(
            reference_loss(hidden_RD, weight_VD, targets_C, surprisal), (hidden_RD, weight_VD)
        ),
        rtol=1e-11,
        atol=1e-11,
    )


@pytest.mark.parametrize(("rows", "with_rows"), [(0, False), (0, True), (3, True)])
@pytest.mark.parametrize("keep_whole", [False, True])
def test_no_tokens_give_no_loss_and_zero_gradients(rows: int, with_rows: bool, keep_whole: bool) -> None:
    hidden_RD = torch.ones(rows, 4, requires_grad=True)
    weight_VD = torch.ones(9, 4, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    result = linear_token_loss(
        hidden_RD,
        weight_VD,
        nothing,
        surprisal,
        rows_C=nothing if with_rows else None,
        keep_whole_C=nothing if keep_whole else None,
    )
    assert result.loss.item() == 0
    assert result.dropped_share == 0
    assert result.logprob_C.shape == result.entropy_C.shape == (0,)
    result.loss.backward()
    assert hidden_RD.grad is not None
    assert torch.equal(hidden_RD.grad, torch.zeros(rows, 4))
    assert weight_VD.grad is not None
    assert torch.equal(weight_VD.grad, torch.zeros(9, 4))


def peak_bytes(work: Callable[[], object], folder: Path) -> int:
    """Largest sum of what PyTorch's CPU allocator handed out during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    trace = folder / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))


def peak_share(head: tuple[Tensor, Tensor, Tensor], folder: Path) -> float:
    """Peak memory of forward and backward, without the gradients it returns, over that of the float32 logits."""
    hidden_RD, weight_VD, targets_C = head
    peak = peak_bytes(lambda: linear_token_loss(*head, surprisal).loss.backward(), folder)
    returned = sum(matrix.grad.nbytes for matrix in (hidden_RD, weight_VD) if matrix.grad is not None)
    return (peak - returned) / (len(targets_C) * len(weight_VD) * 4)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_memory_is_one_chunk_of_exponentials_and_the_gradients(
    frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks in bfloat16 are a quarter of the float32 logits."""
    hidden_RD, weight_VD, targets_C = random_head(512, 48, 20_011, torch.bfloat16)
    weight_VD = weight_VD.detach().requires_grad_(not frozen)
    if not frozen:
        weight_VD.grad_dtype = torch.float32
    rows_per_chunk(monkeypatch, 256, weight_VD)
    assert 0.25 < peak_share((hidden_RD, weight_VD, targets_C), tmp_path) < 0.35


@pytest.mark.parametrize("rows", [256, 1024])
def test_memory_with_the_budgets_as_they_are(rows: int, tmp_path: Path) -> None:
    hidden_RD, weight_VD, targets_C = random_head(rows, 4, 151_936, torch.bfloat16)
    weight_VD.grad_dtype = torch.float32
    assert 0.1 < peak_share((hidden_RD, weight_VD, targets_C), tmp_path) < 0.35


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(7, 3)}, "D of hidden and weight differ"),
        ({"targets": torch.tensor([0, 7, 1])}, r"every target must be in \[0, 7\)"),
        ({"rows_C": torch.tensor([0, 3, 1])}, r"every row must be in \[0, 3\)"),
        ({"rows_C": torch.tensor([0, 1])}, r"rows torch.int64 \(2,\)"),
        ({"hidden": torch.full((3, 4), math.nan)}, "hidden has NaN or infinity, first in row 0"),
        ({"hidden": torch.full((3, 4), math.inf)}, "hidden has NaN or infinity"),
        ({"temperature": 0.0}, "got temperature 0.0; it must be finite and above 0"),
        ({"temperature": math.nan}, "got temperature nan"),
        ({"hidden": torch.zeros(3, 4).half(), "weight": torch.zeros(7, 4).half()}, "got float16"),
        ({"weight": torch.zeros(7, 4).bfloat16()}, "got hidden torch.float32, weight torch.bfloat16"),
    ],
)
def test_inputs_without_a_right_answer_are_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.tensor([0, 6, 1]),
        "rows_C": None,
        "temperature": 1.0,
    } | changed
    matrices = given.pop("hidden"), given.pop("weight"), given.pop("targets")
    with pytest.raises(ValueError, match=f"^linear_token_loss: .*{message}"):
        linear_token_loss(*matrices, surprisal, **given)


def test_error_of_the_loss_reaches_the_caller() -> None:
    def token_loss(tokens: slice, logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        raise KeyError("reference")

    with pytest.raises(KeyError, match="reference"):
        linear_token_loss(*random_head(2, 3, 5), token_loss)
