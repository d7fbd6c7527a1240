"""Strict TOML and overrides into RunConfig."""

import math
from pathlib import Path

import pytest

from omnigrpo.config import ConfigError, RunConfig, changed_settings, load_config, save_config

REQUIRED = ["model.path=base", "data.train=train.json", "run.output=run"]


def load(*overrides: str) -> RunConfig:
    return load_config(None, [*REQUIRED, *overrides])


def test_saved_and_loaded_is_equal(tmp_path):
    config = load(
        "model.reference='of a kind'",
        "data.evaluate={heldout='h.json', ood='o.json'}",
        "run.threads=3",
        "reward.terms=[{name='accuracy', weight=0.5, preset='robust'}, {name='mine.py:good', weight=2}]",
        "optimizer.betas=[0.8, 0.95]",
        "optimizer.learning_rate=1e-7",
        "objective.loss='dapo'",
        "objective.max_importance_weight=2",
        "media.prefetch_depth=0",
        r"prompt.system_text='it is \ \"said\"'",
    )
    save_config(config, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == config
    assert config != load()


def test_defaults_survive_the_round_trip(tmp_path):
    save_config(load(), tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml") == load()


def test_overrides_win_over_the_file_and_the_last_one_wins(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("model.path = 'base'\ndata.train = 't.json'\nrun = {output = 'r', steps = 5, seed = 2}\n")
    config = load_config(file, ["run.steps=6", "run.steps=7", "rollout.samples=4"])
    assert (config.run.steps, config.run.seed, config.rollout.samples) == (7, 2, 4)


def test_an_override_reaches_a_nested_section():
    config = load("rollout.native.max_decode_rows=32")
    assert config.rollout.native.max_decode_rows == 32
    assert config.rollout.native.max_prefill_tokens == load().rollout.native.max_prefill_tokens


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("model.path='with two spaces'", "with two spaces"),
        ("model.path=with two spaces", "with two spaces"),
        ("model.path='''it's \"here\"'''", 'it\'s "here"'),
        ("model.path=it's here", "it's here"),
        ("model.path='a=b'", "a=b"),
        ("model.path = padded ", "padded"),
    ],
    ids=["quoted", "bare", "quotes inside", "apostrophe", "equals sign", "padded"],
)
def test_paths_as_they_are_typed(override, path):
    assert load(override).model.path == Path(path)


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("trainer.promts_per_step=2", "did you mean trainer.prompts_per_step?"),
        ("trainr.prompts_per_step=2", "did you mean trainer?"),
        ("reward.terms=[{name='accuracy', wieght=2}]", "did you mean reward.terms.weight?"),
        ("reward.terms=[{name='accuracy'}, {nmae='format'}]", "did you mean reward.terms.name?"),
        ("rollout.native.max_decode_row=2", "did you mean rollout.native.max_decode_rows?"),
        ("trainer.zzz=2", "known here: prompts_per_step"),
    ],
)
def test_an_unknown_key_names_the_nearest(override, advice):
    with pytest.raises(ConfigError) as raised:
        load(override)
    assert advice in str(raised.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.samples=many", "rollout.samples"),
        ("rollout.samples=3.5", "rollout.samples"),
        ("rollout.samples='3'", "rollout.samples"),
        ("media.prefetch_depth=true", "media.prefetch_depth"),
        ("objective.loss=grop", "objective.loss"),
        ("rollout.samples=1", "at least 2"),
        ("run.save_every=0", "run.save_every must be at least 1"),
        ("run.steps=0", "run.steps must be at least 1"),
        ("trainer.iterations=0", "trainer.iterations must be at least 1"),
        ("rollout.top_p=1.5", "top_p must be in (0, 1]"),
    ],
)
def test_a_value_that_does_not_fit_is_named(override, message):
    with pytest.raises(ConfigError) as raised:
        load(override)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "key",
    [
        "optimizer.learning_rate",
        "rollout.temperature",
        "objective.kl_coefficient",
        "objective.clip_low",
        "objective.clip_high",
        "objective.entropy_coefficient",
        "advantage.epsilon",
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(key, value):
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        load(f"{key}={value}")


@pytest.mark.parametrize(
    ("key", "option"),
    [("model.path", "--model"), ("data.train", "--data"), ("run.output", "--output")],
)
@pytest.mark.parametrize("with_others", [False, True], ids=["no section", "section without it"])
def test_what_is_required_is_asked_for(key, option, with_others):
    section = key.partition(".")[0]
    other = {"model": "model.dtype=float32", "data": "data.media_root=clips", "run": "run.steps=3"}[section]
    given = [override for override in REQUIRED if not override.startswith(key)]
    with pytest.raises(ConfigError) as raised:
        load_config(None, [*given, *([other] if with_others else [])])
    assert key in str(raised.value)
    assert option in str(raised.value)


@pytest.mark.parametrize("key", ["model", "data", "run"])
def test_a_section_that_is_a_value(key):
    given = [override for override in REQUIRED if not override.startswith(key)]
    with pytest.raises(ConfigError, match=key):
        load_config(None, [*given, f"{key}=3"])


def test_a_resumed_run_may_change_its_length_but_not_its_maths():
    config = load()
    assert changed_settings(config, load()) == []
    assert changed_settings(load("run.steps=7", "run.save_every=1", "run.threads=2"), config) == []
    changed = changed_settings(load("optimizer.learning_rate=0.5", "run.seed=3", "rollout.samples=4"), config)
    assert [line.split()[0] for line in changed] == ["optimizer.learning_rate", "rollout.samples", "run.seed"]
    assert "0.5" in changed[0]
    (terms,) = changed_settings(load("reward.terms=[{name='format'}]"), config)
    assert terms.startswith("reward.terms")


@pytest.mark.parametrize("override", ["run.steps", "=3", ""])
def test_an_override_without_key_or_value(override):
    with pytest.raises(ConfigError, match=r"section\.key=value"):
        load(override)


def test_a_value_is_not_a_section():
    with pytest.raises(ConfigError, match="'steps' is a value, not a section"):
        load("run.steps=3", "run.steps.more=4")


def test_a_file_that_is_missing_or_no_toml(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("rollout.max_staleness=1",), "objective.max_importance_weight is left out"),
        (
            ("rollout.overlap_update=true", "rollout.max_staleness=1", "objective.max_importance_weight=2.0"),
            "rollout.engine is native",
        ),
        (("rollout.overlap_update=true",), "tokens that are 1 updates old"),
    ],
)
def test_parts_that_refuse_each_other_are_refused_before_anything_is_loaded(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(*overrides)
