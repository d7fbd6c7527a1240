# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""Turns a request's media into rows of its prompt, in the process that takes requests."""

import torch
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputFormat,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from torch import Tensor

from omnigrpo.model.config import HumanOmniConfig
from omnigrpo.model.config_json import from_json
from omnigrpo.rollout.rows_text import rows_from_text
from omnigrpo.rollout.sglang_plugin.model import HumanOmniQwen2ForCausalLM
from omnigrpo.rollout.sglang_plugin.names import CLIP_FORMAT, DOCUMENT_KEY, PRECOMPUTED_KEY
from omnigrpo.rollout.sglang_plugin.raw_media import clip_items
from omnigrpo.rollout.sglang_requests import PLACEHOLDER_ID

_KEYS = {"format", "modality", "precomputed_embeddings", "offsets", "hash"}


class HumanOmniProcessor(BaseMultimodalProcessor):
    """Takes clips, or ready-made rows, one dictionary per modality; ids have a placeholder at each of their rows."""

    models = (HumanOmniQwen2ForCausalLM,)

    async def process_mm_data_async(  # type: ignore[override] - the base class names no keyword
        self, image_data, audio_data, input_text, request_obj, **_: object
    ) -> MultimodalProcessorOutput:
        """Return ids, and one item per modality whose hash stands for its content in the prefix cache.

        Raises ValueError for images, text instead of ids, or media that do not fit their rows; SGLang hands it on.
        """
        if image_data:
            raise ValueError("HumanOmni takes video and audio, got image_data")
        if not isinstance(input_text, list):
            raise ValueError(
                "HumanOmni's requests need input_ids with a placeholder for every media row, got text"
            )
        videos, audios = request_obj.video_data or [], audio_data or []
        items: list[MultimodalDataItem] = []
        for entry, modality in [(e, Modality.VIDEO) for e in videos] + [(e, Modality.AUDIO) for e in audios]:
            if isinstance(entry, dict) and entry.get("format") == CLIP_FORMAT:
                items += await clip_items(entry, self._model_config(), len(input_text))
            else:
                items.append(_item(entry, modality, len(input_text)))
        return MultimodalProcessorOutput(
            mm_items=items,
            input_ids=input_text,
            padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(input_text, items),
            video_token_id=PLACEHOLDER_ID,
            audio_token_id=PLACEHOLDER_ID,
        )

    def _model_config(self) -> HumanOmniConfig:
        if getattr(self.hf_config, PRECOMPUTED_KEY, False):
            raise ValueError("a clip came, but this server was started for ready-made rows and has no towers")
        return from_json(getattr(self.hf_config, DOCUMENT_KEY))


def _item(entry: object, modality: Modality, num_ids: int) -> MultimodalDataItem:
    if not isinstance(entry, dict) or entry.keys() != _KEYS or entry["format"] != "processor_output":
        raise ValueError(
            f"{modality.name} must be a dictionary of {', '.join(sorted(_KEYS))} with format processor_output"
        )
    rows_RD, offsets = entry["precomputed_embeddings"], [tuple(run) for run in entry["offsets"]]
    if entry["modality"] != modality.name:
        raise ValueError(f"{modality.name} data says that its modality is {entry['modality']!r}")
    if isinstance(rows_RD, dict):
        rows_RD = rows_from_text(rows_RD)
    if not isinstance(rows_RD, Tensor) or rows_RD.dim() != 2 or not torch.is_floating_point(rows_RD):
        raise ValueError(
            f"{modality.name}: precomputed_embeddings must be a floating-point tensor [rows, width]"
        )
    if any(not 0 <= first <= last < num_ids for first, last in offsets):
        raise ValueError(f"{modality.name}: offsets {offsets} lie outside a prompt of {num_ids} ids")
    wanted = sum(last - first + 1 for first, last in offsets)
    if wanted != len(rows_RD):
        raise ValueError(f"{modality.name}: {len(rows_RD)} rows for {wanted} places in the prompt")
    item = MultimodalDataItem(
        modality=modality,
        hash=int(entry["hash"]),
        offsets=offsets,
        format=MultimodalInputFormat.PROCESSOR_OUTPUT,
        precomputed_embeddings=rows_RD,
    )
    item.set_pad_value()
    return item
