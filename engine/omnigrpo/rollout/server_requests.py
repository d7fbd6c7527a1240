"""What servers are sent for one group: the prompt's ids, and its clip as a path, as bytes, or as ready-made rows."""

import asyncio
import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from omnigrpo.feature_source import RECIPE_VERSION, MediaConfig
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.rows_text import rows_to_text
from omnigrpo.rollout.server_config import ServerMedia
from omnigrpo.rollout.sglang_plugin.names import CLIP_FORMAT
from omnigrpo.rollout.sglang_requests import GenerateCall, MediaKeys, media_of, runs_of
from omnigrpo.schema import AUDIO_ROW, VIDEO_ROW, Clip, Prefix

_ROWS = {"video": VIDEO_ROW, "audio": AUDIO_ROW}


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaSender:
    """Turns prefixes into the media part of requests."""

    mode: ServerMedia
    recipe: MediaConfig
    """How the trainer reads clips; sent along, so that a server reads them so too."""
    keys: MediaKeys

    async def media(self, prefix: Prefix, *, dtype: torch.dtype, version: int) -> dict[str, list[dict]]:
        """``video_data`` and ``audio_data`` of a request; raises RolloutError for a clip that cannot be read."""
        if self.mode == "rows":
            media = media_of(prefix, dtype=dtype, keys=self.keys, version=version)
            return {name: [_with_text(item) for item in items] for name, items in media.items()}
        ids_P = prefix.inputs.token_ids_P
        places = {name: (ids_P == row).nonzero().squeeze(1).tolist() for name, row in _ROWS.items()}
        modalities = [name for name, of_it in places.items() if of_it]
        if not modalities:
            return {}
        clip = prefix.inputs.prompt.clip
        source, content = await asyncio.to_thread(self._source, clip)
        question = prefix.inputs.question_ids.tolist()
        digest = hashlib.blake2b(
            f"{content} {clip.start_seconds} {clip.end_seconds} {self._recipe()}".encode()
        )
        entry = {
            "format": CLIP_FORMAT,
            "source": source,
            "start_seconds": clip.start_seconds,
            "end_seconds": clip.end_seconds,
            "recipe": self._recipe(),
            "question_ids": question,
            "clip_digest": digest.hexdigest()[:32],
            "items": {
                name: {
                    "offsets": runs_of(places[name]),
                    "hash": self.keys.key_of(
                        hashlib.blake2b(f"{name} {question} {version} {digest.hexdigest()}".encode()).digest()
                    ),
                }
                for name in modalities
            },
        }
        return {f"{modalities[0]}_data": [entry]}

    def _recipe(self) -> dict[str, object]:
        return {
            "version": RECIPE_VERSION,
            "aspect": self.recipe.aspect,
            "colour": self.recipe.colour,
            "min_frames": self.recipe.min_frames,
            "timeout_seconds": self.recipe.timeout_seconds,
        }

    def _source(self, clip: Clip) -> tuple[dict[str, str], str]:
        """How the clip is sent, and what tells its content from any other's."""
        path = clip.path.resolve()
        try:
            if self.mode == "path":
                stat = path.stat()
                return {"path": str(path)}, f"{path} {stat.st_mtime_ns} {stat.st_size}"
            content = Path(path).read_bytes()
        except OSError as error:
            raise RolloutError(f"the clip {path} cannot be sent to the servers: {error}") from error
        encoded = base64.b64encode(content).decode("ascii")
        return {"data": encoded, "suffix": path.suffix}, hashlib.blake2b(content).hexdigest()


def generate_body(call: GenerateCall) -> dict[str, object]:
    """A request of ``/generate``."""
    nested = call.num_samples > 1  # SGLang's batches take a list of lists, its single requests a list.
    media: Mapping[str, object] = {
        name: [list(items)] if nested else list(items) for name, items in call.media.items()
    }
    return {
        "rid": call.request_id,
        "input_ids": list(call.token_ids),
        "sampling_params": dict(call.sampling) | {"n": call.num_samples},
        "return_logprob": True,
        **media,
    }


def _with_text(item: Mapping[str, object]) -> dict[str, object]:
    rows_MD = item["precomputed_embeddings"]
    assert isinstance(rows_MD, torch.Tensor)
    return dict(item) | {"precomputed_embeddings": rows_to_text(rows_MD)}
