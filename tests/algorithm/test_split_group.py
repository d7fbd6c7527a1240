"""A group in micro-batches: what a micro-batch holds, the rows and gradients of one pass, and memory that G leaves."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from omnigrpo.algorithm.packing import pack
from omnigrpo.algorithm.policy import completion_logprobs, completion_rows
from omnigrpo.algorithm.split_group import completion_passes, frozen_logprobs, micro_batches
from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout


def layout(prefix: int, *lengths: int) -> SharedPrefixLayout:
    return SharedPrefixLayout(prefix_lengths=(prefix,), completion_lengths=(lengths,))


@pytest.mark.parametrize(
    ("budget_rows", "lengths", "runs"),
    [
        (9, (3, 2, 4), [(3, 2), (4,)]),
        (10, (3, 2, 4, 1), [(3, 2), (4, 1)]),
        (8, (4, 1, 4), [(4,), (1,), (4,)]),
        (5, (1, 1, 1), [(1,), (1,), (1,)]),
        (9, (5, 0, 0, 1), [(5, 0, 0), (1,)]),
        (99, (3, 2), [(3, 2)]),
        (7, (3,), [(3,)]),
    ],
)
def test_micro_batches_fill_the_budget_in_order(budget_rows, lengths, runs):
    found = micro_batches(layout(4, *lengths), budget_rows)
    assert [members for _, members in found] == runs
    ends = [0, *(sum(sum(run) for run in runs[: at + 1]) for at in range(len(runs)))]
    assert [tokens for tokens, _ in found] == [slice(*pair) for pair in pairwise(ends)]
    assert all(4 + sum(members) <= budget_rows for _, members in found)


def test_a_completion_over_the_budget_is_refused():
    with pytest.raises(
        ValueError, match="prefix of 4 rows and a completion of 5 exceed the budget of 8 rows"
    ):
        micro_batches(layout(4, 1, 5), 8)


@pytest.fixture(scope="module")
def policy(builders):
    policy = builders.model(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0), dtype=parameter.dtype
            )
    return policy


def packed(builders, lengths):
    return pack(
        [builders.group(builders.inputs("sound", text=(3, 2), modalities=("audio",)), lengths, seed=2)]
    )


@pytest.fixture(scope="module")
def uneven(builders):
    return packed(builders, [3, 1, 7, 5, 1, 1, 6])


def row_weights(rows, width: int) -> Tensor:
    """A weight for each token's row, whichever pass it comes from."""
    angles = torch.arange(rows.tokens.start, rows.tokens.stop)[:, None] + torch.arange(width)
    return angles.double().cos()


def gradients(policy, rows_of_passes) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over every token's hidden row, and its gradients."""
    policy.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for rows in rows_of_passes:
        hidden_CD = rows.hidden_RD[rows.rows_C]
        loss = (hidden_CD * row_weights(rows, hidden_CD.shape[1])).sum()
        loss.backward()
        total += loss.detach()
    named = {name: p.grad.clone() for name, p in policy.trainable_parameters().items() if p.grad is not None}
    policy.zero_grad()
    return total, named


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize(("room", "num_passes"), [(7, 4), (8, 4), (11, 3), (23, 2), (24, 1)])
def test_passes_have_the_sum_and_gradients_of_one(policy, uneven, room, num_passes, recompute):
    budget_rows = uneven.layout.prefix_lengths[0] + room
    policy.decoder.checkpoint_activations = recompute
    passes = []
    try:
        total, mine = gradients(
            policy, (passes.append(rows) or rows for rows in completion_passes(policy, uneven, budget_rows))
        )
    finally:
        policy.decoder.checkpoint_activations = False
    whole, expected = gradients(policy, [completion_rows(policy, uneven)])
    assert len(passes) == num_passes
    assert torch.cat([rows.targets_C for rows in passes]).equal(uneven.completion_ids_C)
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-9)
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-9, msg=name)


def test_frozen_logprobs_equal_one_pass_and_hold_no_graph(policy, uneven):
    budget_rows = uneven.layout.prefix_lengths[0] + 8
    logprob_C = frozen_logprobs(policy, uneven, budget_rows, temperature=0.7)
    with torch.no_grad():
        whole_C = completion_logprobs(policy, uneven, temperature=0.7).logprob_T
    assert not logprob_C.requires_grad
    torch.testing.assert_close(logprob_C, whole_C, rtol=0, atol=1e-9)


def test_the_prefix_passes_once(policy, uneven, monkeypatch):
    calls = []
    prefill = policy.decoder.prefill
    monkeypatch.setattr(
        policy.decoder, "prefill", lambda *given: calls.append(len(given[0])) or prefill(*given)
    )
    gradients(policy, completion_passes(policy, uneven, uneven.layout.prefix_lengths[0] + 7))
    assert calls == [uneven.layout.prefix_lengths[0]]


class SavedBytes:
    """Adds up the bytes that autograd holds for backward beside the weights, a tensor as often as it is saved."""

    def __init__(self, policy) -> None:
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
        self.live = self.peak = 0

    def pack(self, tensor: Tensor) -> "_Saved":
        return _Saved(self, tensor)


class _Saved:
    def __init__(self, counter: SavedBytes, tensor: Tensor) -> None:
        is_weight = tensor.untyped_storage().data_ptr() in counter.weights
        self.counter, self.tensor, self.nbytes = counter, tensor, 0 if is_weight else tensor.nbytes
        counter.live += self.nbytes
        counter.peak = max(counter.peak, counter.live)

    def __del__(self) -> None:
        self.counter.live -= self.nbytes


def peak_saved(policy, pack_of_group, budget_rows) -> int:
    counter = SavedBytes(policy)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda saved: saved.tensor):
        gradients(policy, completion_passes(policy, pack_of_group, budget_rows))
    assert counter.live == 0
    return counter.peak


def test_memory_depends_on_the_budget_and_not_on_the_group(builders, policy):
    few, many = packed(builders, [20] * 4), packed(builders, [20] * 16)
    (prefix,) = few.layout.prefix_lengths
    few_bytes, many_bytes = (peak_saved(policy, group, prefix + 40) for group in (few, many))
    assert many_bytes == pytest.approx(few_bytes, rel=0.02)
    whole = peak_saved(policy, many, many.num_rows)
    assert whole > 3 * many_bytes
