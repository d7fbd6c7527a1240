"""What goes to SGLang for one group of samples, and what comes back; nothing here needs SGLang.

Shape suffixes: ``P`` prefix rows, ``M`` rows of one modality, ``D`` width.
"""

import hashlib
import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from omnigrpo.rollout.interface import GroupRequest, RolloutError, SamplingParams
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Completion, FinishReason, Prefix, VersionSpan

PLACEHOLDER_ID = 0
"""Token id of a media row before its content takes the id's place; any id of the vocabulary would do."""
_KEY_BITS = 30
"""SGLang's prefix cache knows a medium by so many bits of its hash."""
_MODALITIES = {"video_data": ("VIDEO", VIDEO_ROW), "audio_data": ("AUDIO", AUDIO_ROW)}


class OtherWeightsError(RolloutError):
    """A sample was drawn by weights that this run did not publish."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """One call of SGLang."""

    token_ids: tuple[int, ...]
    """The prompt, with PLACEHOLDER_ID at media rows."""
    media: Mapping[str, Sequence[Mapping[str, object]]]
    """``video_data`` and ``audio_data``, as SGLang's requests name them."""
    num_samples: int
    sampling: Mapping[str, object]
    """SGLang's sampling parameters."""
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """One sample as SGLang reports it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    """``stop``, ``length`` or ``abort``."""
    matched: int | None
    """The token that stopped it."""
    cached_tokens: int
    """Prompt rows that it found in the cache."""
    retractions: int
    """Times that it lost its KV rows to others and was prefilled anew."""
    version: int

    @classmethod
    def from_output(cls, output: Mapping[str, object], *, run: str = "") -> "Generated":
        """Read one of SGLang's dictionaries.

        Raises RolloutError when its parts do not fit each other, OtherWeightsError when its weights are not the run's.
        """
        meta = output["meta_info"]
        tokens = output["output_ids"]
        assert isinstance(meta, dict)
        assert isinstance(tokens, list)
        reason, reported = meta["finish_reason"], meta["output_token_logprobs"]
        if reason is None or reason["type"] not in ("stop", "length"):
            raise RolloutError(f"SGLang ended a sample after {len(tokens)} tokens: {reason}")
        if [entry[1] for entry in reported] != tokens:
            raise RolloutError(
                f"SGLang returned {len(tokens)} tokens with log-probs of {len(reported)} others"
            )
        return cls(
            token_ids=tuple(tokens),
            logprobs=tuple(entry[0] for entry in reported),
            finish=reason["type"],
            matched=reason.get("matched"),
            cached_tokens=int(meta["cached_tokens"]),
            retractions=int(meta["num_retractions"]),
            version=version_in(meta["weight_version"], run=run),
        )


def version_label(version: int, *, run: str = "") -> str:
    """What SGLang calls a version of the weights; a ``run`` of its own tells it from those of any other run."""
    return f"{run}.{version}" if run else str(version)


def version_in(label: object, *, run: str = "") -> int:
    """The version that a label stands for; OtherWeightsError for one that is not the run's."""
    head, _, digits = str(label).rpartition(".")
    if head != run or not digits.isdecimal():
        raise OtherWeightsError(f"a sample was drawn by weights {label!r}, which this run did not publish")
    return int(digits)


class MediaKeys:
    """Hashes of media, distinct in the bits that SGLang keeps of them, until the cache is emptied.

    Two media that shared those bits would be one prefix to SGLang, and the samples of one would read the other.
    """

    def __init__(self) -> None:
        self._owner: dict[int, bytes] = {}

    def clear(self) -> None:
        """The cache is empty: nothing can be mistaken for what was there."""
        self._owner.clear()

    def key(self, rows_MD: Tensor, modality: str, version: int) -> int:
        """A hash of the rows, the modality and the weights' version."""
        digest = hashlib.blake2b(f"{modality} {version} {rows_MD.dtype} {tuple(rows_MD.shape)}".encode())
        digest.update(rows_MD.contiguous().view(torch.uint8).numpy().tobytes())
        return self.key_of(digest.digest())

    def key_of(self, content: bytes) -> int:
        """A hash of what has this digest of at least 8 bytes."""
        key = int.from_bytes(content[:8]) >> 2
        while self._owner.setdefault(key % (1 << _KEY_BITS), content) != content:
            key += 1
        return key


def media_of(prefix: Prefix, *, dtype: torch.dtype, keys: MediaKeys, version: int) -> dict[str, list[dict]]:
    """The rows of each modality with the places where they go (first and last row of every run)."""
    media = {}
    for name, (modality, row_id) in _MODALITIES.items():
        places = (prefix.inputs.token_ids_P == row_id).nonzero().squeeze(1)
        if len(places) == 0:
            continue
        rows_MD = prefix.embeddings_PD.detach()[places.to(prefix.embeddings_PD.device)].to("cpu", dtype)
        item = {
            "format": "processor_output",
            "modality": modality,
            "precomputed_embeddings": rows_MD,
            "offsets": runs_of(places.tolist()),
            "hash": keys.key(rows_MD, modality, version),
        }
        media[name] = [item]
    return media


def prompt_ids(prefix: Prefix) -> tuple[int, ...]:
    """The prefix's ids, with PLACEHOLDER_ID at media rows."""
    ids_P = prefix.inputs.token_ids_P
    return tuple(torch.where(ids_P < 0, PLACEHOLDER_ID, ids_P).tolist())


def media_bytes(prefix: Prefix, dtype: torch.dtype) -> int:
    """Bytes of the rows that are sent."""
    rows = int((prefix.inputs.token_ids_P < 0).sum())
    return rows * prefix.embeddings_PD.shape[1] * dtype.itemsize


def sampling_of(sampling: SamplingParams, max_new_tokens: int) -> dict[str, object]:
    """SGLang's sampling parameters; without stop tokens its own end tokens are ignored as well."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.stop_token_ids,
    }


def missing_samples(request: GroupRequest) -> list[int]:
    """The samples that are not finished yet."""
    begun = [request.begun_by(sample) for sample in range(len(request.seeds))]
    return [i for i, had in enumerate(begun) if had is None or not had.is_finished]


def room_of(sampling: SamplingParams, begun: Completion | None) -> int:
    """Tokens that this call may add to a sample."""
    rest = sampling.max_new_tokens - (len(begun.token_ids) if begun else 0)
    return rest if sampling.token_budget is None else min(rest, sampling.token_budget)


def completion_of(generated: Generated, begun: Completion | None, sampling: SamplingParams) -> Completion:
    """What a sample has now: what it had, and what this call added."""
    tokens = (begun.token_ids if begun else ()) + generated.token_ids
    finish: FinishReason = "stop"
    if generated.finish == "length":
        finish = "length" if len(tokens) >= sampling.max_new_tokens else "budget"
    spans = list(begun.version_spans) if begun else []
    if spans and spans[-1].version == generated.version:
        joined = spans.pop().num_tokens + len(generated.token_ids)
        spans.append(VersionSpan(version=generated.version, num_tokens=joined))
    else:
        spans.append(VersionSpan(version=generated.version, num_tokens=len(generated.token_ids)))
    return Completion(
        token_ids=tokens,
        logprobs=(begun.logprobs if begun else ()) + generated.logprobs,
        finish_reason=finish,
        version_spans=tuple(spans),
        cached_tokens=generated.cached_tokens,
    )


def check_sharing(request: GroupRequest, sample: int, generated: Generated) -> None:
    """Raise RolloutError unless this sample found the group's prefix in the cache, all but the row it must compute.

    One that is drawn alone, or is the only one to begin, computes the prefix itself. One that lost its KV rows on the
    way reports another number.
    """
    missing = missing_samples(request)
    fresh = [i for i in missing if request.begun_by(i) is None]
    if [sample] in (missing, fresh) or generated.retractions:
        return
    rows, begun = len(request.prefix.inputs.token_ids_P), request.begun_by(sample)
    own = len(begun.token_ids) if begun else 0
    lowest, highest = min(rows, rows + own - 1), rows + own - 1
    if not lowest <= generated.cached_tokens <= highest:
        raise RolloutError(
            f"sample {sample} of {request.name} found {generated.cached_tokens} rows of its prompt in SGLang's cache, "
            f"not the {lowest} that its group shares: the prefix was evicted (raise sglang.max_total_tokens or "
            "sglang.mem_fraction) or its cache is off"
        )


def runs_of(places: Sequence[int]) -> list[tuple[int, int]]:
    """First and last place of every stretch of neighbours."""
    steps = itertools.groupby(enumerate(places), lambda pair: pair[1] - pair[0])
    runs = [[place for _, place in run] for _, run in steps]
    return [(run[0], run[-1]) for run in runs]
