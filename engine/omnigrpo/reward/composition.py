"""Several rewards, weighted and added up."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self, cast

from omnigrpo.reward.context import CounterfactualScorer, GroupContext
from omnigrpo.reward.interface import ContextReward, Reward, RewardError
from omnigrpo.reward.loading import Option, component_name, load_reward, reads_model
from omnigrpo.reward.tagged_answer import Preset
from omnigrpo.schema import Group, GroupRewards, PrefixInputs

_SHOWN_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardTerm:
    """One reward of the sum."""

    name: str
    """A built-in (``accuracy``, ``format``, ``grounded``, ``audio_aware``, ``length_range``, ``length_cap``),
    ``package.module:function`` or ``path/to/file.py:function``."""
    weight: float = 1.0
    preset: Preset = Preset.ROBUST
    """Rules of a built-in reward; a user function does not see it."""
    options: dict[str, Option] = field(default_factory=dict)
    """Settings of a built-in reward, e.g. ``{scale = 0.3}`` for ``grounded``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardConfig:
    """The rewards of a run; their weighted sum is what GRPO maximises."""

    terms: tuple[RewardTerm, ...] = (RewardTerm(name="accuracy"), RewardTerm(name="format"))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Component:
    """A reward that is ready to be called."""

    name: str
    weight: float
    reward: Reward | ContextReward


class RewardSet:
    """Scores groups with every configured reward."""

    def __init__(self, components: Sequence[_Component], scorer: CounterfactualScorer | None = None) -> None:
        self._components = tuple(components)
        self._scorer = scorer

    @classmethod
    def from_config(cls, config: RewardConfig) -> Self:
        """Load every reward; raises ValueError for an unknown one, a bad weight, or two of one name."""
        if not config.terms:
            raise ValueError("reward.terms is empty: name at least one reward, e.g. accuracy")
        components: list[_Component] = []
        for term in config.terms:
            name = component_name(term.name)
            if any(name == component.name for component in components):
                raise ValueError(
                    f"two rewards are called {name!r}: metrics could not tell them apart; rename one"
                )
            if not math.isfinite(term.weight):
                raise ValueError(
                    f"the weight of reward {term.name!r} must be a finite number, got {term.weight}"
                )
            reward = load_reward(term.name, Preset(term.preset), term.options)
            components.append(_Component(name=name, weight=term.weight, reward=reward))
        return cls(components)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the components, in configured order."""
        return tuple(component.name for component in self._components)

    @property
    def reads_model(self) -> bool:
        """Whether a reward takes a context, so that ``score`` needs a scorer."""
        return any(reads_model(component.reward) for component in self._components)

    def with_scorer(self, scorer: CounterfactualScorer) -> Self:
        """The same rewards, with the model's log-probs at hand."""
        return type(self)(self._components, scorer)

    def score(self, group: Group, neighbours: Sequence[PrefixInputs] = ()) -> GroupRewards:
        """Call every reward once on the whole group; raises RewardError where one fails.

        ``neighbours`` are the prompts of the same step, whose clips may stand in for the group's own.
        """
        context = None if self._scorer is None else GroupContext(group, neighbours, self._scorer)
        values = {component.name: _values(component, group, context) for component in self._components}
        totals = tuple(
            sum(component.weight * values[component.name][index] for component in self._components)
            for index in range(len(group.texts))
        )
        return GroupRewards(totals=totals, components=values)


def _values(component: _Component, group: Group, context: GroupContext | None) -> tuple[float, ...]:
    if context is None and reads_model(component.reward):
        message = "takes a context, but these rewards have no scorer: call RewardSet.with_scorer"
        raise RewardError(_report(component, group, message, None))
    try:
        returned = _call(component.reward, group, context)
    # A reward is the user's code: whatever it raises is passed on as the cause, with its place.
    except Exception as error:
        message = f"raised {type(error).__name__}: {error}"
        raise RewardError(_report(component, group, message, _culprit(component, group, context))) from error
    return _checked(component, group, returned)


def _call(reward: Reward | ContextReward, group: Group, context: GroupContext | None) -> object:
    returned: object
    if reads_model(reward):
        assert context is not None
        returned = reward(group, context=context)
    else:
        returned = cast("Reward", reward)(group)
    # A generator runs the user's code only here.
    return list(returned) if isinstance(returned, Iterable) else returned


def _checked(component: _Component, group: Group, returned: object) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in returned)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        message = f"returned {_shown(repr(returned))}, which is no sequence of numbers"
        raise RewardError(_report(component, group, message, None)) from error
    if len(values) != len(group.texts):
        message = (
            f"returned {len(values)} values for {len(group.texts)} completions; return one each, in order"
        )
        raise RewardError(_report(component, group, message, None))
    for index, value in enumerate(values):
        if not math.isfinite(value):
            raise RewardError(_report(component, group, f"returned {value}; return a finite number", index))
    return values


def _culprit(component: _Component, group: Group, context: GroupContext | None) -> int | None:
    """The first completion that makes the reward fail alone; None when only the group as a whole does."""
    for index, (completion, text) in enumerate(zip(group.completions, group.texts, strict=True)):
        try:
            alone = replace(group, completions=(completion,), texts=(text,))
            _call(component.reward, alone, None if context is None else context.of(alone))
        except Exception:  # noqa: BLE001 - the reward's own failure is what is looked for
            return index
    return None


def _report(component: _Component, group: Group, message: str, index: int | None) -> str:
    prompt = group.inputs.prompt
    where = f"reward {component.name!r}, prompt {prompt.prompt_id!r} (solution {prompt.solution!r})"
    if index is not None:
        text = _shown(repr(group.texts[index]))
        return f"{where}: {message}. Completion {index + 1} of {len(group.texts)}: {text}"
    texts = "; ".join(f"{number}: {_shown(repr(text))}" for number, text in enumerate(group.texts, start=1))
    return f"{where}: {message}. The group's {len(group.texts)} completions: {texts}"


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."
