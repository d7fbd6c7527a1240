"""The data that crosses module boundaries.

Shape suffixes: ``P`` prefix rows, ``R`` completion tokens, ``T`` packed rows, ``C`` completion tokens of a
pack, ``S`` sequences (completions) of a pack, ``F`` frames, ``N`` patches of a frame, ``A`` pooled audio
positions, ``M`` mel bins, ``L`` mel frames, ``D`` width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from torch import Tensor

from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

Modality = Literal["video", "audio"]
FinishReason = Literal["stop", "length"]

VIDEO_ROW = -201
"""Placeholder token id of a prefix row that holds a visual embedding (HumanOmni's value)."""
AUDIO_ROW = -202
"""Placeholder token id of a prefix row that holds an audio embedding (HumanOmni's value)."""


class ClipStatus(StrEnum):
    """What became of one clip; every value but ``ok`` drops the prompt from its step."""

    OK = "ok"
    MISSING = "missing"
    UNREADABLE = "unreadable"
    NO_VIDEO = "no_video"
    NO_AUDIO = "no_audio"
    TOO_SHORT = "too_short"
    """Fewer frames than ``media.min_frames``."""
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A media file, or a window of one."""

    path: Path
    start_seconds: float | None = None
    end_seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One item of a dataset: what is asked about which clip, and what is right."""

    prompt_id: str
    """Unique and stable within a dataset."""
    clip: Clip
    question: str
    """The user's text without the modality tags."""
    modalities: tuple[Modality, ...]
    """The modalities that the prompt asks for, in the order ``video``, ``audio``."""
    solution: str
    """The bare label, e.g. ``happy``."""
    response: str | None = None
    """The target text of supervised training; None in an RL data set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedClip:
    """One clip after decoding: exact uniform frames and the whole waveform, or why there are none."""

    clip: Clip
    status: ClipStatus
    error: str | None
    """None when ``status`` is ok; else a sentence that names the file and the reason."""
    frames_FHWC: Tensor | None
    """uint8 RGB frames ``[num_frames, height, width, 3]`` on the CPU; None when video was not asked for."""
    waveform: Tensor | None
    """float32 mono samples at 16 kHz, on the CPU; None when audio was not asked for."""
    sample_rate_hz: int
    content_hash: str | None
    """Hex digest of the file's bytes and the time window; None when the file could not be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFeatures:
    """What the frozen towers make of one clip; a constant of the whole run."""

    vision_FND: Tensor | None
    """Patch features ``[frames, patches, vision width]``; None without video."""
    audio_AD: Tensor | None
    """Pooled audio features ``[positions, audio width]``; None without audio."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixInputs:
    """Everything the model needs to build one prompt's prefix embeddings, with or without gradients."""

    prompt: Prompt
    token_ids_P: Tensor
    """int64 ``[P]``: text ids, and VIDEO_ROW or AUDIO_ROW at each row that a modality embedding fills."""
    question_ids: Tensor
    """int64: the gate's (BERT) token ids of the question, special tokens included."""
    features: ClipFeatures


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """A prompt as the decoder sees it: one embedding per row, shared by the group's G samples."""

    inputs: PrefixInputs
    embeddings_PD: Tensor
    """``[P, D]`` in the decoder's dtype, detached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer."""

    token_ids: tuple[int, ...]
    """Generated ids, the stop token included when there is one."""
    logprobs: tuple[float, ...]
    """Natural log-prob of each id under softmax(logits / temperature), before top-k and top-p."""
    finish_reason: FinishReason
    weight_version: int
    """The published version that generated every token."""
    cached_tokens: int
    """Prefix rows that this sample did not compute itself because its group shares them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt and its G completions: the unit of reward, advantage and packing."""

    inputs: PrefixInputs
    completions: tuple[Completion, ...]
    texts: tuple[str, ...]
    """Each completion decoded, special tokens removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRewards:
    """The rewards of one group."""

    totals: tuple[float, ...]
    """Weighted sum over the components, one per completion."""
    components: dict[str, tuple[float, ...]]
    """Unweighted values by reward name, one per completion each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedGroups:
    """Several groups in one row of T tokens without padding: per group the prefix, then its completions."""

    layout: SharedPrefixLayout
    """Who may attend to whom."""
    inputs: tuple[PrefixInputs, ...]
    """One per group, in packed order."""
    positions_T: Tensor
    """int64 ``[T]``: 0..P-1 over a prefix, P.. over each of its completions."""
    prefix_rows: Tensor
    """int64 ``[sum P]``: packed rows of all prefix tokens, in order."""
    completion_rows_C: Tensor
    """int64 ``[C]``: packed row of each completion token."""
    completion_ids_C: Tensor
    """int64 ``[C]``: each completion token."""
    predictor_rows_C: Tensor
    """int64 ``[C]``: the row that predicts each token: the one before it, or the last prefix row."""
    sequence_C: Tensor
    """int64 ``[C]``: index of each token's completion, 0..S-1."""
    rollout_logprob_C: Tensor
    """float32 ``[C]``: log-prob reported by the rollout."""

    @property
    def num_rows(self) -> int:
        """T, the rows that pass through the decoder."""
        return int(self.positions_T.shape[0])

    @property
    def num_sequences(self) -> int:
        """S, the completions of the pack."""
        return sum(len(lengths) for lengths in self.layout.completion_lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class DroppedPrompt:
    """A prompt that left its step because its clip could not be used."""

    prompt_id: str
    status: ClipStatus
    error: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What one training step did."""

    step: int
    metrics: dict[str, float]
    """Scalars by slash-separated name (``reward/mean``, ``kl/mean``, ``seconds/forward``)."""
    groups: Sequence[Group] = field(default_factory=tuple)
    rewards: Sequence[GroupRewards] = field(default_factory=tuple)
    dropped: tuple[DroppedPrompt, ...] = ()
