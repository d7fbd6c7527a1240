"""Which frames of a clip are looked at, and how its sound is sampled."""

from dataclasses import dataclass
from typing import Literal, get_args

FramePolicy = Literal["uniform"]
Colour = Literal["tag", "bt601"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """What is taken from every clip; the same for a whole run."""

    num_frames: int = 8
    """Frames per clip."""
    min_frames: int = 2
    """Frames that a clip asked for video must have within its window; 1 lets one frame be repeated."""
    frame_policy: FramePolicy = "uniform"
    """uniform: the middles of equal segments of the frame list, see ``uniform_frame_indices``."""
    sample_rate_hz: int = 16_000
    """Rate of the mono waveform."""
    colour: Colour = "tag"
    """tag: the matrix that a stream names, BT.601 where it names none; bt601: always BT.601, as DALI does."""

    def __post_init__(self) -> None:
        for name in ("num_frames", "min_frames", "sample_rate_hz"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"sampling.{name} must be at least 1, got {value}")
        if self.frame_policy != "uniform":
            raise ValueError(f"sampling.frame_policy must be 'uniform', got {self.frame_policy!r}")
        if self.colour not in get_args(Colour):
            raise ValueError(f"sampling.colour must be 'tag' or 'bt601', got {self.colour!r}")


def uniform_frame_indices(num_frames: int, num_wanted: int) -> tuple[int, ...]:
    """Return the middles of ``num_wanted`` equal segments of ``0..num_frames-1``, rounded half to even.

    HumanOmni's rule: ``round((i + 0.5) * (D - 1) / N + 1e-6)``. Short clips repeat frames.
    """
    if num_frames < 1 or num_wanted < 1:
        raise ValueError(
            f"num_frames and num_wanted must be at least 1, got {num_frames} and {num_wanted}; "
            "a clip without frames cannot be sampled"
        )
    segment = (num_frames - 1) / num_wanted
    return tuple(round((i + 0.5) * segment + 1e-6) for i in range(num_wanted))
