"""Length rewards at hand-computed lengths and at their edges."""

from dataclasses import replace

import pytest

from omnigrpo.reward.composition import RewardConfig, RewardSet, RewardTerm
from omnigrpo.reward.length import LengthCap, LengthRange
from omnigrpo.schema import Completion, Group, VersionSpan


def of_lengths(group: Group, lengths) -> Group:
    completions = tuple(
        Completion(
            token_ids=(5,) * length,
            logprobs=(-1.0,) * length,
            finish_reason="length" if length == 9 else "stop",
            version_spans=(VersionSpan(version=0, num_tokens=length),),
            cached_tokens=0,
        )
        for length in lengths
    )
    return replace(group, completions=completions, texts=("",) * len(lengths))


@pytest.mark.parametrize(
    ("reward", "values"),
    [
        (LengthRange(low=4, high=6, slope=4), {0: 0, 1: 0.25, 3: 0.75, 4: 1, 6: 1, 7: 0.75, 10: 0, 99: 0}),
        (LengthRange(low=4, high=6, slope=0), {3: 0, 4: 1, 6: 1, 7: 0}),
        (LengthRange(low=0, high=0, slope=2), {0: 1, 1: 0.5, 2: 0}),
        (LengthCap(cap=4, slope=4), {0: 0, 4: 0, 5: -0.25, 8: -1, 99: -1}),
        (LengthCap(cap=4, slope=0), {4: 0, 5: -1}),
    ],
)
def test_values(reward, values, make_group) -> None:
    assert reward(of_lengths(make_group("a"), list(values))) == list(values.values())


def test_the_cap_is_daposs_overlong_punishment() -> None:
    """Equation 13 of arXiv:2503.14476 with L_max 20 and L_cache 5."""
    reward = LengthCap(cap=15, slope=5)
    for length in range(30):
        expected = 0 if length <= 15 else (15 - length) / 5 if length <= 20 else -1
        assert reward.value(length) == pytest.approx(expected)


def test_a_truncated_completion_counts_as_long_as_it_is(make_group) -> None:
    assert LengthRange(low=8, high=9, slope=1)(of_lengths(make_group("a"), [9])) == [1.0]


def test_options_reach_the_reward(make_group) -> None:
    term = RewardTerm(name="length_range", options={"low": 1, "high": 2, "slope": 2})
    scored = RewardSet.from_config(RewardConfig(terms=(term,))).score(of_lengths(make_group("a"), [2, 3]))
    assert scored.totals == (1.0, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("length_range", {"low": 9, "high": 3}, "'length_range'.*low 9, high 3"),
        ("length_range", {"slope": -1}, "slope >= 0"),
        ("length_cap", {"cap": -1}, "need cap >= 0"),
        ("length_cap", {"cp": 1}, "'length_cap' has no option 'cp': did you mean 'cap'"),
        ("length_cap", {"cap": "many"}, "cap: Input should be a valid integer"),
        ("format", {"cap": 1}, "'format' has no option 'cap': it has none"),
        ("math:sqrt", {"cap": 1}, "options \\['cap'\\] are for built-in rewards"),
        ("grounded", {"scale": 0}, "scale must be above 0"),
        ("grounded", {"baseline": "mute"}, "baseline: Input should be 'remove' or 'swap'"),
        ("grounded", {"audio_terms": ["("]}, "a term must be a word"),
        ("audio_aware", {"scale": -1.0}, "scale must be above 0"),
    ],
)
def test_bad_options_are_refused_by_name(name, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSet.from_config(RewardConfig(terms=(RewardTerm(name=name, options=options),)))
