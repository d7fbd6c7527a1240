"""What an attribution measures."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import cast, get_args

from omnigrpo.reward.context import Baseline
from omnigrpo.reward.modality_claims import Lexicon


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributionConfig:
    """What is measured, and how."""

    baseline: Baseline = "swap"
    """What a modality outside the coalition is replaced by: nothing, or another clip's."""
    seed: int = 0
    """Of the pairing of clips with donors."""
    unfounded_below: float = 0.05
    """Nats per token: a claim that loses less when its modality is swapped is unfounded."""
    lexicon: Lexicon = field(default_factory=Lexicon)
    clips_per_call: int = 16
    """Clips whose completions are drawn at once."""

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that no measurement can use."""
        if self.clips_per_call < 1:
            raise ValueError(f"clips_per_call must be at least 1, got {self.clips_per_call}")
        if not self.unfounded_below >= 0:
            raise ValueError(f"unfounded_below must be at least 0 nats per token, got {self.unfounded_below}")


def attribution_config(
    baseline: str,
    *,
    seed: int,
    unfounded_below: float,
    visual_terms: Iterable[str],
    vocal_terms: Iterable[str],
) -> AttributionConfig:
    """From what a command line gives; raises ValueError for an unknown baseline or an unusable term or number."""
    if baseline not in get_args(Baseline):
        raise ValueError(f"the baseline must be {' or '.join(get_args(Baseline))}, got {baseline!r}")
    return AttributionConfig(
        baseline=cast("Baseline", baseline),
        seed=seed,
        unfounded_below=unfounded_below,
        lexicon=Lexicon().extended(video=visual_terms, audio=vocal_terms),
    )
