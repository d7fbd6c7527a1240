"""The closed form against the definition over all orders of joining, and Shapley's axioms."""

from itertools import permutations

import pytest

from omnigrpo.attribution.shapley import Coalition, shapley

GAMES = [
    {Coalition.NEITHER: 0.1, Coalition.VIDEO: 0.7, Coalition.AUDIO: -2.0, Coalition.BOTH: 3.5},
    {Coalition.NEITHER: -5.0, Coalition.VIDEO: -5.5, Coalition.AUDIO: 0.25, Coalition.BOTH: -1.0},
]
COALITION_OF = {
    frozenset(): Coalition.NEITHER,
    frozenset({"video"}): Coalition.VIDEO,
    frozenset({"audio"}): Coalition.AUDIO,
    frozenset({"video", "audio"}): Coalition.BOTH,
}


def by_definition(values, player):
    orders = list(permutations(["video", "audio"]))
    total = 0.0
    for order in orders:
        before = frozenset(order[: order.index(player)])
        total += values[COALITION_OF[before | {player}]] - values[COALITION_OF[before]]
    return total / len(orders)


@pytest.mark.parametrize("values", GAMES)
def test_it_is_the_mean_over_the_orders_of_joining(values) -> None:
    result = shapley(values)
    assert result.video == pytest.approx(by_definition(values, "video"), abs=1e-12)
    assert result.audio == pytest.approx(by_definition(values, "audio"), abs=1e-12)


@pytest.mark.parametrize("values", GAMES)
def test_the_values_add_up_to_what_both_are_worth(values) -> None:
    result = shapley(values)
    assert result.video + result.audio == pytest.approx(values[Coalition.BOTH] - values[Coalition.NEITHER])


@pytest.mark.parametrize("values", GAMES)
def test_exchanging_the_players_exchanges_the_values(values) -> None:
    mirrored = values | {Coalition.VIDEO: values[Coalition.AUDIO], Coalition.AUDIO: values[Coalition.VIDEO]}
    result, other = shapley(values), shapley(mirrored)
    assert (result.video, result.audio) == (other.audio, other.video)


def test_who_never_changes_a_value_gets_nothing() -> None:
    values = {Coalition.NEITHER: 1.0, Coalition.VIDEO: 1.0, Coalition.AUDIO: 4.0, Coalition.BOTH: 4.0}
    assert (shapley(values).video, shapley(values).audio) == (0.0, 3.0)


@pytest.mark.parametrize("coalition", Coalition)
def test_absent_modalities_are_those_outside_the_coalition(coalition) -> None:
    inside = {members for members, name in COALITION_OF.items() if name is coalition}.pop()
    assert set(coalition.absent) == {"video", "audio"} - inside
