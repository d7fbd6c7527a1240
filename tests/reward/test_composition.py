import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omnigrpo.reward.composition import RewardConfig, RewardSet, RewardTerm
from omnigrpo.reward.interface import RewardError
from omnigrpo.reward.tagged_answer import Preset
from omnigrpo.schema import Group

MakeGroup = Callable[..., Group]
RIGHT = "<think>a</think><answer>happy</answer>"


def rewards(*terms: RewardTerm) -> RewardSet:
    return RewardSet.from_config(RewardConfig(terms=terms))


@pytest.fixture
def user_reward(tmp_path: Path) -> Callable[[str], RewardSet]:
    """Builds a reward set from the body of ``mine(group)``."""

    def build(body: str) -> RewardSet:
        path = tmp_path / "mine.py"
        path.write_text(f"import math, torch\ndef mine(group):\n    {body}\n")
        return rewards(RewardTerm(name=f"{path}:mine"))

    return build


def test_the_default_is_accuracy_plus_format(make_group: MakeGroup) -> None:
    scored = RewardSet.from_config(RewardConfig()).score(make_group(RIGHT, "<answer>happy</answer>", "sad"))
    assert scored.totals == (2.0, 1.0, 0.0)
    assert scored.components == {"accuracy": (1.0, 1.0, 0.0), "format": (1.0, 0.0, 0.0)}


def test_weights_scale_the_sum_and_leave_the_components(make_group: MakeGroup) -> None:
    scored = rewards(RewardTerm(name="accuracy", weight=2.0), RewardTerm(name="format", weight=-0.5)).score(
        make_group(RIGHT, "<answer>happy</answer>")
    )
    assert scored.totals == (1.5, 2.0)
    assert scored.components["accuracy"] == (1.0, 1.0)


def test_the_preset_reaches_the_built_in(make_group: MakeGroup) -> None:
    group = make_group("happy", "<answer>Happy</answer>")
    assert rewards(RewardTerm(name="accuracy", preset=Preset.REFERENCE)).score(group).totals == (1.0, 0.0)
    assert rewards(RewardTerm(name="accuracy", preset=Preset.ROBUST)).score(group).totals == (0.0, 1.0)


def test_a_function_loads_from_a_file_and_sees_the_whole_group(
    user_reward: Callable[[str], RewardSet], make_group: MakeGroup
) -> None:
    reward_set = user_reward("return [group.texts.count(text) for text in group.texts]")
    scored = reward_set.score(make_group("a", "b", "a"))
    assert reward_set.names == ("mine",)
    assert scored.components == {"mine": (2.0, 1.0, 2.0)}


def test_a_tensor_of_values_is_fine(user_reward: Callable[[str], RewardSet], make_group: MakeGroup) -> None:
    assert user_reward("return torch.tensor([0.5, True])").score(make_group("a", "b")).totals == (0.5, 1.0)


def test_a_function_loads_from_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_group: MakeGroup
) -> None:
    (tmp_path / "users_rewards_package.py").write_text(
        "def brief(group):\n    return [-len(t) for t in group.texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards(RewardTerm(name="users_rewards_package:brief")).score(make_group("abc")).totals == (-3.0,)
    sys.modules.pop("users_rewards_package")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "acuracy",
            r"unknown reward 'acuracy': did you mean 'accuracy'\? Built-in rewards are accuracy, format",
        ),
        (
            "xyz",
            r"unknown reward 'xyz': Built-in rewards are accuracy, format, grounded, .*; a function of yours is",
        ),
        ("no_such_package.rewards:brief", "cannot import 'no_such_package.rewards'"),
        ("no/such/file.py:brief", r"no/such/file.py does not exist; the path is relative to"),
        ("math:sqroot", r"math has no 'sqroot'; did you mean 'sqrt'\?"),
        ("math:pi", "'pi' is a float, not a function"),
    ],
)
def test_a_name_that_leads_nowhere_says_what_exists(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rewards(RewardTerm(name=name))


FAILING_SOURCES = pytest.mark.parametrize(
    ("source", "line", "kind"),
    [
        ("import math\n\nLIMIT = undefined\n", 3, NameError),
        ("LIMIT = 1 + 'a'\n", 1, TypeError),
        ("import json\nTABLE = json.loads('{')\n", 2, ValueError),
        ("def build():\n    return [][0]\n\n\nTABLE = build()\n", 2, IndexError),
        ("\nimport no_such_package_of_mine\n", 2, ImportError),
        ("\n\ndef mine(group:\n", 3, SyntaxError),
    ],
    ids=["name", "type", "in a library", "in a function", "import", "syntax"],
)


@FAILING_SOURCES
def test_a_file_that_fails_to_load_is_named_with_the_line_and_the_exception(
    tmp_path: Path, source: str, line: int, kind: type[Exception]
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    modules = set(sys.modules)
    with pytest.raises(ValueError, match=rf"cannot load .*broken\.py, line {line} \(\w+Error: ") as caught:
        rewards(RewardTerm(name=f"{path}:mine"))
    assert isinstance(caught.value.__cause__, kind)
    assert type(caught.value.__cause__).__name__ in str(caught.value)
    assert not [name for name in set(sys.modules) - modules if name.startswith("omnigrpo_user_reward")]


@FAILING_SOURCES
def test_a_module_that_fails_to_load_is_named_with_the_line_and_the_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, line: int, kind: type[Exception]
) -> None:
    package = tmp_path / "broken_rewards_package"
    package.mkdir()
    (package / "rules.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot load .*rules\.py, line {line} \(\w+Error: ") as caught:
        rewards(RewardTerm(name="broken_rewards_package.rules:mine"))
    assert isinstance(caught.value.__cause__, kind)
    sys.modules.pop("broken_rewards_package", None)


def test_configs_that_cannot_be_summed_are_refused() -> None:
    with pytest.raises(ValueError, match="two rewards are called 'format'"):
        rewards(RewardTerm(name="format"), RewardTerm(name="format"))
    with pytest.raises(ValueError, match="weight of reward 'format' must be a finite number, got nan"):
        rewards(RewardTerm(name="format", weight=float("nan")))
    with pytest.raises(ValueError, match="at least one reward"):
        rewards()


def test_an_exception_names_reward_prompt_and_the_completion_that_caused_it(
    user_reward: Callable[[str], RewardSet], make_group: MakeGroup
) -> None:
    reward_set = user_reward("return [1 / (len(text) - 3) for text in group.texts]")
    with pytest.raises(RewardError) as caught:
        reward_set.score(make_group("fine", "bad", "fine too"))
    message = str(caught.value)
    assert "reward 'mine', prompt 'clip-7'" in message
    assert "ZeroDivisionError" in message
    assert message.endswith("Completion 2 of 3: 'bad'")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_generator_that_fails_is_reported_too(
    user_reward: Callable[[str], RewardSet], make_group: MakeGroup
) -> None:
    with pytest.raises(RewardError, match=r"IndexError.* Completion 2 of 2: ''"):
        user_reward("yield from (float(text[0] == 'a') for text in group.texts)").score(make_group("a", ""))


def test_a_failure_of_the_group_as_a_whole_lists_the_group(
    user_reward: Callable[[str], RewardSet], make_group: MakeGroup
) -> None:
    reward_set = user_reward("return [1 / (len(group.texts) - 2)] * len(group.texts)")
    with pytest.raises(RewardError, match="The group's 2 completions: 1: 'left'; 2: 'right'"):
        reward_set.score(make_group("left", "right"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "returned 1 values for 2 completions"),
        ("return None", "returned None, which is no sequence of numbers"),
        ("return ['high', 'low']", "which is no sequence of numbers"),
        ("return [0.0, math.nan]", r"returned nan; return a finite number\. Completion 2 of 2: 'second'"),
        ("return [math.inf, 0.0]", r"returned inf.* Completion 1 of 2: 'first'"),
    ],
)
def test_unusable_values_are_errors(
    user_reward: Callable[[str], RewardSet], make_group: MakeGroup, body: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        user_reward(body).score(make_group("first", "second"))


def test_a_long_completion_is_shortened_in_the_message(
    user_reward: Callable[[str], RewardSet], make_group: MakeGroup
) -> None:
    with pytest.raises(RewardError) as caught:
        user_reward("raise KeyError('x')").score(make_group("a" * 5000))
    assert len(str(caught.value)) < 1000


def test_torch_scalars_are_numbers(user_reward: Callable[[str], RewardSet], make_group: MakeGroup) -> None:
    values = user_reward("return [torch.tensor(0.25)]").score(make_group("a")).totals
    assert values == (0.25,)
    assert not isinstance(values[0], torch.Tensor)
