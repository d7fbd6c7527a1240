import pytest
import torch

from omnigrpo.algorithm.advantage import AdvantageConfig, group_advantages


def test_hand_computed_group():
    advantages = group_advantages([0.0, 1.0, 2.0], AdvantageConfig(epsilon=0.0))
    assert advantages.tolist() == pytest.approx([-1.0, 0.0, 1.0])


def test_epsilon_adds_to_the_unbiased_std():
    advantages = group_advantages([0.0, 2.0], AdvantageConfig(epsilon=0.5))
    assert advantages.tolist() == pytest.approx([-1 / (2**0.5 + 0.5), 1 / (2**0.5 + 0.5)])


def test_without_scaling_only_the_mean_is_removed():
    advantages = group_advantages([1.0, 4.0], AdvantageConfig(scale_by_std=False))
    assert advantages.tolist() == pytest.approx([-1.5, 1.5])


@pytest.mark.parametrize("rewards", [[1.0, 1.0, 1.0], [3.0]], ids=["all equal", "one sample"])
def test_no_spread_gives_zeros(rewards):
    assert torch.count_nonzero(group_advantages(rewards, AdvantageConfig())) == 0


def test_shift_invariance():
    config = AdvantageConfig()
    base = group_advantages([0.0, 1.0, 1.0, 2.0], config)
    assert torch.allclose(base, group_advantages([5.0, 6.0, 6.0, 7.0], config))
