"""The attribution of one clip, as data."""

from dataclasses import dataclass
from enum import StrEnum

from omnigrpo.attribution.shapley import Coalition, Shapley
from omnigrpo.schema import Modality


class Value(StrEnum):
    """What a coalition is worth: the value functions v(S). S stands for the prompt with the modalities of S."""

    ACCURACY = "accuracy"
    """1 if the greedy answer under S is right (alias matching), else 0."""
    GOLD = "gold_logprob"
    """log p(gold answer | S, the reasoning that the model gives under S): the total effect, through the reasoning."""
    GOLD_FIXED = "gold_logprob_fixed"
    """log p(gold answer | S, the reasoning under both): the direct effect, the reasoning held."""
    OWN_FIXED = "own_logprob_fixed"
    """log p(own answer | S, the reasoning under both), for the answer that the model gives under both."""
    REASONING = "reasoning_logprob"
    """Mean log-prob per token, under S, of the reasoning that the model gives under both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClaimCheck:
    """A sentence that cites a modality, with that modality swapped under it."""

    modality: Modality
    text: str
    num_tokens: int
    drop: float
    """Nats per token: mean of log p(token | own clip) - log p(token | the cited modality of the donor)."""
    drop_other: float
    """The same with the other modality swapped, which the sentence does not cite: what any change does."""
    is_unfounded: bool
    """``drop`` is below the threshold: the model would have said as much of another clip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShares:
    """Attention mass from some tokens of the completion, by kind of row; means over these tokens and over heads."""

    mass: dict[str, tuple[float, ...]]
    """By kind (`ROW_KINDS`), one number per layer; the kinds add up to 1."""
    rows: dict[str, float]
    """By kind, its share of the rows that these tokens see: the mass that would be there by chance."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipAttribution:
    """How much each modality contributes for one clip."""

    prompt_id: str
    clip: str
    """Path of the media file."""
    solution: str
    donor: str
    """Prompt whose clip stands in where a modality is swapped."""
    text: str
    """The greedy completion with both modalities."""
    answers: dict[Coalition, str]
    """The greedy answer under every coalition."""
    values: dict[Value, dict[Coalition, float]]
    """v(S), nats for log-probs; without the values that need an answer or reasoning block which is not there."""
    shapley: dict[Value, Shapley]
    attention: dict[str, AttentionShares]
    """From the ``reasoning`` and the ``answer`` tokens, where the completion has such."""
    claims: tuple[ClaimCheck, ...]

    @property
    def is_right(self) -> bool:
        """Whether the answer with both modalities is right."""
        return self.values[Value.ACCURACY][Coalition.BOTH] == 1.0
