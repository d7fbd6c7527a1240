# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""Turns a request's media into rows of its prompt, in the process that takes requests."""

import asyncio
from pathlib import Path

import torch
from sglang.srt.managers.schedule_batch import (
    Modality,
    MultimodalDataItem,
    MultimodalInputFormat,
    MultimodalProcessorOutput,
)
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from torch import Tensor

from omnigrpo.model.checkpoint_format import read_config
from omnigrpo.rollout.rows_text import rows_from_text
from omnigrpo.rollout.sglang_plugin.media_entry import TowerReady, prepare
from omnigrpo.rollout.sglang_plugin.model import HumanOmniQwen2ForCausalLM
from omnigrpo.rollout.sglang_plugin.names import MEDIA_FORMAT, PRECOMPUTED_KEY
from omnigrpo.rollout.sglang_requests import PLACEHOLDER_ID
from omnigrpo.schema import Modality as ModalityName

_ROWS_FORMAT = "processor_output"
_ROWS_KEYS = {"format", "modality", "precomputed_embeddings", "offsets", "hash"}
_NAMES: dict[Modality, ModalityName] = {Modality.VIDEO: "video", Modality.AUDIO: "audio"}


class HumanOmniProcessor(BaseMultimodalProcessor):
    """Takes ready-made rows, or clips; one dictionary per modality, with ids that have a placeholder at each row."""

    models = (HumanOmniQwen2ForCausalLM,)

    def __init__(self, hf_config, server_args, processor, *given, **named) -> None:
        super().__init__(hf_config, server_args, processor, *given, **named)
        self._config = read_config(Path(server_args.model_path))
        self._is_for_rows = getattr(hf_config, PRECOMPUTED_KEY, False)

    async def process_mm_data_async(  # type: ignore[override] - the base class names no keyword
        self, image_data, audio_data, input_text, request_obj, **_: object
    ) -> MultimodalProcessorOutput:
        """Return ids, and one item per modality whose hash stands for its content in the prefix cache.

        Raises ValueError for images, text instead of ids, clips that cannot be used, and media that do not fit their
        rows; SGLang hands it on.
        """
        if image_data:
            raise ValueError("HumanOmni takes video and audio, got image_data")
        if not isinstance(input_text, list):
            raise ValueError(
                "HumanOmni's requests need input_ids with a placeholder for every media row, got text"
            )
        given = [(entry, Modality.VIDEO) for entry in request_obj.video_data or []]
        given += [(entry, Modality.AUDIO) for entry in audio_data or []]
        items = await asyncio.gather(*(self._item(entry, kind, len(input_text)) for entry, kind in given))
        return MultimodalProcessorOutput(
            mm_items=items,
            input_ids=input_text,
            padded_input_ids=MultimodalProcessorOutput.build_padded_input_ids(input_text, items),
            video_token_id=PLACEHOLDER_ID,
            audio_token_id=PLACEHOLDER_ID,
        )

    async def _item(self, entry: object, modality: Modality, num_ids: int) -> MultimodalDataItem:
        wanted = (_ROWS_FORMAT,) if self._is_for_rows else (_ROWS_FORMAT, MEDIA_FORMAT)
        if not isinstance(entry, dict) or entry.get("format") not in wanted:
            raise ValueError(f"{modality.name} must be a dictionary whose format is {' or '.join(wanted)}")
        if entry.get("modality") != modality.name:
            raise ValueError(f"{modality.name} data says that its modality is {entry.get('modality')!r}")
        offsets = [(int(first), int(last)) for first, last in entry.get("offsets", ())]
        if any(not 0 <= first <= last < num_ids for first, last in offsets):
            raise ValueError(f"{modality.name}: offsets {offsets} lie outside a prompt of {num_ids} ids")
        num_rows = sum(last - first + 1 for first, last in offsets)
        if entry["format"] == _ROWS_FORMAT:
            item = _item_of_rows(entry, modality, num_rows)
        else:
            loop = asyncio.get_running_loop()
            name = _NAMES[modality]
            ready = await loop.run_in_executor(self.io_executor, prepare, entry, name, self._config)
            item = _item_of_clip(entry, ready, modality)
            part = self._config.vision if modality is Modality.VIDEO else self._config.audio
            if num_rows != part.num_tokens:
                raise ValueError(
                    f"{modality.name}: {num_rows} places in the prompt, a clip has {part.num_tokens} rows"
                )
        item.offsets = offsets
        item.set_pad_value()
        return item


def _item_of_rows(entry: dict[str, object], modality: Modality, num_rows: int) -> MultimodalDataItem:
    if entry.keys() != _ROWS_KEYS:
        raise ValueError(f"{modality.name} must have the keys {', '.join(sorted(_ROWS_KEYS))}")
    rows_RD = entry["precomputed_embeddings"]
    if isinstance(rows_RD, dict):
        rows_RD = rows_from_text(rows_RD)
    if not isinstance(rows_RD, Tensor) or rows_RD.dim() != 2 or not torch.is_floating_point(rows_RD):
        raise ValueError(
            f"{modality.name}: precomputed_embeddings must be a floating-point tensor [rows, width]"
        )
    if len(rows_RD) != num_rows:
        raise ValueError(f"{modality.name}: {len(rows_RD)} rows for {num_rows} places in the prompt")
    return MultimodalDataItem(
        modality=modality,
        hash=int(entry["hash"]),  # type: ignore[call-overload]
        format=MultimodalInputFormat.PROCESSOR_OUTPUT,
        precomputed_embeddings=rows_RD,
    )


def _item_of_clip(entry: dict[str, object], ready: TowerReady, modality: Modality) -> MultimodalDataItem:
    question = torch.tensor(entry.get("question_ids", ()), dtype=torch.int64)
    return MultimodalDataItem(
        modality=modality,
        hash=ready.key,
        feature=ready.tensor,
        model_specific_data={"question_ids": question},
    )
