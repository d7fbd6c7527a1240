"""Rewards that read the model, at hand-computed log-probs; the model's own are in tests/attribution."""

from dataclasses import replace

import pytest

from omnigrpo.reward.composition import RewardConfig, RewardSet, RewardTerm
from omnigrpo.reward.interface import RewardError
from omnigrpo.schema import Completion, VersionSpan

BOTH = "<think>The eyes. A voice.</think><answer>happy</answer>"
SEEN = "<think>The eyes. Then.</think><answer>happy</answer>"
SILENT = "<think>It. Is so.</think><answer>happy</answer>"
WRONG = "<think>A voice.</think><answer>sad</answer>"


class Scorer:
    """Tokens are characters; "The eyes." loses 0.2 per character with the video, "A voice." 0.4 with the audio."""

    def __init__(self, *, lacking=()):
        self.lacking = lacking
        self.asked = []

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))

    def logprobs(self, group, neighbours, changes):
        self.asked.append([(change.modality, change.baseline) for change in changes])
        return [None if c.modality in self.lacking else self.values(group, c) for c in changes]

    def values(self, group, change):
        losses = {"video": ("The eyes.", 0.2), "audio": ("A voice.", 0.4)}
        sentence, loss = losses[change.modality]
        result = []
        for text in group.texts:
            at = text.find(sentence)
            inside = range(at, at + len(sentence)) if at >= 0 else ()
            result.append(tuple(-1.0 - (loss if i in inside else 0.0) for i in range(len(text))))
        return tuple(result)


def grouped(make_group, *texts, modalities=("video", "audio")):
    group = make_group(*texts)
    completions = tuple(
        Completion(
            token_ids=tuple(map(ord, text)),
            logprobs=(-1.0,) * len(text),
            finish_reason="stop",
            version_spans=(VersionSpan(version=0, num_tokens=len(text)),),
            cached_tokens=0,
        )
        for text in texts
    )
    prompt = replace(group.inputs.prompt, modalities=modalities)
    return replace(group, completions=completions, inputs=replace(group.inputs, prompt=prompt))


def rewards(scorer, *names, **options):
    terms = tuple(RewardTerm(name=name, options=options) for name in names)
    return RewardSet.from_config(RewardConfig(terms=terms)).with_scorer(scorer)


def test_grounded_is_the_mean_over_the_cited_modalities(make_group) -> None:
    scorer = Scorer()
    scored = rewards(scorer, "grounded", scale=0.8).score(grouped(make_group, BOTH, SEEN, SILENT))
    assert scored.totals == pytest.approx(((0.25 + 0.5) / 2, 0.25, 0.0))
    assert scorer.asked == [[("video", "swap"), ("audio", "swap")]]


def test_grounded_saturates_and_never_punishes(make_group) -> None:
    assert rewards(Scorer(), "grounded", scale=0.1).score(grouped(make_group, BOTH)).totals == (1.0,)
    negative = Scorer()
    negative.values = lambda group, change: tuple((0.0,) * len(text) for text in group.texts)
    assert rewards(negative, "grounded").score(grouped(make_group, BOTH)).totals == (0.0,)


def test_what_is_said_of_an_absent_modality_is_ungrounded(make_group) -> None:
    scorer = Scorer()
    scored = rewards(scorer, "grounded", scale=0.2).score(grouped(make_group, BOTH, modalities=("video",)))
    assert scored.totals == pytest.approx((0.5,))
    assert scorer.asked == [[("video", "swap")]]


def test_a_modality_that_cannot_be_swapped_is_left_out(make_group) -> None:
    scorer = Scorer(lacking=("audio",))
    scored = rewards(scorer, "grounded", scale=0.4).score(grouped(make_group, BOTH, WRONG))
    assert scored.totals == pytest.approx((0.5, 0.0))


def test_terms_and_baseline_are_options(make_group) -> None:
    scorer = Scorer()
    reward = rewards(scorer, "grounded", scale=0.2, baseline="remove", audio_terms=["then"])
    assert reward.score(grouped(make_group, SEEN)).totals == pytest.approx((0.5,))
    assert scorer.asked == [[("video", "remove"), ("audio", "remove")]]


def test_audio_aware_wants_a_right_answer_that_needs_the_sound(make_group) -> None:
    scored = rewards(Scorer(), "audio_aware", scale=0.4).score(grouped(make_group, BOTH, SEEN, WRONG))
    assert scored.totals == pytest.approx((len("A voice.") / len(BOTH), 0.0, 0.0))


def test_audio_aware_of_the_answers_own_tokens(make_group) -> None:
    scorer = Scorer()
    scorer.values = lambda group, change: tuple(
        tuple(
            -2.0 if "happy" in t[max(i - 4, 0) : i + 5] and t[i] in "happy" else -1.0 for i in range(len(t))
        )
        for t in group.texts
    )
    reward = rewards(scorer, "audio_aware", tokens="answer", scale=2.0)
    assert reward.score(grouped(make_group, SEEN)).totals == pytest.approx((0.5,))


def test_audio_aware_asks_nothing_where_nothing_is_right_or_heard(make_group) -> None:
    scorer = Scorer()
    assert rewards(scorer, "audio_aware").score(grouped(make_group, WRONG)).totals == (0.0,)
    assert scorer.asked == []
    silent = rewards(Scorer(lacking=("audio",)), "audio_aware")
    assert silent.score(grouped(make_group, SEEN)).totals == (0.0,)


def test_rewards_share_what_the_model_was_asked(make_group) -> None:
    scorer = Scorer()
    terms = (
        RewardTerm(name="grounded", options={"baseline": "remove"}),
        RewardTerm(name="audio_aware"),
        RewardTerm(name="accuracy"),
    )
    reward = RewardSet.from_config(RewardConfig(terms=terms)).with_scorer(scorer)
    assert reward.score(grouped(make_group, BOTH)).components["accuracy"] == (1.0,)
    assert scorer.asked == [[("video", "remove"), ("audio", "remove")]]


def test_a_function_of_ones_own_takes_a_context(tmp_path, make_group) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from omnigrpo.reward.context import ModalityChange\n"
        "def heard(group, context):\n"
        "    (drops,) = context.drops(ModalityChange(modality='audio', baseline='swap'))\n"
        "    return [sum(drop) for drop in drops]\n"
    )
    reward = rewards(Scorer(), f"{path}:heard")
    assert reward.reads_model
    assert reward.score(grouped(make_group, BOTH, SEEN)).totals == pytest.approx((0.4 * 8, 0.0))


def test_without_a_scorer_the_reward_says_so(make_group) -> None:
    reward = RewardSet.from_config(RewardConfig(terms=(RewardTerm(name="grounded"),)))
    with pytest.raises(RewardError, match=r"'grounded'.*takes a context.*with_scorer"):
        reward.score(grouped(make_group, BOTH))
    assert not RewardSet.from_config(RewardConfig()).reads_model


def test_a_failure_inside_a_context_reward_names_the_completion(tmp_path, make_group) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def bad(group, context):\n    return [1 / text.count('voice') for text in group.texts]\n"
    )
    with pytest.raises(RewardError, match=r"ZeroDivisionError.*Completion 2 of 2"):
        rewards(Scorer(), f"{path}:bad").score(grouped(make_group, BOTH, SEEN))
