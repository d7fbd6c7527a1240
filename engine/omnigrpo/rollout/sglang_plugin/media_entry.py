"""A clip inside a request to a remote server: as a file that the server can read, or as its bytes.

Both modalities of a prompt name the same clip in an entry each. Everything in an entry is JSON.
"""

import base64
import binascii
import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omnigrpo.media.decode import decode
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.pixels import Aspect, siglip_pixels
from omnigrpo.media.sampling import Colour, SamplingConfig
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.rollout.sglang_plugin.names import MEDIA_FORMAT
from omnigrpo.rollout.sglang_requests import runs_of
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Clip, ClipStatus, Modality, PrefixInputs

_KEYS = {
    "format", "modality", "offsets", "path", "base64", "start_seconds", "end_seconds", "question_ids", "aspect",
    "colour", "min_frames", "hash",
}  # fmt: skip
_ROW_IDS: dict[Modality, int] = {"video": VIDEO_ROW, "audio": AUDIO_ROW}


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaRecipe:
    """How clips are read; the run's own settings, so that the server sees what the trainer sees."""

    aspect: Aspect = "pad"
    colour: Colour = "tag"
    min_frames: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerReady:
    """One modality of a clip, as its tower takes it."""

    tensor: Tensor
    """float32 pixels ``[F, 3, S, S]``, or log-mel ``[M, L]``."""
    key: int
    """The entry's hash, if it has one, else of the clip's bytes, its window, the recipe, the modality and the question.

    SGLang's prefix cache keeps 30 bits of it; a sender that keeps account of its hashes avoids their collisions.
    """


def media_entries(
    inputs: PrefixInputs, recipe: MediaRecipe, *, content: bytes | None = None
) -> dict[str, list[dict[str, Any]]]:
    """``video_data`` and ``audio_data`` of a request for this prompt; ``content`` goes instead of the clip's path."""
    clip = inputs.prompt.clip
    source = {"path": str(clip.path)} if content is None else {"base64": base64.b64encode(content).decode()}
    entries = {}
    for modality in inputs.prompt.modalities:
        entry = {
            "format": MEDIA_FORMAT,
            "modality": modality.upper(),
            "offsets": runs_of((inputs.token_ids_P == _ROW_IDS[modality]).nonzero().squeeze(1).tolist()),
            **source,
            "start_seconds": clip.start_seconds,
            "end_seconds": clip.end_seconds,
            "question_ids": inputs.question_ids.tolist(),
            "aspect": recipe.aspect,
            "colour": recipe.colour,
            "min_frames": recipe.min_frames,
        }
        entries[f"{modality}_data"] = [entry]
    return entries


def prepare(entry: Mapping[str, Any], modality: Modality, config: HumanOmniConfig) -> TowerReady:
    """Decode one modality of an entry's clip. Raises ValueError for a clip that cannot be used, and says why."""
    unknown = entry.keys() - _KEYS
    if unknown:
        raise ValueError(f"unknown keys in a medium: {', '.join(sorted(unknown))}")
    if ("path" in entry) == ("base64" in entry):
        raise ValueError("a medium needs either path or base64")
    if "path" in entry:
        return _prepare(entry, Path(entry["path"]), modality, config)
    with tempfile.NamedTemporaryFile(suffix=".media") as file:
        try:
            file.write(base64.b64decode(entry["base64"], validate=True))
        except binascii.Error as error:
            raise ValueError(f"base64 of a medium is damaged: {error}") from error
        file.flush()
        return _prepare(entry, Path(file.name), modality, config)


def _prepare(entry: Mapping[str, Any], path: Path, modality: Modality, config: HumanOmniConfig) -> TowerReady:
    recipe = MediaRecipe(
        **{name: entry[name] for name in ("aspect", "colour", "min_frames") if name in entry}
    )
    clip = Clip(path=path, start_seconds=entry.get("start_seconds"), end_seconds=entry.get("end_seconds"))
    sampling = SamplingConfig(
        num_frames=config.vision.num_frames, min_frames=recipe.min_frames, colour=recipe.colour
    )
    (decoded,) = decode([clip], [(modality,)], sampling, decoder="pyav").clips
    if decoded.status is not ClipStatus.OK:
        raise ValueError(f"the clip cannot be used ({decoded.status}): {decoded.error}")
    if modality == "video":
        assert decoded.frames_FHWC is not None
        tensor = siglip_pixels(decoded.frames_FHWC, image_size=config.vision.image_size, aspect=recipe.aspect)
    else:
        assert decoded.waveform is not None
        tensor = whisper_log_mel(
            decoded.waveform,
            num_mel_bins=config.audio.num_mel_bins,
            chunk_seconds=config.audio.chunk_seconds,
        )
    question = entry["question_ids"] if modality == "video" else ()
    named = f"{decoded.content_hash} {recipe} {modality} {list(question)}"
    key = entry.get("hash") or int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest()) >> 2
    return TowerReady(tensor=tensor.to("cpu", torch.float32), key=key)
