import math
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from omnigrpo_kernels.grpo_objective import (
    LOG_RATIO_BOUND,
    BatchCounts,
    KlEstimator,
    LossForm,
    ObjectiveConfig,
    TokenBatch,
    TokenTerms,
    couples_sequences,
    kl_penalty,
    token_terms,
    token_weights,
)

LOSSES: tuple[LossForm, ...] = get_args(LossForm)
CLIPPED_LOSSES = [loss for loss in LOSSES if loss not in ("cispo", "sapo")]
each_loss = pytest.mark.parametrize("loss", LOSSES)


def vector(*values: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def tokens(advantage_C: Tensor, **constants: Tensor | None) -> TokenBatch:
    """One sequence of weight 1 per token."""
    given: dict[str, Any] = {
        "weight_C": torch.ones_like(advantage_C),
        "sequence_C": torch.zeros_like(advantage_C).long(),
        **constants,
    }
    return TokenBatch(advantage_C=advantage_C, **given)


def config_of(loss: LossForm = "grpo", **switches: Any) -> ObjectiveConfig:
    return ObjectiveConfig(**({"loss": loss, "kl_coefficient": 0.0} | switches))


def evaluate(logprob_C: Tensor, batch: TokenBatch, config: ObjectiveConfig) -> tuple[TokenTerms, Tensor]:
    """Terms, and the gradient of the weighted loss with respect to the log-probs."""
    logprob_C = logprob_C.detach().requires_grad_()
    terms = token_terms(logprob_C, torch.zeros_like(logprob_C), batch, config)
    loss = (batch.weight_C.to(logprob_C.dtype) * terms.loss_C).sum()
    return terms, torch.autograd.grad(loss, logprob_C)[0]


def at_ratios(ratios: list[float], advantages: list[float], **switches: Any) -> tuple[TokenTerms, Tensor]:
    """Single tokens with the given ratio to the old policy, float64."""
    logprob_C = vector(*(math.log(ratio) - 1 for ratio in ratios))
    batch = tokens(vector(*advantages), old_C=torch.full_like(logprob_C, -1.0))
    return evaluate(logprob_C, batch, config_of(**switches))


@dataclass(frozen=True)
class Sequence:
    """One completion of a test batch, float64."""

    logprob: Tensor
    old: Tensor
    reference: Tensor
    advantage: float
    active: tuple[bool, ...]


LENGTHS = (3, 1, 4, 2, 5)
ADVANTAGES = (1.2, -0.7, -1.5, 0.9, 0.4)
ACTIVE = ((True, False, True), (True,), (True,) * 4, (False, False), (True,) * 5)
DRIFTS = {
    "on-policy": (0.0,) * 5,
    "inside": (0.02, -0.03, 0.1, 0.0, -0.1),
    "beyond": (0.5, -0.6, 0.7, 0.0, -0.5),
}
LOW, HIGH, BETA, LONGEST = 0.2, 0.3, 0.05, 7


def random_sequences(regime: str) -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)
    sequences = []
    for length, advantage, active, drift in zip(LENGTHS, ADVANTAGES, ACTIVE, DRIFTS[regime], strict=True):
        logprob, noise, reference = torch.randn(3, length, dtype=torch.float64, generator=generator)
        logprob = logprob - 2
        old = logprob - drift - (0.0 if regime == "on-policy" else 0.05) * noise
        sequences.append(Sequence(logprob, old, logprob + 0.5 * reference, advantage, active))
    return sequences


def published_loss(loss: LossForm, sequences: list[Sequence], logprobs: list[Tensor], beta: float) -> Tensor:
    """The formulas of the module's table, sequence by sequence and token by token, of one pack."""
    total = torch.zeros((), dtype=torch.float64)
    num_tokens = sum(sum(sequence.active) for sequence in sequences)
    for sequence, logprob in zip(sequences, logprobs, strict=True):
        places = [t for t, active in enumerate(sequence.active) if active]
        if not places:
            continue
        ratios = {t: (logprob[t] - sequence.old[t]).exp() for t in places}
        if loss == "gspo":
            product = torch.stack([ratios[t] for t in places]).prod()
            ratios = dict.fromkeys(places, product ** (1 / len(places)))
        objective = torch.zeros((), dtype=torch.float64)
        for t in places:
            r, a, log_ref = ratios[t], sequence.advantage, sequence.reference[t] - logprob[t]
            if loss == "cispo":
                gain = min(r.detach(), 1 + HIGH) * a * logprob[t]
            elif loss == "sapo":
                temperature = 1.0 if a > 0 else 1.05
                gain = a * (4 / temperature) / (1 + torch.exp(-temperature * (r - 1)))
            else:
                gain = min(r * a, max(1 - LOW, min(r, 1 + HIGH)) * a)
            objective = objective + gain - beta * (log_ref.exp() - log_ref - 1)
        if loss in ("grpo", "gspo", "sapo"):
            total = total - objective / len(places) / len(sequences)
        elif loss == "dr_grpo":
            total = total - objective / LONGEST / len(sequences)
        else:
            total = total - objective / num_tokens
    return total


def packed(
    loss: LossForm, sequences: list[Sequence], counts: BatchCounts, *, on_policy: bool
) -> tuple[Tensor, TokenBatch]:
    lengths_S = torch.tensor([len(sequence.logprob) for sequence in sequences])
    sequence_C = torch.arange(len(sequences)).repeat_interleave(lengths_S)
    active_C = torch.tensor([active for sequence in sequences for active in sequence.active])
    active_S = torch.tensor([sum(sequence.active) for sequence in sequences])
    batch = TokenBatch(
        advantage_C=torch.tensor([s.advantage for s in sequences], dtype=torch.float64)[sequence_C],
        weight_C=token_weights(loss, active_S[sequence_C] * active_C, counts),
        sequence_C=sequence_C + 40,
        old_C=None if on_policy else torch.cat([sequence.old for sequence in sequences]),
        reference_C=torch.cat([sequence.reference for sequence in sequences]),
    )
    return torch.cat([sequence.logprob for sequence in sequences]), batch


def counts_of(sequences: list[Sequence], num_packs: int = 1) -> BatchCounts:
    return BatchCounts(
        num_sequences=len(sequences),
        num_tokens=sum(sum(sequence.active) for sequence in sequences),
        max_tokens=LONGEST,
        num_packs=num_packs,
    )


def loss_and_gradient(logprob_C: Tensor, batch: TokenBatch, config: ObjectiveConfig) -> tuple[float, Tensor]:
    terms, gradient_C = evaluate(logprob_C, batch, config)
    return (batch.weight_C * terms.loss_C).sum().item(), gradient_C


@each_loss
@pytest.mark.parametrize("regime", DRIFTS)
@pytest.mark.parametrize("beta", [0.0, BETA], ids=["no KL", "k3"])
def test_every_loss_is_its_published_formula(loss: LossForm, regime: str, beta: float) -> None:
    sequences = random_sequences(regime)
    leaves = [sequence.logprob.clone().requires_grad_() for sequence in sequences]
    expected = published_loss(loss, sequences, leaves, beta)
    expected_gradients = torch.autograd.grad(expected, leaves, allow_unused=True)
    expected_C = torch.cat(
        [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, expected_gradients, strict=True)]
    )

    logprob_C, batch = packed(loss, sequences, counts_of(sequences), on_policy=regime == "on-policy")
    order = torch.randperm(len(logprob_C), generator=torch.Generator().manual_seed(1))
    config = ObjectiveConfig(loss=loss, clip_low=LOW, clip_high=HIGH, kl_coefficient=beta)
    value, gradient_C = loss_and_gradient(logprob_C[order], batch.select(order), config)
    assert value == pytest.approx(expected.item(), rel=1e-12, abs=1e-13)
    torch.testing.assert_close(gradient_C, expected_C[order], rtol=1e-11, atol=1e-14)

    clipped_C = token_terms(logprob_C, torch.zeros_like(logprob_C), batch, config).clipped_C
    assert bool(clipped_C.any()) is (regime == "beyond" and loss != "sapo")


def test_r1_omnis_loss_form() -> None:
    """mean over sequences of sum(mask * -(exp(lp - sg(lp)) A - 0.04 k3)) / sum(mask), as its trainer writes it."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 1, 4]
    logprob = torch.randn(8, dtype=torch.float64, generator=generator).sub(2).requires_grad_()
    reference = torch.randn(8, dtype=torch.float64, generator=generator) - 2
    advantage_S = vector(0.5, -1.5, 1.0)
    sequence = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    spelt = torch.zeros((), dtype=torch.float64)
    for s, (lp, ref) in enumerate(zip(logprob.split(lengths), reference.split(lengths), strict=True)):
        kl = torch.exp(ref - lp) - (ref - lp) - 1
        spelt = spelt + (-(torch.exp(lp - lp.detach()) * advantage_S[s] - 0.04 * kl)).mean() / 3
    counts = BatchCounts(num_sequences=3, num_tokens=8, max_tokens=4, num_packs=1)
    batch = TokenBatch(
        advantage_C=advantage_S[sequence],
        weight_C=token_weights("grpo", torch.tensor(lengths)[sequence], counts),
        sequence_C=sequence,
        reference_C=reference,
    )
    value, gradient_C = loss_and_gradient(logprob, batch, ObjectiveConfig())
    assert value == pytest.approx(spelt.item(), abs=1e-14)
    torch.testing.assert_close(gradient_C, torch.autograd.grad(spelt, logprob)[0], rtol=0, atol=1e-14)


@each_loss
def test_on_policy_the_ratio_is_one_and_carries_the_gradient(loss: LossForm) -> None:
    logprob_C, advantage_C = vector(-3.7, -0.1), vector(2.0, -1.0)
    terms, gradient_C = evaluate(logprob_C, tokens(advantage_C), config_of(loss, clip_low=0.0, clip_high=0.0))
    assert terms.ratio_C.tolist() == [1.0, 1.0]
    assert gradient_C.tolist() == pytest.approx([-2.0, 1.0], abs=1e-15)
    assert not terms.clipped_C.any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "binds"),
    [
        (1.5, 1.0, -1.2, True),
        (1.5, -1.0, 1.5, False),
        (0.5, 1.0, -0.5, False),
        (0.5, -1.0, 0.8, True),
        (1.1, 2.0, -2.2, False),
        (1.5, 0.0, 0.0, False),
        (0.5, 0.0, 0.0, False),
    ],
    ids=["high, good", "high, bad", "low, good", "low, bad", "inside", "high, neutral", "low, neutral"],
)
def test_the_clip_binds_only_where_it_lowers_the_objective(
    ratio: float, advantage: float, loss: float, binds: bool
) -> None:
    terms, gradient_C = at_ratios([ratio], [advantage])
    assert terms.loss_C.item() == pytest.approx(loss)
    assert bool(terms.clipped_C) is binds
    assert gradient_C.item() == pytest.approx(0.0 if binds else loss)


def test_clip_higher_moves_only_the_upper_edge() -> None:
    terms, _ = at_ratios([1.25, 0.75], [1.0, -1.0], clip_high=0.28)
    assert terms.clipped_C.tolist() == [False, True]


@pytest.mark.parametrize("loss", CLIPPED_LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_tie_at_the_edge_keeps_the_gradient(loss: LossForm, advantage: float) -> None:
    logprob_C, old_C = vector(0.3 * advantage), vector(0.0)
    ratio = torch.exp(logprob_C).item()
    edges = {"clip_high": ratio - 1} if advantage > 0 else {"clip_low": 1 - ratio}
    batch = tokens(vector(advantage), old_C=old_C)
    terms, gradient_C = evaluate(logprob_C, batch, config_of(loss, **edges))
    assert gradient_C.item() == pytest.approx(-advantage * ratio)
    assert not terms.clipped_C.any()
    inside = {name: edge * (1 - 1e-12) for name, edge in edges.items()}
    terms, gradient_C = evaluate(logprob_C, batch, config_of(loss, **inside))
    assert gradient_C.item() == 0.0
    assert terms.clipped_C.all()


@pytest.mark.parametrize("loss", CLIPPED_LOSSES)
def test_dual_clip_bounds_the_ratio_of_bad_tokens(loss: LossForm) -> None:
    logprob_C = vector(math.log(2), 1.1, 1.5, 1.5, math.log(0.5))
    edge = torch.exp(logprob_C)[1].item()
    batch = tokens(vector(-1.0, -1.0, -1.0, 0.5, -1.0), old_C=vector(*[0.0] * 5), sequence_C=torch.arange(5))
    terms, gradient_C = evaluate(logprob_C, batch, config_of(loss, dual_clip=edge))
    assert terms.loss_C.tolist() == pytest.approx([2.0, edge, edge, -0.6, 0.8])
    assert gradient_C.tolist() == pytest.approx([2.0, edge, 0.0, 0.0, 0.0])
    assert terms.clipped_C.tolist() == [False, False, True, True, True]


def test_cispo_caps_the_ratio_at_one_plus_clip_high_and_never_drops_a_token() -> None:
    logprob_C, old_C = vector(-1.0, -1.0, -1.0), vector(-1.0, -3.0, 2.0)
    terms, gradient_C = evaluate(
        logprob_C, tokens(vector(2.0, 2.0, -1.0), old_C=old_C), config_of("cispo", clip_high=4.0)
    )
    low = math.exp(-3)
    assert gradient_C.tolist() == pytest.approx([-2.0, -10.0, low])
    assert terms.loss_C.tolist() == pytest.approx([2.0, 10.0, -low])
    assert terms.clipped_C.tolist() == [False, True, False]


def test_sapo_takes_its_temperatures_by_the_sign_of_the_advantage() -> None:
    terms, gradient_C = at_ratios(
        [1.5, 1.5, 1.5],
        [2.0, -2.0, 0.0],
        loss="sapo",
        sapo_temperature_positive=0.5,
        sapo_temperature_negative=3.0,
    )
    gates = [1 / (1 + math.exp(-0.25)), 1 / (1 + math.exp(-1.5))]
    assert terms.loss_C.tolist() == pytest.approx([-2 * 8 * gates[0], 2 * 4 / 3 * gates[1], 0.0])
    slopes = [4 * gate * (1 - gate) * 1.5 for gate in gates]
    assert gradient_C.tolist() == pytest.approx([-2 * slopes[0], 2 * slopes[1], 0.0])


def test_gspo_shares_the_sequence_ratio_and_takes_an_advantage_per_token() -> None:
    logprob_C, old_C = vector(-1.0, -2.0, -1.5), vector(-1.3, -1.9, -1.5)
    advantage_C = vector(2.0, -1.0, 3.0)
    batch = tokens(advantage_C, old_C=old_C, sequence_C=torch.tensor([7, 7, 2]))
    terms, gradient_C = evaluate(logprob_C, batch, config_of("gspo"))
    s = math.exp((0.3 - 0.1) / 2)
    assert terms.ratio_C.tolist() == pytest.approx([s, s, 1.0])
    assert gradient_C.tolist() == pytest.approx([-2 * s, s, -3.0])
    assert terms.loss_C.tolist() == pytest.approx([-2 * s, s, -3.0])


def test_gspos_mean_is_over_active_tokens_only() -> None:
    logprob_C, old_C = vector(-1.0, -9.0, -1.0, -4.0), vector(-1.1, -1.0, -1.3, -1.0)
    batch = tokens(
        vector(*[1.0] * 4),
        old_C=old_C,
        sequence_C=torch.tensor([0, 0, 0, 1]),
        weight_C=vector(1.0, 0.0, 1.0, 0.0),
    )
    terms, gradient_C = evaluate(logprob_C, batch, config_of("gspo", clip_high=1.0))
    s = math.exp(0.2)
    assert terms.ratio_C.tolist() == pytest.approx([s, 1.0, s, 1.0])
    assert gradient_C.tolist() == pytest.approx([-s, 0.0, -s, 0.0])


def test_gspo_of_one_token_is_grpo() -> None:
    logprob_C, old_C = vector(-1.0, -0.4, -2.0), vector(-1.1, -0.9, -1.5)
    batch = tokens(vector(1.0, 1.0, -1.0), old_C=old_C, sequence_C=torch.tensor([2, 0, 1]))
    (gspo, gspo_gradient_C), (grpo, grpo_gradient_C) = (
        evaluate(logprob_C, batch, config_of(loss)) for loss in ("gspo", "grpo")
    )
    torch.testing.assert_close(gspo.loss_C, grpo.loss_C, rtol=1e-14, atol=0)
    torch.testing.assert_close(gspo_gradient_C, grpo_gradient_C, rtol=1e-14, atol=0)
    assert gspo.clipped_C.tolist() == grpo.clipped_C.tolist() == [False, True, True]


@pytest.mark.parametrize("x", [0.3, -0.3, 0.029, -0.001])
def test_kl_estimators(x: float) -> None:
    k3, k3_slope = math.exp(-x) - 1 + x, 1 - math.exp(-x)
    expected = {"k1": (x, 1.0), "k2": (x * x / 2, x), "k3": (k3, k3_slope), "k3_k2grad": (k3, x)}
    for estimator in get_args(KlEstimator):
        logprob_C = vector(x).requires_grad_()
        kl_C = kl_penalty(logprob_C, vector(0.0), estimator)
        (gradient_C,) = torch.autograd.grad(kl_C.sum(), logprob_C)
        assert kl_C.item() == pytest.approx(expected[estimator][0], rel=1e-9), estimator
        assert gradient_C.item() == pytest.approx(expected[estimator][1], rel=1e-9), estimator


@pytest.mark.parametrize("x", [1e-8, 1e-5, -1e-5, 3e-4, 0.0299, 0.0301, -0.0301, 1.0, -3.0, 15.0])
def test_k3_keeps_value_and_gradient_in_float32(x: float) -> None:
    logprob_C = vector(x, dtype=torch.float32).requires_grad_()
    exact = logprob_C.item()
    kl_C = kl_penalty(logprob_C, vector(0.0, dtype=torch.float32), "k3")
    (gradient_C,) = torch.autograd.grad(kl_C.sum(), logprob_C)
    series = sum((-exact) ** n / math.factorial(n) for n in range(2, 14))
    value = series if abs(exact) < 0.1 else math.expm1(-exact) + exact
    assert kl_C.item() == pytest.approx(value, rel=1e-5, abs=0)
    assert gradient_C.item() == pytest.approx(-math.expm1(-exact), rel=1e-6, abs=0)


def test_k3_is_exact_on_both_sides_of_its_series_in_float64() -> None:
    for x in (1e-6, 1e-3, 0.02999999, 0.03000001, -0.02999999, -0.03000001):
        value = sum((-x) ** n / math.factorial(n) for n in range(2, 18))
        assert kl_penalty(vector(x), vector(0.0), "k3").item() == pytest.approx(value, rel=3e-14, abs=0)


@pytest.mark.parametrize("estimator", get_args(KlEstimator))
@pytest.mark.parametrize("x", [-300.0, -LOG_RATIO_BOUND - 1, LOG_RATIO_BOUND + 1, 300.0])
def test_kl_far_from_the_reference_is_finite_and_bounded(estimator: KlEstimator, x: float) -> None:
    logprob_C = vector(x, dtype=torch.float32).requires_grad_()
    kl_C = kl_penalty(logprob_C, vector(0.0, dtype=torch.float32), estimator)
    (gradient_C,) = torch.autograd.grad(kl_C.sum(), logprob_C)
    assert gradient_C.item() == {"k1": 1.0, "k2": x, "k3": 0.0, "k3_k2grad": x}[estimator]
    bound = math.copysign(LOG_RATIO_BOUND, x)
    k3 = math.exp(-bound) - 1 + bound
    assert kl_C.item() == pytest.approx({"k1": x, "k2": x * x / 2}.get(estimator, k3), rel=1e-6)


def test_k3_is_unbiased_for_the_exact_kl() -> None:
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * kl_penalty(policy, reference, "k3")).sum().item() == pytest.approx(exact.item())


def test_kl_and_entropy_enter_the_loss() -> None:
    config = ObjectiveConfig(kl_coefficient=0.5, kl_estimator="k2", entropy_coefficient=0.1)
    entropy_C = vector(3.0).requires_grad_()
    terms = token_terms(vector(-0.7), entropy_C, tokens(vector(0.0), reference_C=vector(-1.0)), config)
    assert terms.loss_C.item() == pytest.approx(0.5 * 0.045 - 0.1 * 3)
    assert terms.kl_C is not None
    assert terms.kl_C.item() == pytest.approx(0.045)
    assert torch.autograd.grad(terms.loss_C.sum(), entropy_C)[0].item() == pytest.approx(-0.1)


def test_kl_is_reported_without_its_coefficient() -> None:
    terms, gradient_C = evaluate(
        vector(-0.7), tokens(vector(0.0), reference_C=vector(-1.0)), config_of(kl_estimator="k2")
    )
    assert terms.kl_C is not None
    assert terms.kl_C.item() == pytest.approx(0.045)
    assert terms.loss_C.item() == gradient_C.item() == 0.0


def test_entropy_without_coefficient_is_no_part_of_the_graph() -> None:
    logprob_C, entropy_C = vector(-1.0).requires_grad_(), vector(2.0).requires_grad_()
    terms = token_terms(logprob_C, entropy_C, tokens(vector(1.0)), config_of())
    gradients = torch.autograd.grad(terms.loss_C.sum(), (logprob_C, entropy_C), allow_unused=True)
    assert gradients[1] is None


@pytest.mark.parametrize(
    ("switches", "weights"),
    [
        ({"max_importance_weight": 2.0}, [0.5, 2.0, 1.5, 0.1]),
        ({"importance_correction": "masked", "max_importance_weight": 2.0}, [0.5, 0.0, 1.5, 0.1]),
        (
            {"importance_correction": "masked", "max_importance_weight": 2.0, "min_importance_weight": 0.4},
            [0.5, 0.0, 1.5, 0.0],
        ),
    ],
    ids=["truncated", "masked above", "masked outside"],
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_importance_weights_multiply_the_surrogate_alone(
    switches: dict[str, Any], weights: list[float], on_policy: bool
) -> None:
    old_C = vector(*[-1.0] * 4)
    batch = tokens(
        vector(*[1.0] * 4),
        reference_C=vector(*[-1.5] * 4),
        rollout_C=vector(*(-1 - math.log(w) for w in (0.5, 8.0, 1.5, 0.1))),
        old_C=None if on_policy else old_C,
    )
    config = ObjectiveConfig(kl_coefficient=0.1, kl_estimator="k2", **switches)
    logprob_C = old_C if on_policy else old_C + math.log(1.1)
    ratio, x = (1.0, 0.5) if on_policy else (1.1, 0.5 + math.log(1.1))
    terms, gradient_C = evaluate(logprob_C, batch, config)
    assert terms.importance_C is not None
    assert terms.importance_C.tolist() == pytest.approx(weights)
    assert terms.loss_C.tolist() == pytest.approx([-w * ratio + 0.1 * x * x / 2 for w in weights])
    assert gradient_C.tolist() == pytest.approx([-w * ratio + 0.1 * x for w in weights])


@pytest.mark.parametrize(
    ("switches", "weights"),
    [
        ({"max_importance_weight": 5.0}, [2.0, 5.0, 2.0, 0.3, 5.0]),
        ({"importance_correction": "masked", "max_importance_weight": 5.0}, [2.0, 0.0, 2.0, 0.3, 0.0]),
    ],
    ids=["truncated", "masked"],
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_a_sequences_weight_is_the_product_of_its_tokens(
    switches: dict[str, Any], weights: list[float], on_policy: bool
) -> None:
    """Sequences of products 4 * 0.5 = 2, 2 * 3 = 6 and 0.3, interleaved; a masked token takes no part."""
    ratios = (4.0, 2.0, 0.5, 0.3, 3.0)
    old_C = vector(*[-1.0] * 6)
    batch = tokens(
        vector(*[1.0] * 6),
        sequence_C=torch.tensor([7, 2, 7, 5, 2, 7]),
        weight_C=vector(1, 1, 1, 1, 1, 0),
        rollout_C=vector(*(-1 - math.log(ratio) for ratio in ratios), -math.inf),
        old_C=None if on_policy else old_C,
    )
    terms, gradient_C = evaluate(old_C, batch, config_of(importance_level="sequence", **switches))
    assert terms.importance_C is not None
    assert terms.importance_C[:5].tolist() == pytest.approx(weights)
    assert gradient_C.tolist() == pytest.approx([-w for w in weights] + [0.0])


def test_a_weight_at_the_edge_is_kept() -> None:
    switches = {"importance_correction": "masked", "max_importance_weight": 1.0, "min_importance_weight": 1.0}
    terms, _ = evaluate(vector(-1.0), tokens(vector(1.0), rollout_C=vector(-1.0)), config_of(**switches))
    assert terms.importance_C is not None
    assert terms.importance_C.item() == 1.0


@pytest.mark.parametrize("rollout", [-1e30, 1e30], ids=["never sampled", "absurd"])
def test_importance_weights_do_not_overflow(rollout: float) -> None:
    batch = tokens(vector(1.0), rollout_C=vector(rollout))
    terms, gradient_C = evaluate(vector(-1.0), batch, config_of(max_importance_weight=2.0))
    assert terms.importance_C is not None
    assert terms.importance_C.item() == (2.0 if rollout < 0 else math.exp(-LOG_RATIO_BOUND))
    assert gradient_C.isfinite().all()


@each_loss
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_policy", [True, False])
def test_a_masked_token_reaches_nothing(loss: LossForm, poison: float, on_policy: bool) -> None:
    """Sequence 0 is masked in part, sequence 1 wholly, and sequence 2 not at all."""
    sequence_C = torch.tensor([0, 1, 0, 2, 1, 0, 2])
    masked_C = torch.tensor([False, True, True, False, True, False, False])
    generator = torch.Generator().manual_seed(5)
    clean = torch.randn(6, 7, dtype=torch.float64, generator=generator)
    dirty = clean.masked_fill(masked_C, poison)
    config = ObjectiveConfig(
        loss=loss, kl_coefficient=0.1, entropy_coefficient=0.01, max_importance_weight=2.0
    )
    results = []
    for values, kept in ((dirty, torch.arange(7)), (clean, (~masked_C).nonzero().squeeze(1))):
        logprob_C, entropy_C, advantage_C, old_C, reference_C, rollout_C = values
        batch = TokenBatch(
            advantage_C=advantage_C,
            weight_C=(~masked_C).double() * 0.25,
            sequence_C=sequence_C,
            old_C=None if on_policy else old_C,
            reference_C=reference_C,
            rollout_C=rollout_C,
        ).select(kept)
        leaf_C, entropy_C = logprob_C[kept].requires_grad_(), entropy_C[kept].requires_grad_()
        terms = token_terms(leaf_C, entropy_C, batch, config)
        gradients = torch.autograd.grad((batch.weight_C * terms.loss_C).sum(), (leaf_C, entropy_C))
        results.append((terms, gradients))
    (terms, gradients), (expected, expected_gradients) = results
    assert terms.loss_C[masked_C].tolist() == [0.0] * 3
    assert terms.ratio_C[masked_C].tolist() == [1.0] * 3
    assert not terms.clipped_C[masked_C].any()
    assert terms.kl_C is not None
    assert terms.kl_C[masked_C].tolist() == [0.0] * 3
    torch.testing.assert_close(terms.loss_C[~masked_C], expected.loss_C, rtol=1e-14, atol=0)
    for gradient_C, expected_C in zip(gradients, expected_gradients, strict=True):
        assert gradient_C[masked_C].tolist() == [0.0] * 3
        torch.testing.assert_close(gradient_C[~masked_C], expected_C, rtol=1e-14, atol=0)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_ratios_leave_finite_values_and_gradients(loss: LossForm, dtype: torch.dtype) -> None:
    """At +-500 nats exp overflows float32, and 0 * inf would be the gradient of a clipped token."""
    logprob_C = vector(0.0, 0.0, -500.0, -500.0, -1e30, dtype=dtype)
    batch = tokens(
        vector(1.0, -1.0, 1.0, -1.0, 0.0, dtype=dtype),
        old_C=vector(-500.0, -500.0, 0.0, 0.0, 0.0, dtype=dtype),
        sequence_C=torch.arange(5),
    )
    terms, gradient_C = evaluate(logprob_C, batch, config_of(loss))
    assert terms.loss_C.isfinite().all()
    assert gradient_C.isfinite().all()
    if loss != "cispo":
        assert gradient_C.tolist() == [0.0] * 5
    assert terms.clipped_C[:4].tolist() == {
        "cispo": [True, True, False, False],
        "sapo": [False] * 4,
    }.get(loss, [True, False, False, True])


@each_loss
@pytest.mark.parametrize("on_policy", [True, False])
def test_nothing_waits_for_the_device(loss: LossForm, on_policy: bool) -> None:
    """Meta tensors have no values: whatever asks for one, or for a size that depends on one, raises."""
    values = [
        torch.randn(6, device="meta", requires_grad=grad) for grad in (True, True, False, False, False, False)
    ]
    logprob_C, entropy_C, advantage_C, old_C, reference_C, rollout_C = values
    batch = TokenBatch(
        advantage_C=advantage_C,
        weight_C=token_weights(loss, torch.ones(6, dtype=torch.int64, device="meta"), COUNTS),
        sequence_C=torch.zeros(6, dtype=torch.int64, device="meta"),
        old_C=None if on_policy else old_C,
        reference_C=reference_C,
        rollout_C=rollout_C,
    ).select(torch.zeros(6, dtype=torch.int64, device="meta"))
    config = ObjectiveConfig(
        loss=loss,
        dual_clip=None if loss in ("cispo", "sapo") else 3.0,
        entropy_coefficient=0.1,
        importance_correction="masked",
        max_importance_weight=2.0,
    )
    terms = token_terms(logprob_C, entropy_C, batch, config)
    gradients = torch.autograd.grad((batch.weight_C.float() * terms.loss_C).sum(), (logprob_C, entropy_C))
    assert all(gradient_C.is_meta for gradient_C in gradients)


@each_loss
def test_float32_stays_float32_and_follows_float64(loss: LossForm) -> None:
    sequences = random_sequences("beyond")
    logprob_C, batch = packed(loss, sequences, counts_of(sequences), on_policy=False)
    config = ObjectiveConfig(loss=loss, dual_clip=None if loss in ("cispo", "sapo") else 1.5)
    exact, exact_gradient_C = evaluate(logprob_C, batch, config)
    terms, gradient_C = evaluate(logprob_C.float(), batch, config)
    assert terms.loss_C.dtype == terms.ratio_C.dtype == gradient_C.dtype == torch.float32
    torch.testing.assert_close(terms.loss_C.double(), exact.loss_C, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient_C.double(), exact_gradient_C, rtol=2e-6, atol=2e-6)


@each_loss
def test_all_but_the_loss_is_detached(loss: LossForm) -> None:
    logprob_C = vector(-1.0, -2.0).requires_grad_()
    batch = tokens(vector(1.0, -1.0), old_C=logprob_C * 1.1, reference_C=logprob_C, rollout_C=logprob_C)
    config = ObjectiveConfig(loss=loss, max_importance_weight=2.0)
    terms = token_terms(logprob_C, torch.zeros_like(logprob_C), batch, config)
    assert terms.kl_C is not None
    assert terms.importance_C is not None
    metrics = (terms.kl_C, terms.ratio_C, terms.clipped_C, terms.importance_C)
    assert terms.loss_C.requires_grad
    assert not any(metric_C.requires_grad for metric_C in metrics)


@each_loss
def test_no_tokens(loss: LossForm) -> None:
    empty = vector()
    counts = BatchCounts(num_sequences=0, num_tokens=0, max_tokens=4, num_packs=0)
    weight_C = token_weights(loss, torch.zeros(0, dtype=torch.int64), counts)
    terms, gradient_C = evaluate(empty, tokens(empty, old_C=empty, weight_C=weight_C), config_of(loss))
    assert terms.loss_C.shape == gradient_C.shape == (0,)


@each_loss
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_at_smooth_points(loss: LossForm, estimator: KlEstimator) -> None:
    """CISPO on-policy: elsewhere finite differences see the weight move that its gradient takes as constant."""
    sequences = random_sequences("beyond")
    logprob_C, batch = packed(loss, sequences, counts_of(sequences), on_policy=loss == "cispo")
    config = ObjectiveConfig(loss=loss, kl_coefficient=0.3, kl_estimator=estimator, entropy_coefficient=0.1)

    def weighted_loss(logprob_C: Tensor, entropy_C: Tensor) -> Tensor:
        return (batch.weight_C * token_terms(logprob_C, entropy_C, batch, config).loss_C).sum()

    inputs = (logprob_C.requires_grad_(), (logprob_C.detach() + 9).requires_grad_())
    assert torch.autograd.gradcheck(weighted_loss, inputs, atol=1e-7, rtol=1e-6)


COUNTS = BatchCounts(num_sequences=3, num_tokens=10, max_tokens=10, num_packs=2)


@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        ("grpo", [1 / 6, 1 / 6, 0.0, 1 / 9, 1 / 9, 1 / 9]),
        ("gspo", [1 / 6, 1 / 6, 0.0, 1 / 9, 1 / 9, 1 / 9]),
        ("sapo", [1 / 6, 1 / 6, 0.0, 1 / 9, 1 / 9, 1 / 9]),
        ("dapo", [0.1, 0.1, 0.0, 0.1, 0.1, 0.1]),
        ("cispo", [0.1, 0.1, 0.0, 0.1, 0.1, 0.1]),
        ("dr_grpo", [1 / 30, 1 / 30, 0.0, 1 / 30, 1 / 30, 1 / 30]),
        ("bnpo", [0.1, 0.1, 0.0, 0.1, 0.1, 0.1]),
    ],
)
def test_token_weights(loss: LossForm, weights: list[float]) -> None:
    lengths_C = torch.tensor([2, 2, 0, 3, 3, 3])
    weight_C = token_weights(loss, lengths_C, COUNTS)
    assert weight_C.dtype == torch.float64
    assert weight_C.tolist() == pytest.approx(weights, rel=1e-15)


def test_an_unknown_loss_has_no_weights() -> None:
    with pytest.raises(ValueError, match=r"objective\.loss must be one of grpo, .*got 'gpro'"):
        token_weights("gpro", torch.ones(1), COUNTS)  # pyright: ignore[reportArgumentType]


def pack_sums(loss: LossForm, packs: list[list[Sequence]], counts: BatchCounts) -> tuple[float, Tensor]:
    parts = [
        loss_and_gradient(*packed(loss, pack, counts, on_policy=False), ObjectiveConfig(loss=loss))
        for pack in packs
    ]
    return sum(value for value, _ in parts), torch.cat([gradient_C for _, gradient_C in parts])


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "bnpo"])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_packs_add_up_to_one_large_batch(loss: LossForm, cut: int) -> None:
    sequences = random_sequences("beyond")
    whole, gradient_C = pack_sums(loss, [sequences], counts_of(sequences))
    total, gradients_C = pack_sums(
        loss, [sequences[:cut], sequences[cut:]], counts_of(sequences, num_packs=2)
    )
    assert total == pytest.approx(whole, rel=1e-13)
    torch.testing.assert_close(gradients_C, gradient_C, rtol=1e-13, atol=0)


def test_bnpo_is_the_mean_of_its_packs_own_token_means() -> None:
    sequences = random_sequences("beyond")
    packs = [sequences[:2], sequences[2:]]
    means = [pack_sums("dapo", [pack], counts_of(pack))[0] for pack in packs]
    total, _ = pack_sums("bnpo", packs, counts_of(sequences, num_packs=2))
    assert total == pytest.approx(sum(means) / 2, rel=1e-13)
    whole, _ = pack_sums("bnpo", [sequences], counts_of(sequences))
    assert whole == pytest.approx(pack_sums("dapo", [sequences], counts_of(sequences))[0], rel=1e-13)
    assert abs(total - whole) > 0.01


@each_loss
def test_chunks_add_up_to_their_pack(loss: LossForm) -> None:
    sequences = random_sequences("beyond")
    logprob_C, batch = packed(loss, sequences, counts_of(sequences), on_policy=False)
    config = ObjectiveConfig(loss=loss)
    assert couples_sequences(batch, config) is (loss == "gspo")
    edge = 4 if loss == "gspo" else 6
    chunks = [slice(0, edge), slice(edge, None)]
    parts = [loss_and_gradient(logprob_C[chunk], batch.select(chunk), config) for chunk in chunks]
    value, gradient_C = loss_and_gradient(logprob_C, batch, config)
    assert sum(part for part, _ in parts) == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(torch.cat([part for _, part in parts]), gradient_C, rtol=1e-13, atol=0)


def test_sequence_weights_couple_their_tokens_also_on_policy() -> None:
    config = config_of(importance_level="sequence", max_importance_weight=2.0)
    assert couples_sequences(tokens(vector(1.0), rollout_C=vector(0.0)), config)
    assert not couples_sequences(tokens(vector(1.0)), config)
    assert not couples_sequences(
        tokens(vector(1.0), rollout_C=vector(0.0)), config_of(importance_level="sequence")
    )


def test_no_sequence_is_coupled_on_policy() -> None:
    assert not couples_sequences(tokens(vector(1.0)), config_of("gspo"))
    assert couples_sequences(tokens(vector(1.0), old_C=vector(0.0)), config_of("gspo"))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"loss": "gpro"}, "objective.loss must be one of grpo"),
        ({"kl_estimator": "k4"}, "objective.kl_estimator must be one of k1"),
        ({"importance_correction": "clip"}, "objective.importance_correction must be one of truncated"),
        ({"clip_low": 1.1}, "objective.clip_low"),
        ({"clip_low": math.nan}, "objective.clip_low"),
        ({"clip_high": -0.1}, "objective.clip_high"),
        ({"clip_high": math.inf}, "objective.clip_high"),
        ({"dual_clip": 1.0}, "objective.dual_clip"),
        ({"dual_clip": math.nan}, "objective.dual_clip"),
        ({"loss": "cispo", "dual_clip": 3.0}, "objective.dual_clip is 3.0, but objective.loss cispo"),
        ({"loss": "sapo", "dual_clip": 3.0}, "objective.dual_clip is 3.0, but objective.loss sapo"),
        ({"kl_coefficient": -0.1}, "objective.kl_coefficient"),
        ({"kl_coefficient": math.nan}, "objective.kl_coefficient"),
        ({"entropy_coefficient": math.inf}, "objective.entropy_coefficient"),
        ({"max_importance_weight": 0.0}, "objective.max_importance_weight"),
        ({"max_importance_weight": math.inf}, "objective.max_importance_weight"),
        ({"importance_correction": "masked"}, "objective.max_importance_weight is left out"),
        (
            {"max_importance_weight": 2.0, "min_importance_weight": 0.5},
            "objective.min_importance_weight is 0.5, but objective.importance_correction truncated",
        ),
        (
            {
                "importance_correction": "masked",
                "max_importance_weight": 2.0,
                "min_importance_weight": 3.0,
            },
            "objective.min_importance_weight is 3.0, above",
        ),
        ({"min_importance_weight": -1.0}, "objective.min_importance_weight"),
        ({"sapo_temperature_positive": 0.0}, "objective.sapo_temperature_positive"),
        ({"sapo_temperature_negative": math.nan}, "objective.sapo_temperature_negative"),
    ],
)
def test_a_switch_that_no_objective_has_is_named(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        ObjectiveConfig(**switches)
    assert message in str(raised.value)


@each_loss
def test_every_loss_has_valid_defaults(loss: LossForm) -> None:
    assert ObjectiveConfig(loss=loss).loss == loss


@pytest.mark.parametrize("name", ["num_sequences", "num_tokens", "max_tokens", "num_packs"])
def test_counts_below_zero_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        replace(COUNTS, **{name: -1})
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        replace(COUNTS, max_tokens=0)


def test_vectors_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'old_C': \(1,\)"):
        tokens(vector(1.0, 2.0), old_C=vector(1.0))
    with pytest.raises(ValueError, match="TokenBatch"):
        tokens(torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"log-probs \(1,\)"):
        token_terms(vector(1.0), vector(1.0), tokens(vector(1.0, 2.0)), config_of())
    with pytest.raises(ValueError, match=r"entropies \(2,\)"):
        token_terms(vector(1.0), vector(1.0, 2.0), tokens(vector(1.0)), config_of())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_log_probs_are_float32_or_float64(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="give both float32 or float64"):
        token_terms(torch.ones(1, dtype=dtype), torch.ones(1, dtype=dtype), tokens(vector(1.0)), config_of())
    with pytest.raises(ValueError, match="give both float32 or float64"):
        token_terms(vector(1.0), torch.ones(1), tokens(vector(1.0)), config_of())


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"kl_coefficient": 0.5}, r"objective\.kl_coefficient is 0\.5, but the batch has no reference"),
        (
            {"max_importance_weight": 2.0},
            r"objective\.max_importance_weight is 2\.0, but the batch has no rollout",
        ),
    ],
)
def test_a_term_without_its_log_probs_is_refused(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_terms(vector(1.0), vector(1.0), tokens(vector(1.0)), config_of(**switches))


def test_a_mask_is_no_selection() -> None:
    with pytest.raises(ValueError, match="give int64"):
        tokens(vector(1.0, 2.0)).select(torch.tensor([True, False]))


def test_selection_keeps_what_is_there_and_what_is_not() -> None:
    batch = tokens(vector(1.0, 2.0, 3.0), old_C=vector(4.0, 5.0, 6.0))
    by_index, by_slice = batch.select(torch.tensor([2, 1])), batch.select(slice(1, None))
    assert by_index.old_C is not None
    assert by_slice.old_C is not None
    assert (by_index.advantage_C.tolist(), by_index.old_C.tolist()) == ([3.0, 2.0], [6.0, 5.0])
    assert (by_slice.advantage_C.tolist(), by_slice.old_C.tolist()) == ([2.0, 3.0], [5.0, 6.0])
    assert by_slice.advantage_C.data_ptr() == batch.advantage_C[1:].data_ptr()
    assert by_index.reference_C is by_slice.rollout_C is None
