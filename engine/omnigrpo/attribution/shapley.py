"""Shapley values of a game with two players, video and audio (Shapley 1953, in its closed form for two)."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from omnigrpo.schema import Modality


class Coalition(StrEnum):
    """Which modalities are the clip's own; the others are out, as the baseline says."""

    NEITHER = "neither"
    VIDEO = "video"
    AUDIO = "audio"
    BOTH = "both"

    @property
    def absent(self) -> tuple[Modality, ...]:
        """The modalities that are out."""
        return _ABSENT[self]


_ABSENT: dict[Coalition, tuple[Modality, ...]] = {
    Coalition.NEITHER: ("video", "audio"),
    Coalition.VIDEO: ("audio",),
    Coalition.AUDIO: ("video",),
    Coalition.BOTH: (),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapley:
    """What each modality contributes to a value, in the value's unit."""

    video: float
    audio: float


def shapley(values: Mapping[Coalition, float]) -> Shapley:
    """Each player's marginal contribution, averaged over the two orders in which they can join:

        phi_video = ((v(video) - v(neither)) + (v(both) - v(audio))) / 2

    and the same for audio with the roles exchanged. Their sum is v(both) - v(neither).
    """
    neither, video, audio, both = (values[coalition] for coalition in Coalition)
    return Shapley(
        video=((video - neither) + (both - audio)) / 2, audio=((audio - neither) + (both - video)) / 2
    )
