"""Why a clip cannot be used, and the time it may take."""

import time
from dataclasses import dataclass

from omnigrpo.schema import ClipStatus


class ClipError(Exception):
    """A clip that cannot be used: its status, and the reason as a sentence whose subject is the path."""

    def __init__(self, status: ClipStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class OutOfStepError(Exception):
    """Packets do not tell which pictures there are, so pictures must be counted as they are decoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deadline:
    """When the work on one clip must be done; checked between packets."""

    timeout_seconds: float
    at_seconds: float
    """On ``time.monotonic``'s clock."""

    @classmethod
    def after(cls, timeout_seconds: float) -> "Deadline":
        """The deadline of work that starts now."""
        return cls(timeout_seconds=timeout_seconds, at_seconds=time.monotonic() + timeout_seconds)

    def check(self) -> None:
        """Raise ClipError when the time is over."""
        if time.monotonic() > self.at_seconds:
            raise timeout_error(self.timeout_seconds)


def timeout_error(timeout_seconds: float) -> ClipError:
    """The error of a clip that took too long."""
    return ClipError(
        ClipStatus.TIMEOUT,
        f"was not decoded within {timeout_seconds:g} s: cut it, or raise media.timeout_seconds",
    )
