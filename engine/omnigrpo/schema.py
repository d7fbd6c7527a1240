"""The data that crosses module boundaries.

Shape suffixes: ``P`` prefix rows, ``R`` completion tokens, ``T`` packed rows, ``C`` completion tokens of a
pack, ``S`` sequences (completions) of a pack, ``F`` frames, ``N`` patches of a frame, ``A`` pooled audio
positions, ``M`` mel bins, ``L`` mel frames, ``D`` width, ``3`` the time, height and width rows of M-RoPE positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from omnigrpo_kernels.shared_prefix_layout import SharedPrefixLayout

Modality = Literal["video", "audio"]
DecoderName = Literal["pyav", "dali"]
FinishReason = Literal["stop", "length", "budget"]

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
    RESOLUTION_CHANGE = "resolution_change"
    """Its pictures change their size on the way."""
    UNSUPPORTED_CODEC = "unsupported_codec"
    TIMEOUT = "timeout"
    """Not decoded within ``media.timeout_seconds``."""


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
    subtitle: str | None = None
    """What is said in the clip, in words; None where nobody wrote it down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedClip:
    """One clip after decoding: exact uniform frames and the whole waveform, or why there are none."""

    clip: Clip
    status: ClipStatus
    error: str | None
    """None when ``status`` is ok; else a sentence that names the file and the reason."""
    frames_FHWC: Tensor | None
    """uint8 RGB frames ``[num_frames, height, width, 3]`` on the decoding device; None when video was not asked for."""
    waveform: Tensor | None
    """float32 mono samples at 16 kHz, on the CPU; None when audio was not asked for."""
    sample_rate_hz: int
    content_hash: str | None
    """Hex digest of the file's bytes and the time window; None when the clip cannot be used."""
    decoder: DecoderName | None
    """Who decoded the pictures; None when there are none."""
    num_pictures: int
    """Pictures that were decoded for its frames, those included that only others refer to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedBatch:
    """Several clips after decoding."""

    clips: tuple[DecodedClip, ...]
    """In the order asked."""

    @property
    def usable(self) -> tuple[DecodedClip, ...]:
        """The clips whose status is ok."""
        return tuple(clip for clip in self.clips if clip.status is ClipStatus.OK)


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
    positions_3P: Tensor | None = None
    """int64 ``[3, P]`` on the CPU: M-RoPE positions; None for 0..P-1."""

    def __post_init__(self) -> None:
        """Raises ValueError for positions of another number of rows."""
        expected = (3, len(self.token_ids_P))
        if self.positions_3P is not None and tuple(self.positions_3P.shape) != expected:
            raise ValueError(
                f"the prefix of prompt {self.prompt.prompt_id!r} has positions of shape "
                f"{tuple(self.positions_3P.shape)} for {expected[1]} rows; give {expected}, or none for 0, 1, 2, ..."
            )

    @property
    def positions(self) -> Tensor:
        """int64: rotary position of every row, ``[P]`` or ``[3, P]``."""
        return torch.arange(len(self.token_ids_P)) if self.positions_3P is None else self.positions_3P

    @property
    def next_position(self) -> int:
        """Where every completion begins: one above the largest position, in all three rows alike."""
        return len(self.token_ids_P) if self.positions_3P is None else int(self.positions_3P.max()) + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefix:
    """A prompt as the decoder sees it: one embedding per row, shared by the group's G samples."""

    inputs: PrefixInputs
    embeddings_PD: Tensor
    """``[P, D]`` in the decoder's dtype, detached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixStates:
    """What the decoder keeps of prefixes for the rows that follow them."""

    hidden_TD: Tensor
    """``[T, D]``: hidden states after the final norm of all prefix rows, packed."""
    keys: tuple[Tensor, ...]
    """Per layer ``[T, key/value heads, head width]``, rotated."""
    values: tuple[Tensor, ...]
    """Per layer ``[T, key/value heads, head width]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Consecutive tokens of one completion that the same weights generated."""

    version: int
    """As it was published."""
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled answer, or the part of it that a token budget allowed."""

    token_ids: tuple[int, ...]
    """Generated ids, the stop token included when there is one."""
    logprobs: tuple[float, ...]
    """Natural log-prob of each id under softmax(logits / temperature), before top-k and top-p, by the weights that
    generated it."""
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]
    """Which published version generated which tokens, in order; the spans cover all of them."""
    cached_tokens: int
    """Rows before its first new token that this sample did not compute itself because its group shares them."""

    def __post_init__(self) -> None:
        """Raises ValueError when log-probs or version spans do not cover the tokens."""
        covered = sum(span.num_tokens for span in self.version_spans)
        if not len(self.token_ids) == len(self.logprobs) == covered:
            raise ValueError(
                f"Completion: {len(self.token_ids)} tokens, {len(self.logprobs)} log-probs, and version spans of "
                f"{covered} tokens; all three must cover the same tokens"
            )

    @property
    def is_finished(self) -> bool:
        """Whether it ended by itself or at its longest, rather than at a budget."""
        return self.finish_reason != "budget"

    @property
    def oldest_version(self) -> int:
        """The earliest version that generated one of its tokens; raises ValueError for a completion without tokens."""
        return min(span.version for span in self.version_spans)


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
    """int64 ``[T]``: 0..P-1 over a prefix, P.. over each of its completions. ``[3, T]`` where a prefix has M-RoPE
    positions: its completions go on above its largest one."""
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

    def __post_init__(self) -> None:
        """Raises ValueError for parts that do not make up the layout."""
        if tuple(self.positions_T.shape) not in ((self.num_rows,), (3, self.num_rows)):
            raise ValueError(
                f"PackedGroups: positions of shape {tuple(self.positions_T.shape)} for a layout of {self.num_rows} "
                "rows; give one, or three for M-RoPE, per row"
            )
        tokens = {
            name: len(getattr(self, name))
            for name in (
                "completion_rows_C",
                "completion_ids_C",
                "predictor_rows_C",
                "sequence_C",
                "rollout_logprob_C",
            )
        }
        if len(set(tokens.values())) > 1:
            raise ValueError(
                f"PackedGroups: got {tokens}; give each of them one element per completion token"
            )
        _check_rows(torch.cat([self.prefix_rows, self.completion_rows_C]), self.num_rows)

    @property
    def num_rows(self) -> int:
        """T, the rows that pass through the decoder."""
        return self.layout.num_rows

    @property
    def num_sequences(self) -> int:
        """S, the completions of the pack."""
        return sum(len(lengths) for lengths in self.layout.completion_lengths)


def joined_positions(parts: Sequence[Tensor]) -> Tensor:
    """Positions of several runs of rows as one: ``[T]``, or ``[3, T]`` where one of them has three rows."""
    if all(part.dim() == 1 for part in parts):
        return torch.cat(list(parts))
    return torch.cat([part.expand(3, -1) for part in parts], dim=1)


def _check_rows(rows: Tensor, num_rows: int) -> None:
    """Raise ValueError unless each of ``num_rows`` rows is there exactly once."""
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if len(outside):
        raise ValueError(f"PackedGroups: row {int(outside[0])} lies outside a layout of {num_rows} rows")
    counts_T = torch.bincount(rows, minlength=num_rows)
    if not bool((counts_T == 1).all()):
        row = int((counts_T != 1).nonzero()[0])
        raise ValueError(
            f"PackedGroups: row {row} of {num_rows} is in {int(counts_T[row])} segments; prefix_rows and "
            "completion_rows_C must hold every row of the layout once"
        )


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
