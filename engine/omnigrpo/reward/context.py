"""What a reward may ask of the model: how a group's log-probs change with a modality of its prompt.

A reward asks by taking a second parameter called ``context``; the run then hands it a `GroupContext`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from omnigrpo.reward.token_spans import Span, token_spans
from omnigrpo.schema import Group, Modality, PrefixInputs

Baseline = Literal["remove", "swap"]
"""``remove``: the prompt without the modality's rows and tags. ``swap``: those rows from another clip."""

TokenValues = tuple[tuple[float, ...], ...]
"""One number per token, by completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModalityChange:
    """A counterfactual prompt: one modality taken out, or another clip's put in its place."""

    modality: Modality
    baseline: Baseline


class CounterfactualScorer(Protocol):
    """Scores given completions under changed prompts, by the policy's current weights."""

    def logprobs(
        self, group: Group, neighbours: Sequence[PrefixInputs], changes: Sequence[ModalityChange]
    ) -> Sequence[TokenValues | None]:
        """Log-prob of every completion token at the rollout's temperature, per change; all in one packed forward.

        ``neighbours`` are the other prompts of the step, whose clips a swap may take. None for a change that the group
        cannot undergo: its prompt lacks the modality, or no neighbour has another clip with it.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out, as in ``Group.texts``."""
        ...


class GroupContext:
    """One group's access to the scorer; what one reward asked for is at hand for the next."""

    def __init__(
        self, group: Group, neighbours: Sequence[PrefixInputs], scorer: CounterfactualScorer
    ) -> None:
        self._group, self._neighbours, self._scorer = group, neighbours, scorer
        self._known: dict[ModalityChange, TokenValues | None] = {}
        self._spans: tuple[tuple[Span, ...], ...] | None = None

    def of(self, group: Group) -> "GroupContext":
        """The same for another group of the step."""
        return GroupContext(group, self._neighbours, self._scorer)

    @property
    def token_spans(self) -> tuple[tuple[Span, ...], ...]:
        """By completion, the characters of ``Group.texts`` that each token wrote."""
        if self._spans is None:
            decode: Callable[[Sequence[int]], str] = self._scorer.decode
            self._spans = tuple(token_spans(c.token_ids, decode) for c in self._group.completions)
        return self._spans

    def drops(self, *changes: ModalityChange) -> list[TokenValues | None]:
        """Per change: rollout log-prob minus counterfactual log-prob of every token, in nats; None as in the scorer.

        Changes that were not asked for before go through the decoder together, once.
        """
        fresh = [change for change in dict.fromkeys(changes) if change not in self._known]
        if fresh:
            scored = self._scorer.logprobs(self._group, self._neighbours, fresh)
            self._known |= {
                change: None if values is None else self._subtract(values)
                for change, values in zip(fresh, scored, strict=True)
            }
        return [self._known[change] for change in changes]

    def _subtract(self, counterfactual: TokenValues) -> TokenValues:
        return tuple(
            tuple(own - other for own, other in zip(completion.logprobs, values, strict=True))
            for completion, values in zip(self._group.completions, counterfactual, strict=True)
        )
