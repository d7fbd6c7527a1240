"""The schedule, the decay groups, clipping, and updates of half-precision weights."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from omnigrpo.runtime.optimizer import (
    Optimizer,
    OptimizerConfig,
    build_optimizer,
    clip_gradients,
    learning_rate,
)


def make_model() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=generator)
    return model


def set_gradients(model: nn.Module, value: float) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_linear_schedule_without_warmup_is_the_references():
    config = OptimizerConfig(learning_rate=1e-6)
    rates = [learning_rate(config, step, 4) for step in range(6)]
    assert rates == pytest.approx([1e-6, 0.75e-6, 0.5e-6, 0.25e-6, 0, 0])


def test_warmup_moves_at_once_and_ends_at_the_peak():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="constant")
    assert [learning_rate(config, step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_schedule_by_hand():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=2, schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 10) for step in (1, 2, 4, 6, 10, 50)]
    quarter = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates == pytest.approx([2.0, 2.0, quarter, 1.1, 0.2, 0.2])


def test_warmup_by_ratio_is_a_share_of_the_run_rounded_up():
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.03, schedule="cosine")
    by_hand = replace(config, warmup_ratio=0.0, warmup_steps=6)  # ceil(0.03 * 181)
    rates = [learning_rate(config, step, 181) for step in range(190)]
    assert rates == [learning_rate(by_hand, step, 181) for step in range(190)]
    assert (rates[0], rates[5]) == (pytest.approx(1 / 6), 1.0)
    assert max(rates[7:]) < 1.0


def test_warmup_is_given_once():
    with pytest.raises(ValueError, match=r"warmup_steps is 3 and warmup_ratio 0\.1: give one"):
        OptimizerConfig(warmup_steps=3, warmup_ratio=0.1)


def test_a_run_shorter_than_its_warmup_is_legal():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=10)
    assert learning_rate(config, 2, 3) == pytest.approx(0.3)


def test_norms_biases_and_frozen_parameters_do_not_decay():
    model = make_model()
    model.get_parameter("2.weight").requires_grad_(False)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig(weight_decay=0.1))
    by_decay = {group["weight_decay"]: set(group["param_names"]) for group in optimizer.param_groups}
    assert by_decay == {0.1: {"0.weight"}, 0.0: {"0.bias", "1.weight", "1.bias", "2.bias"}}


def test_nothing_to_train_is_an_error():
    model = make_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        build_optimizer(model.named_parameters(), OptimizerConfig())


def test_clipping_scales_to_the_limit_and_returns_the_norm_from_before():
    model = make_model()
    set_gradients(model, 3.0)
    count = sum(parameter.numel() for parameter in model.parameters())
    norm = clip_gradients(model.named_parameters(), max_norm=0.5)
    assert norm == pytest.approx(3.0 * math.sqrt(count))
    assert clip_gradients(model.named_parameters(), max_norm=0) == pytest.approx(0.5)
    assert clip_gradients(model.named_parameters(), max_norm=2.0) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_gradient_is_named_and_changes_nothing(value: float):
    model = make_model()
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(learning_rate=1.0), total_steps=5)
    set_gradients(model, 1.0)
    model.get_parameter("1.weight").grad = torch.tensor([value, 1.0, 1.0])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(FloatingPointError, match=r"1 of 6 parameters .* \['1.weight'\]"):
        optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert optimizer.steps_done == 0
    torch.testing.assert_close(model.get_parameter("0.weight").grad, torch.ones(3, 4))


def test_overflow_of_finite_gradients_is_told_apart():
    model = make_model()
    set_gradients(model, 1e38)
    with pytest.raises(FloatingPointError, match="sum of their squares overflows"):
        clip_gradients(model.named_parameters(), max_norm=1.0)


def test_update_equals_adamw_by_hand():
    weight = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant", max_grad_norm=0)
    optimizer = Optimizer([("w", weight)], config, total_steps=10)
    weight.grad = torch.tensor([[4.0]], dtype=torch.float64)
    assert optimizer.step() == pytest.approx(4.0)
    # First step: the bias-corrected moments are g and g^2, so the update is lr * g / (|g| + eps).
    assert weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1 * 4 / (4 + 1e-8), abs=1e-12)
    assert weight.grad is None


def test_learning_rate_follows_the_schedule():
    model = make_model()
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(learning_rate=1.0), total_steps=4)
    rates = [optimizer.learning_rate]
    for _ in range(4):
        set_gradients(model, 1.0)
        optimizer.step()
        rates.append(optimizer.learning_rate)
    assert rates == [1.0, 1.0, 0.75, 0.5, 0.25]


def test_step_without_gradients_moves_the_schedule_only():
    model = make_model()
    optimizer = Optimizer(
        model.named_parameters(), OptimizerConfig(learning_rate=1.0, weight_decay=0.1), total_steps=4
    )
    weight = model.get_parameter("0.weight")
    before = weight.detach().clone()
    assert optimizer.step() == 0.0
    assert torch.equal(weight, before)
    assert optimizer.steps_done == 1


def test_half_precision_weights_gather_updates_smaller_than_their_rounding():
    weight = nn.Parameter(torch.full((2, 2), 1.0, dtype=torch.bfloat16))
    config = OptimizerConfig(learning_rate=1e-4, schedule="constant")
    optimizer = Optimizer([("w", weight)], config, total_steps=100)
    for _ in range(100):
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
        optimizer.step()
    # 100 steps of 1e-4; a bfloat16 step below 1 is 0.004, so each update alone would round to none.
    torch.testing.assert_close(weight.detach().float(), torch.full((2, 2), 0.99), rtol=0, atol=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(dtype: torch.dtype):
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, warmup_steps=2, schedule="cosine")

    def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
        for step in steps:
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.full_like(parameter, math.sin(3.0 * step + index), dtype=torch.float32)
            optimizer.step()

    straight = make_model().to(dtype)
    train(straight, Optimizer(straight.named_parameters(), config, total_steps=6), range(6))

    first = make_model().to(dtype)
    before_kill = Optimizer(first.named_parameters(), config, total_steps=6)
    train(first, before_kill, range(3))
    resumed = make_model().to(dtype)
    resumed.load_state_dict(first.state_dict())
    after_kill = Optimizer(resumed.named_parameters(), config, total_steps=6)
    after_kill.load_state_dict(before_kill.state_dict())
    assert after_kill.learning_rate == before_kill.learning_rate
    train(resumed, after_kill, range(3, 6))
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, straight.get_parameter(name)), name


def test_state_of_another_dtype_is_refused():
    half, full = make_model().bfloat16(), make_model()
    saved = Optimizer(half.named_parameters(), OptimizerConfig(), total_steps=1).state_dict()
    with pytest.raises(ValueError, match="copies of 6 parameters, this one of 0"):
        Optimizer(full.named_parameters(), OptimizerConfig(), total_steps=1).load_state_dict(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", -1.0),
        ("learning_rate", math.nan),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("warmup_steps", -1),
        ("schedule", "step"),
        ("min_lr_ratio", 2.0),
        ("warmup_ratio", 1.5),
    ],
)
def test_invalid_config_names_the_field(field: str, value: object):
    with pytest.raises(ValueError, match=field):
        replace(OptimizerConfig(), **{field: value})
