"""Rewards of a completion's length in tokens, the end of turn included."""

from dataclasses import dataclass

from omnigrpo.schema import Group


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthRange:
    """1 for ``low`` to ``high`` tokens, falling linearly to 0 over ``slope`` tokens on both sides.

    ``slope`` 0 makes it a step. A completion that was cut at the limit counts as long as it is.
    """

    low: int = 80
    high: int = 250
    slope: int = 40

    def __post_init__(self) -> None:
        """Raises ValueError for a range without lengths."""
        if not 0 <= self.low <= self.high or self.slope < 0:
            raise ValueError(
                f"need 0 <= low <= high and slope >= 0, got low {self.low}, high {self.high}, slope {self.slope}"
            )

    def __call__(self, group: Group) -> list[float]:
        """Score every completion of ``group``."""
        return [self.value(len(completion.token_ids)) for completion in group.completions]

    def value(self, length: int) -> float:
        """The reward of this many tokens."""
        outside = max(self.low - length, length - self.high, 0)
        return float(outside == 0) if self.slope == 0 else max(0.0, 1.0 - outside / self.slope)


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthCap:
    """0 up to ``cap`` tokens, falling linearly to -1 at ``cap + slope`` and staying there.

    DAPO's soft overlong punishment (arXiv:2503.14476, equation 13) has ``cap = L_max - L_cache`` and
    ``slope = L_cache``: with ``rollout.max_new_tokens = cap + slope`` a completion cut at the limit gets -1.
    ``slope`` 0 makes it a step.
    """

    cap: int = 384
    slope: int = 128

    def __post_init__(self) -> None:
        """Raises ValueError for negative lengths."""
        if self.cap < 0 or self.slope < 0:
            raise ValueError(f"need cap >= 0 and slope >= 0, got cap {self.cap}, slope {self.slope}")

    def __call__(self, group: Group) -> list[float]:
        """Score every completion of ``group``."""
        return [self.value(len(completion.token_ids)) for completion in group.completions]

    def value(self, length: int) -> float:
        """The reward of this many tokens."""
        over = max(length - self.cap, 0)
        return -float(over > 0) if self.slope == 0 else -min(1.0, over / self.slope)
