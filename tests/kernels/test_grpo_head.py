import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from omnigrpo_kernels import chunking
from omnigrpo_kernels.grpo_head import GrpoHeadResult, grpo_head, grpo_head_reference
from omnigrpo_kernels.grpo_objective import (
    BatchCounts,
    KlEstimator,
    LossForm,
    ObjectiveConfig,
    TokenBatch,
    TokenTerms,
    token_weights,
)
from omnigrpo_kernels.linear_logprob import linear_logprob_reference

LOSSES: tuple[LossForm, ...] = get_args(LossForm)
VOCABULARY, WIDTH, TEMPERATURE = 603, 24, 0.9
SWITCHES: dict[str, dict[str, Any]] = {
    "surrogate": {"kl_coefficient": 0.0},
    "KL": {"kl_coefficient": 0.1},
    "entropy bonus": {"kl_coefficient": 0.0, "entropy_coefficient": 0.05},
    "everything": {
        "kl_coefficient": 0.1,
        "kl_estimator": "k3_k2grad",
        "entropy_coefficient": 0.05,
        "clip_high": 0.28,
        "max_importance_weight": 1.05,
    },
}
each_loss = pytest.mark.parametrize("loss", LOSSES)
each_switch = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
each_policy = pytest.mark.parametrize("on_policy", [False, True], ids=["old policy", "on policy"])
each_layout = pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
each_low_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """Two groups of four completions, tokens in order."""

    hidden_RD: Tensor
    """Leaf."""
    weight_VD: Tensor
    """Leaf."""
    targets_C: Tensor
    rows_C: Tensor | None
    """With shared rows, the first tokens of a group have one row."""
    batch: TokenBatch

    def given(self) -> tuple[Tensor, Tensor, Tensor, TokenBatch]:
        return self.hidden_RD, self.weight_VD, self.targets_C, self.batch

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden_RD, self.weight_VD

    def doubled(self) -> "Pack":
        hidden_RD, weight_VD = (leaf.detach().double().requires_grad_() for leaf in self.leaves())
        return replace(self, hidden_RD=hidden_RD, weight_VD=weight_VD)


LENGTHS = (3, 1, 4, 2, 5, 1, 2, 3)
ADVANTAGES = (1.0, -1.0, 0.5, -0.5, 0.75, -0.25, -0.25, -0.25)
DRIFTS = (0.0, 0.05, 0.6, -0.6, -0.05, 0.5, 0.1, 0.6)
"""Log-prob minus old log-prob, before noise: no ratio is near an edge of a clip."""
NUM_TOKENS = sum(LENGTHS)
MASKED_SEQUENCE, MASKED_TOKEN = 6, 12


def build_pack(
    dtype: torch.dtype, loss: LossForm, *, shared: bool = True, on_policy: bool = False, repeats: int = 1
) -> Pack:
    """One sequence and one more token are masked; group 0 starts with two equal tokens, group 1 with four."""
    generator = torch.Generator().manual_seed(11)
    lengths_S = torch.tensor(LENGTHS * repeats)
    sequence_C = torch.arange(len(lengths_S)).repeat_interleave(lengths_S)
    num_tokens = len(sequence_C)
    starts_S = lengths_S.cumsum(0) - lengths_S
    is_first_C = torch.zeros(num_tokens, dtype=torch.bool)
    is_first_C[starts_S] = True
    targets_C = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    for group, equal in ((0, 2), (4, 4)):
        targets_C[starts_S[group : group + equal]] = int(targets_C[starts_S[group]])
    rows_C, num_rows = None, num_tokens
    if shared:
        num_groups = len(lengths_S) // 4
        rows_C = torch.where(is_first_C, sequence_C // 4, num_groups - 1 + (~is_first_C).cumsum(0))
        num_rows = int(rows_C.max()) + 2
    hidden_RD = torch.randn(num_rows, WIDTH, generator=generator) * 2 / math.sqrt(WIDTH)
    weight_VD = torch.randn(VOCABULARY, WIDTH, generator=generator)
    hidden_RD, weight_VD = (matrix.to(dtype).requires_grad_() for matrix in (hidden_RD, weight_VD))
    with torch.no_grad():
        exact_C = linear_logprob_reference(
            hidden_RD.double(), weight_VD.double(), targets_C, rows_C=rows_C, temperature=TEMPERATURE
        ).logprob_T
    noise_C, reference_C, rollout_C = torch.randn(3, num_tokens, dtype=torch.float64, generator=generator)
    old_C = exact_C - torch.tensor(DRIFTS * repeats, dtype=torch.float64)[sequence_C] - 0.02 * noise_C
    active_C = sequence_C % len(LENGTHS) != MASKED_SEQUENCE
    active_C[MASKED_TOKEN::NUM_TOKENS] = False
    lengths_C = torch.bincount(sequence_C, active_C, minlength=len(lengths_S)).long()[sequence_C] * active_C
    counts = BatchCounts(
        num_sequences=len(lengths_S), num_tokens=int(active_C.sum()), max_tokens=8, num_packs=1
    )
    batch = TokenBatch(
        advantage_C=torch.tensor(ADVANTAGES * repeats)[sequence_C],
        weight_C=token_weights(loss, lengths_C, counts),
        sequence_C=sequence_C + 3,
        old_C=None if on_policy else old_C,
        reference_C=exact_C + 0.5 * reference_C,
        rollout_C=old_C + 0.1 * rollout_C,
    )
    return Pack(hidden_RD=hidden_RD, weight_VD=weight_VD, targets_C=targets_C, rows_C=rows_C, batch=batch)


def run(pack: Pack, config: ObjectiveConfig, *, reference: bool = False) -> GrpoHeadResult:
    compute = grpo_head_reference if reference else grpo_head
    return compute(*pack.given(), config, rows_C=pack.rows_C, temperature=TEMPERATURE)


def gradients(pack: Pack, config: ObjectiveConfig, *, reference: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run(pack, config, reference=reference).loss, pack.leaves())


def tokens_per_chunk(monkeypatch: pytest.MonkeyPatch, tokens: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(chunking, "CHUNK_BYTES", {"cpu": tokens * VOCABULARY * dtype.itemsize})


def assert_same_terms(actual: TokenTerms, expected: TokenTerms) -> None:
    torch.testing.assert_close(actual.loss_C, expected.loss_C, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(actual.ratio_C, expected.ratio_C, rtol=1e-11, atol=1e-11)
    assert torch.equal(actual.clipped_C, expected.clipped_C)
    for ours, theirs in ((actual.kl_C, expected.kl_C), (actual.importance_C, expected.importance_C)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


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


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """The ops are small: on a busy machine a second thread costs more than it gives. tests/conftest.py restores it."""
    torch.set_num_threads(1)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each_loss
@each_switch
@each_policy
@each_layout
@pytest.mark.parametrize("chunk_tokens", [6, 100], ids=["chunks", "one chunk"])
def test_float64_equals_the_reference(
    loss: LossForm,
    switches: dict[str, Any],
    on_policy: bool,
    shared: bool,
    chunk_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pack = build_pack(torch.float64, loss, shared=shared, on_policy=on_policy)
    config = ObjectiveConfig(loss=loss, **switches)
    tokens_per_chunk(monkeypatch, chunk_tokens, torch.float64)
    with HeadCalls() as calls:
        ours = run(pack, config)
    assert len(calls.exps) == 1 if chunk_tokens == 100 else len(calls.exps) > 3
    expected = run(pack, config, reference=True)
    assert expected.loss.abs() > 1e-4
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(ours.logprob_C, expected.logprob_C, rtol=0, atol=1e-11)
    torch.testing.assert_close(ours.entropy_C, expected.entropy_C, rtol=0, atol=1e-11)
    assert_same_terms(ours.terms, expected.terms)
    torch.testing.assert_close(
        torch.autograd.grad(ours.loss, pack.leaves()),
        torch.autograd.grad(expected.loss, pack.leaves()),
        rtol=1e-11,
        atol=1e-12,
    )


@each_loss
@pytest.mark.parametrize("estimator", get_args(KlEstimator))
def test_kl_estimators_in_float64(loss: LossForm, estimator: KlEstimator) -> None:
    pack = build_pack(torch.float64, loss)
    config = ObjectiveConfig(loss=loss, kl_coefficient=0.3, kl_estimator=estimator)
    for ours, expected in zip(gradients(pack, config), gradients(pack, config, reference=True), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_clip_and_dual_clip_bind_in_the_packs_of_these_tests() -> None:
    config = ObjectiveConfig(kl_coefficient=0.0)
    clipped = run(build_pack(torch.float64, "grpo"), config).terms
    dual = run(build_pack(torch.float64, "grpo"), replace(config, dual_clip=1.5)).terms
    assert 0 < clipped.clipped_C.sum() < dual.clipped_C.sum() < NUM_TOKENS
    edges = torch.tensor([0.8, 1.2, 1.28, 1.5])
    assert (clipped.ratio_C[:, None] - edges).abs().min() > 0.02
    pack = build_pack(torch.float64, "grpo")
    config = ObjectiveConfig(loss="grpo", kl_coefficient=0.0, dual_clip=1.5)
    for ours, expected in zip(gradients(pack, config), gradients(pack, config, reference=True), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@each_loss
@each_switch
@each_policy
@each_layout
@each_low_dtype
def test_low_precision_is_as_close_as_the_reference(
    loss: LossForm, switches: dict[str, Any], on_policy: bool, shared: bool, dtype: torch.dtype
) -> None:
    """And, where rounded logits spoil the reference's ratios, as close as the inputs' dtype allows."""
    pack = build_pack(dtype, loss, shared=shared, on_policy=on_policy)
    pack.weight_VD.grad_dtype = torch.float32
    config = ObjectiveConfig(loss=loss, **switches)

    def accumulated(*, reference: bool) -> list[Tensor]:
        pack.hidden_RD.grad = pack.weight_VD.grad = None
        run(pack, config, reference=reference).loss.backward()
        grads = [leaf.grad for leaf in pack.leaves() if leaf.grad is not None]
        assert [grad.dtype for grad in grads] == [dtype, torch.float32]
        return grads

    exact = gradients(pack.doubled(), config, reference=True)
    bound = 2**-7 if dtype == torch.bfloat16 else 5e-6
    for actual, peer, truth in zip(
        accumulated(reference=False), accumulated(reference=True), exact, strict=True
    ):
        error, peer_error = actual.double() - truth, peer.double() - truth
        assert error.norm() <= min(2 * peer_error.norm(), bound * truth.norm())
        assert error.abs().max() <= 2 * peer_error.abs().max() + 1e-7 * truth.abs().max()


@each_loss
@each_low_dtype
def test_logprobs_are_within_1e_5_and_the_loss_follows(loss: LossForm, dtype: torch.dtype) -> None:
    pack = build_pack(dtype, loss)
    config = ObjectiveConfig(loss=loss, entropy_coefficient=0.1)
    ours, exact = run(pack, config), run(pack.doubled(), config, reference=True)
    assert ours.logprob_C.dtype == ours.loss.dtype == torch.float32
    assert (ours.logprob_C - exact.logprob_C).abs().max() <= 1e-5
    assert (ours.loss - exact.loss).abs() <= 1e-5 * (1 + exact.loss.abs())


@each_loss
@each_low_dtype
def test_chunks_change_no_bit_of_a_logprob_and_only_round_gradients(
    loss: LossForm, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = build_pack(dtype, loss, shared=False, repeats=3)
    config = ObjectiveConfig(loss=loss, entropy_coefficient=0.05)
    results = []
    for chunk_tokens in (100, 33, 5, 1):
        tokens_per_chunk(monkeypatch, chunk_tokens, dtype)
        result = run(pack, config)
        results.append((result, torch.autograd.grad(result.loss, pack.leaves())))
    (whole, grads), *chunked = results
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    for result, chunked_grads in chunked:
        assert torch.equal(result.logprob_C, whole.logprob_C)
        torch.testing.assert_close(result.terms.loss_C, whole.terms.loss_C, rtol=1e-6, atol=1e-6)
        for actual, expected in zip(chunked_grads, grads, strict=True):
            size = expected.abs().max().item()
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * size)


@each_low_dtype
def test_runs_and_thread_counts_give_the_same_bits(
    dtype: torch.dtype, restored_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = build_pack(dtype, "dapo", repeats=3)
    tokens_per_chunk(monkeypatch, 40, dtype)
    runs = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        result = run(pack, ObjectiveConfig(loss="dapo", entropy_coefficient=0.05))
        grads = torch.autograd.grad(result.loss, pack.leaves())
        runs.append((result.loss, result.logprob_C, result.entropy_C, result.terms.loss_C, *grads))
    for other in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("equal_targets", [False, True], ids=["four targets", "one target"])
def test_advantages_that_cancel_over_a_shared_row(dtype: torch.dtype, equal_targets: bool) -> None:
    """The row leaves the products: what is left is each target's own pull, or with one target nothing at all."""
    generator = torch.Generator().manual_seed(0)
    hidden_RD = torch.randn(1, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight_VD = torch.randn(50, WIDTH, generator=generator).to(dtype).requires_grad_()
    targets_C = torch.full((4,), 9) if equal_targets else torch.tensor([9, 4, 30, 0])
    advantage_C = torch.tensor([1.0, -1.0, 0.5, -0.5])
    batch = TokenBatch(advantage_C=advantage_C, weight_C=torch.full((4,), 0.25), sequence_C=torch.arange(4))
    with HeadCalls() as calls:
        result = grpo_head(
            hidden_RD,
            weight_VD,
            targets_C,
            batch,
            ObjectiveConfig(kl_coefficient=0.0),
            rows_C=torch.zeros(4, dtype=torch.int64),
        )
    assert not calls.gradients
    assert result.dropped_share == 1
    result.loss.backward()
    assert hidden_RD.grad is not None
    assert weight_VD.grad is not None
    if equal_targets:
        assert not hidden_RD.grad.count_nonzero()
        assert not weight_VD.grad.count_nonzero()
        return
    pull_C = (-0.25 * advantage_C).double()
    expected_RD = (pull_C[:, None] * weight_VD.detach().double()[targets_C]).sum(0, keepdim=True)
    expected_VD = torch.zeros(50, WIDTH, dtype=torch.float64)
    expected_VD[targets_C] = pull_C[:, None] * hidden_RD.detach().double()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(hidden_RD.grad.double(), expected_RD, rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(weight_VD.grad.double(), expected_VD, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_coefficient_are_dropped(dtype: torch.dtype) -> None:
    """A masked token, two clipped sequences and three without advantage; the gradient is the dense one."""
    pack = build_pack(dtype, "dapo", shared=False)
    is_flat_C = pack.batch.sequence_C >= 3 + 5
    batch = replace(pack.batch, advantage_C=torch.where(is_flat_C, 0.0, pack.batch.advantage_C))
    pack = replace(pack, batch=batch)
    config = ObjectiveConfig(loss="dapo", kl_coefficient=0.0)
    with HeadCalls() as calls:
        result = run(pack, config)
    assert result.terms.clipped_C.sum() == LENGTHS[2] + LENGTHS[3]
    left = (batch.weight_C != 0) & ~is_flat_C & ~result.terms.clipped_C
    assert left.sum() == LENGTHS[0] + LENGTHS[1] + LENGTHS[4] - 1
    assert [len(call[1]) for call in calls.gradients] == [int(left.sum())]
    assert result.dropped_share == pytest.approx(1 - int(left.sum()) / NUM_TOKENS)
    exact = gradients(pack.doubled(), config, reference=True)
    bound = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2**-7}[dtype]
    for ours, expected in zip(torch.autograd.grad(result.loss, pack.leaves()), exact, strict=True):
        assert (ours.double() - expected).norm() <= bound * expected.norm()
    assert not gradients(pack, config)[0][~left].count_nonzero()


def test_kl_keeps_rows_without_advantage() -> None:
    pack = build_pack(torch.float64, "dapo", shared=False)
    pack = replace(pack, batch=replace(pack.batch, advantage_C=torch.zeros(NUM_TOKENS)))
    masked = int((pack.batch.weight_C == 0).sum())
    assert run(pack, ObjectiveConfig(loss="dapo")).dropped_share == pytest.approx(masked / NUM_TOKENS)
    assert run(pack, ObjectiveConfig(loss="dapo", kl_coefficient=0.0)).dropped_share == 1


@each_loss
@each_low_dtype
@pytest.mark.parametrize("chunk_tokens", [6, 100], ids=["chunks", "one chunk"])
def test_nothing_to_learn_gives_exact_zeros(
    loss: LossForm, dtype: torch.dtype, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = build_pack(dtype, loss)
    pack = replace(pack, batch=replace(pack.batch, weight_C=torch.zeros(NUM_TOKENS)))
    tokens_per_chunk(monkeypatch, chunk_tokens, dtype)
    result = run(pack, ObjectiveConfig(loss=loss, entropy_coefficient=0.1))
    assert result.loss.item() == 0
    assert result.dropped_share == 1
    assert not any(grad.count_nonzero() for grad in torch.autograd.grad(result.loss, pack.leaves()))


@each_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_tokens_hold_anything(loss: LossForm, poison: float) -> None:
    """Also a log-prob so low that its ratio would overflow."""
    pack = build_pack(torch.float32, loss)
    config = ObjectiveConfig(loss=loss, entropy_coefficient=0.1, max_importance_weight=2.0)
    assert pack.rows_C is not None
    masked_C = pack.batch.weight_C == 0
    lonely = int(pack.rows_C[MASKED_TOKEN])
    with torch.no_grad():
        pack.hidden_RD[lonely] = -200 * pack.weight_VD[pack.targets_C[MASKED_TOKEN]]
    expected = gradients(pack, config)
    vectors = {
        name: torch.where(masked_C, poison, getattr(pack.batch, name))
        for name in ("advantage_C", "old_C", "reference_C", "rollout_C")
    }
    poisoned = replace(pack, batch=replace(pack.batch, **vectors))
    result = run(poisoned, config)
    assert result.logprob_C[MASKED_TOKEN] < -1000
    assert result.loss.isfinite()
    grads = torch.autograd.grad(result.loss, poisoned.leaves())
    assert all(torch.equal(ours, clean) for ours, clean in zip(grads, expected, strict=True))
    assert not grads[0][lonely].count_nonzero()


@each_layout
def test_gspo_keeps_sequences_whole_over_chunks(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = build_pack(torch.float64, "gspo", shared=shared)
    config = ObjectiveConfig(loss="gspo")
    whole = run(pack, config)
    expected = torch.autograd.grad(whole.loss, pack.leaves())
    tokens_per_chunk(monkeypatch, 4, torch.float64)
    with HeadCalls() as calls:
        chunked = run(pack, config)
    num_pairs = [len(call[2]) for call in calls.exps]
    assert len(num_pairs) == 6
    assert_same_terms(chunked.terms, whole.terms)
    for ours, theirs in zip(torch.autograd.grad(chunked.loss, pack.leaves()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@each_loss
def test_sequences_that_are_not_neighbours(loss: LossForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only GSPO's ratio to an old policy couples a sequence's tokens."""
    order = torch.randperm(NUM_TOKENS, generator=torch.Generator().manual_seed(0))
    pack = build_pack(torch.float64, loss)
    assert pack.rows_C is not None
    mixed = replace(
        pack, targets_C=pack.targets_C[order], rows_C=pack.rows_C[order], batch=pack.batch.select(order)
    )
    config = ObjectiveConfig(loss=loss)
    tokens_per_chunk(monkeypatch, 6, torch.float64)
    if loss == "gspo":
        with pytest.raises(ValueError, match="tokens of a sequence must be neighbours"):
            run(mixed, config)
        mixed, pack = (replace(each, batch=replace(each.batch, old_C=None)) for each in (mixed, pack))
    for ours, expected in zip(gradients(mixed, config), gradients(pack, config), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_old_logprobs_of_the_same_pass_give_ratio_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second update of a batch, before any step: exactly the on-policy gradient."""
    for dtype in (torch.float32, torch.bfloat16):
        pack = build_pack(dtype, "grpo", on_policy=True)
        config = ObjectiveConfig()
        first = run(pack, config)
        again = replace(pack, batch=replace(pack.batch, old_C=first.logprob_C))
        second = run(again, config)
        assert (second.terms.ratio_C == 1).all()
        assert torch.equal(second.loss, first.loss)
        for ours, theirs in zip(
            torch.autograd.grad(second.loss, pack.leaves()),
            torch.autograd.grad(first.loss, pack.leaves()),
            strict=True,
        ):
            assert torch.equal(ours, theirs)


def test_packs_add_up_to_one_batch() -> None:
    """Denominators are in the weights: two halves give the whole's loss and gradient."""
    pack = build_pack(torch.float64, "dr_grpo", shared=False)
    config = ObjectiveConfig(loss="dr_grpo")
    middle = sum(LENGTHS[:4])
    total, grads = torch.zeros((), dtype=torch.float64), [torch.zeros_like(leaf) for leaf in pack.leaves()]
    for tokens in (slice(0, middle), slice(middle, NUM_TOKENS)):
        loss = grpo_head(
            pack.hidden_RD[tokens],
            pack.weight_VD,
            pack.targets_C[tokens],
            pack.batch.select(tokens),
            config,
            temperature=TEMPERATURE,
        ).loss
        total += loss.detach()
        for grad, part in zip(grads, torch.autograd.grad(loss, pack.leaves()), strict=True):
            grad += part
    whole = run(pack, config)
    torch.testing.assert_close(total, whole.loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        tuple(grads), torch.autograd.grad(whole.loss, pack.leaves()), rtol=1e-11, atol=1e-12
    )


def test_frozen_head_costs_no_work_for_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    pack = build_pack(torch.float32, "grpo")
    expected = gradients(pack, ObjectiveConfig())[0]
    frozen = replace(pack, weight_VD=pack.weight_VD.detach())
    with HeadCalls() as calls:
        run(frozen, ObjectiveConfig()).loss.backward()
    assert [(call[7], call[9]) for call in calls.gradients] == [(None, True)]
    assert pack.hidden_RD.grad is not None
    assert torch.equal(pack.hidden_RD.grad, expected)


def test_loss_without_gradients_does_no_work_for_them() -> None:
    pack = build_pack(torch.float32, "grpo")
    expected = run(pack, ObjectiveConfig())
    with torch.no_grad(), HeadCalls() as calls:
        result = run(pack, ObjectiveConfig())
    assert not calls.gradients
    assert [call[5] for call in calls.exps] == [False]
    assert not result.loss.requires_grad
    assert torch.equal(result.loss, expected.loss)
    assert_same_terms(result.terms, expected.terms)


def test_gradients_are_handed_out_once_and_scaled() -> None:
    pack = build_pack(torch.float32, "grpo")
    plain = gradients(pack, ObjectiveConfig())
    loss = run(pack, ObjectiveConfig()).loss
    scaled = torch.autograd.grad(loss * -2, pack.leaves(), retain_graph=True)
    for ours, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(ours, -2 * theirs)
    with pytest.raises(RuntimeError, match="hands its gradients out once"):
        loss.backward()


def test_results_are_detached_but_the_loss() -> None:
    result = run(build_pack(torch.float32, "grpo"), replace(ObjectiveConfig(), max_importance_weight=2.0))
    terms = result.terms
    parts = (result.logprob_C, result.entropy_C, terms.loss_C, terms.kl_C, terms.ratio_C, terms.importance_C)
    assert not any(part is None or part.requires_grad for part in parts)
    assert all(part is not None and part.shape == (NUM_TOKENS,) for part in (*parts, terms.clipped_C))
    assert result.loss.requires_grad


@each_loss
def test_no_tokens_give_no_loss_and_zero_gradients(loss: LossForm) -> None:
    nothing = torch.empty(0)
    hidden_RD = torch.ones(3, 4, requires_grad=True)
    weight_VD = torch.ones(9, 4, requires_grad=True)
    batch = TokenBatch(
        advantage_C=nothing, weight_C=nothing, sequence_C=nothing.long(), old_C=nothing, reference_C=nothing
    )
    config = ObjectiveConfig(loss=loss)
    result = grpo_head(hidden_RD, weight_VD, nothing.long(), batch, config, rows_C=nothing.long())
    assert result.loss.item() == 0
    assert result.terms.loss_C.shape == result.logprob_C.shape == (0,)
    result.loss.backward()
    for matrix in (hidden_RD, weight_VD):
        assert matrix.grad is not None
        assert torch.equal(matrix.grad, torch.zeros_like(matrix))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_tokens": 2}, "^grpo_head: got 3 targets and 2 advantages; give one a token"),
        ({"weight": torch.zeros(7, 3)}, "D of hidden and weight differ"),
        ({"targets": torch.tensor([0, 7, 1])}, r"every target must be in \[0, 7\)"),
        ({"rows_C": torch.tensor([0, 3, 1])}, r"every row must be in \[0, 3\)"),
        ({"hidden": torch.full((3, 4), math.nan)}, "hidden has NaN or infinity, first in row 0"),
        ({"hidden": torch.full((3, 4), -math.inf)}, "hidden has NaN or infinity"),
        ({"temperature": 0.0}, "got temperature 0.0; it must be finite and above 0"),
        ({"temperature": math.nan}, "got temperature nan"),
        ({"hidden": torch.zeros(3, 4).half(), "weight": torch.zeros(7, 4).half()}, "got float16"),
        ({"weight": torch.zeros(7, 4).bfloat16()}, "got hidden torch.float32, weight torch.bfloat16"),
        ({"config": ObjectiveConfig()}, "kl_coefficient is 0.04, but the batch has no reference log-probs"),
    ],
)
def test_inputs_without_a_right_answer_are_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.tensor([0, 6, 1]),
        "batch_tokens": 3,
        "config": ObjectiveConfig(kl_coefficient=0.0),
        "rows_C": None,
        "temperature": 1.0,
    } | changed
    ones = torch.ones(given.pop("batch_tokens"))
    batch = TokenBatch(advantage_C=ones, weight_C=ones, sequence_C=ones.long())
    head = given.pop("hidden"), given.pop("weight"), given.pop("targets")
    with pytest.raises(ValueError, match=message):
        grpo_head(*head, batch, given.pop("config"), **given)


@pytest.mark.gpu
@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_cuda_equals_cpu(loss: LossForm, dtype: torch.dtype) -> None:
    pack = build_pack(dtype, loss)
    config = ObjectiveConfig(loss=loss, entropy_coefficient=0.05)
    hidden_RD, weight_VD = (leaf.detach().cuda().requires_grad_() for leaf in pack.leaves())
    vectors = {
        name: getattr(pack.batch, name).cuda()
        for name in ("advantage_C", "weight_C", "sequence_C", "old_C", "reference_C", "rollout_C")
    }
    moved = replace(pack, hidden_RD=hidden_RD, weight_VD=weight_VD, batch=TokenBatch(**vectors))
    cpu, cuda = run(pack, config), run(moved, config)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(cuda.logprob_C.cpu(), cpu.logprob_C, rtol=0, atol=tolerance)
    torch.testing.assert_close(cuda.loss.cpu(), cpu.loss, rtol=tolerance, atol=tolerance)
    assert torch.equal(cuda.terms.clipped_C.cpu(), cpu.terms.clipped_C)
    assert cuda.dropped_share == cpu.dropped_share
    bound = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2**-6}[dtype]
    expected = torch.autograd.grad(cpu.loss, pack.leaves())
    for ours, theirs in zip(torch.autograd.grad(cuda.loss, moved.leaves()), expected, strict=True):
        assert (ours.cpu().double() - theirs.double()).norm() <= bound * theirs.double().norm()
