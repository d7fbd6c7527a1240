# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""Turns a clip that came with a request into what the towers take, in the process that takes requests."""

import asyncio
import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem
from torch import Tensor

from omnigrpo.feature_source import RECIPE_VERSION
from omnigrpo.media.decode import SamplingConfig, decode_each
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.pixels import siglip_pixels
from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.schema import Clip, ClipStatus, DecodedClip

_MODALITIES = {"video": Modality.VIDEO, "audio": Modality.AUDIO}


async def clip_items(
    entry: Mapping[str, Any], config: HumanOmniConfig, num_ids: int
) -> list[MultimodalDataItem]:
    """Decode the clip, once, and make one item of each modality that the prompt asks for.

    Raises ValueError for a clip that cannot be used, or an entry that does not fit.
    """
    try:
        wanted, recipe = entry["items"], entry["recipe"]
        question, digest = entry["question_ids"], entry["clip_digest"]
        if recipe["version"] != RECIPE_VERSION:
            raise ValueError(
                f"the clip is to be read by version {recipe['version']} of the recipe, this server has "
                f"{RECIPE_VERSION}: install the same release of omnigrpo on both sides"
            )
        tensors = await asyncio.to_thread(_tower_inputs, entry, tuple(wanted), config)
        return [
            _item(name, tensors[name], of_it["offsets"], of_it["hash"], question, digest, num_ids)
            for name, of_it in wanted.items()
        ]
    except KeyError as error:
        raise ValueError(f"a clip's entry lacks {error}") from None


def _tower_inputs(
    entry: Mapping[str, Any], modalities: tuple[Any, ...], config: HumanOmniConfig
) -> dict[str, Tensor]:
    source, recipe = entry["source"], entry["recipe"]
    with tempfile.NamedTemporaryFile(suffix=source.get("suffix", "")) as held:
        if "path" in source:
            path = Path(source["path"])
        else:
            path = Path(held.name)
            path.write_bytes(_decoded_bytes(source["data"]))
        clip = Clip(path=path, start_seconds=entry["start_seconds"], end_seconds=entry["end_seconds"])
        sampling = SamplingConfig(
            num_frames=config.vision.num_frames, min_frames=recipe["min_frames"], colour=recipe["colour"]
        )
        (found,) = decode_each(
            [clip],
            [modalities],
            sampling,
            lambda decoded: _prepared(decoded, recipe["aspect"], config),
            timeout_seconds=recipe["timeout_seconds"],
            decoder="pyav",
        )
    return found


def _prepared(clip: DecodedClip, aspect: Any, config: HumanOmniConfig) -> dict[str, Tensor]:
    """What ``FeatureSource`` makes of it."""
    if clip.status is not ClipStatus.OK:
        raise ValueError(f"the clip cannot be used ({clip.status}): {clip.error}")
    tensors: dict[str, Tensor] = {}
    if clip.frames_FHWC is not None:
        tensors["video"] = siglip_pixels(clip.frames_FHWC, image_size=config.vision.image_size, aspect=aspect)
    if clip.waveform is not None:
        audio = config.audio
        tensors["audio"] = whisper_log_mel(
            clip.waveform, num_mel_bins=audio.num_mel_bins, chunk_seconds=audio.chunk_seconds
        )
    return tensors


def _decoded_bytes(data: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the clip's bytes are not base64: {error}") from error


def _item(
    name: str, feature: Tensor, offsets: Any, key: int, question: list[int], digest: str, num_ids: int
) -> MultimodalDataItem:
    runs = [tuple(run) for run in offsets]
    if any(not 0 <= first <= last < num_ids for first, last in runs):
        raise ValueError(f"{name}: offsets {runs} lie outside a prompt of {num_ids} ids")
    item = MultimodalDataItem(
        modality=_MODALITIES[name],
        hash=key,
        offsets=runs,
        feature=feature,
        model_specific_data={
            "question_ids": torch.tensor(question),
            "clip_digest": torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8),
        },
    )
    item.set_pad_value()
    return item
