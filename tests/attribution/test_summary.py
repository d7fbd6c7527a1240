"""Means over clips by hand, and the tables that show them."""

import math

import pytest

from omnigrpo.attribution.clip_attribution import AttentionShares, ClaimCheck, ClipAttribution, Value
from omnigrpo.attribution.shapley import Coalition, shapley
from omnigrpo.attribution.summary import Mean, summarise
from omnigrpo.attribution.tables import all_figures


def clip(name, solution, accuracy, gold, *, claims=(), layers=(0.2, 0.4)) -> ClipAttribution:
    values = {Value.ACCURACY: dict(zip(Coalition, accuracy, strict=True))}
    if gold is not None:
        values[Value.GOLD] = dict(zip(Coalition, gold, strict=True))
    attention = {
        "reasoning": AttentionShares(
            mass={
                "video": layers,
                "audio": (0.1, 0.1),
                "text": (0.3, 0.3),
                "completion": tuple(0.6 - x for x in layers),
            },
            rows={"video": 0.4, "audio": 0.3, "text": 0.2, "completion": 0.1},
        )
    }
    return ClipAttribution(
        prompt_id=name, clip=f"{name}.mp4", solution=solution, donor="x", text="", answers={}, values=values,
        shapley={value: shapley(by_coalition) for value, by_coalition in values.items()},
        attention=attention, claims=claims,
    )  # fmt: skip


def claim(modality, drop) -> ClaimCheck:
    return ClaimCheck(
        modality=modality, text="", num_tokens=3, drop=drop, drop_other=0.0, is_unfounded=drop < 0.05
    )


CLIPS = [
    clip("a", "sad", (0, 0, 1, 1), (-4, -4, -1, -1), claims=(claim("video", 0.0), claim("video", 0.2))),
    clip("b", "sad", (0, 1, 0, 1), (-4, -2, -3, 0), layers=(0.4, 0.4)),
    clip("c", "fear", (0, 0, 0, 0), None, claims=(claim("video", 0.4),)),
]


def test_means_and_standard_errors() -> None:
    mean = Mean.of([1.0, 2.0, 4.0])
    assert mean.mean == pytest.approx(7 / 3)
    assert mean.standard_error == pytest.approx(math.sqrt(7 / 3) / math.sqrt(3))
    assert Mean.of([2.0]) == Mean(mean=2.0, standard_error=None, count=1)
    assert (str(mean), str(Mean.of([2.0]))) == ("2.33 +- 0.88", "2.00")


def test_figures_by_hand() -> None:
    summary = summarise(CLIPS)
    accuracy, gold = summary.values[Value.ACCURACY], summary.values[Value.GOLD]
    assert accuracy.coalitions[Coalition.BOTH].mean == pytest.approx(2 / 3)
    assert (accuracy.video.mean, accuracy.audio.mean) == pytest.approx((1 / 3, 1 / 3))
    assert gold.video.count == 2
    assert (gold.video.mean, gold.audio.mean) == pytest.approx(((0 + 2.5) / 2, (3 + 1.5) / 2))
    assert set(summary.values) == {Value.ACCURACY, Value.GOLD}
    assert set(summary.by_label) == {"sad"}
    assert summary.num_without_claims == 1
    assert set(summary.claims) == {"video"}
    assert summary.claims["video"].unfounded.mean == pytest.approx(1 / 3)
    assert summary.claims["video"].drop.mean == pytest.approx(0.2)
    assert [layer.mean for layer in summary.attention["reasoning"].mass["video"]] == pytest.approx(
        [(0.2 + 0.4 + 0.2) / 3, 0.4]
    )
    assert "answer" not in summary.attention


def test_tables_hold_the_figures_and_leave_empty_ones_out() -> None:
    tables = {table.title: table for table in all_figures(summarise(CLIPS))}
    (by_label,) = [table for title, table in tables.items() if "by label" in title]
    assert by_label.rows == (("sad", "1.25 +- 1.25", "2.25 +- 0.75", "3.50"),)
    text = by_label.markdown().splitlines()
    assert text[2:] == [
        "| label | video | audio | both - neither |",
        "| --- | ---: | ---: | ---: |",
        "| sad | 1.25 +- 1.25 | 2.25 +- 0.75 | 3.50 |",
    ]
    bare = summarise([clip("c", "fear", (0, 0, 0, 0), None)])
    assert not [table for table in all_figures(bare) if "Claims" in table.title or "label" in table.title]
