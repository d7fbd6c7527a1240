"""What servers are sent for one group: the prompt's ids, and its clip as a path, as bytes, or as ready-made rows."""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from omnigrpo.feature_source import MediaConfig
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.rows_text import rows_to_text
from omnigrpo.rollout.server_config import ServerMedia
from omnigrpo.rollout.sglang_plugin.media_entry import MediaRecipe, media_entries
from omnigrpo.rollout.sglang_requests import GenerateCall, MediaKeys, media_of
from omnigrpo.schema import Clip, Prefix


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
        clip = prefix.inputs.prompt.clip
        content, identity = await asyncio.to_thread(self._read, clip)
        recipe = MediaRecipe(
            aspect=self.recipe.aspect, colour=self.recipe.colour, min_frames=self.recipe.min_frames
        )
        entries = media_entries(prefix.inputs, recipe, content=content)
        for name, (entry,) in entries.items():
            question = prefix.inputs.question_ids.tolist() if name == "video_data" else ()
            named = f"{name} {question} {version} {identity} {clip.start_seconds} {clip.end_seconds} {recipe}"
            entry["hash"] = self.keys.key_of(hashlib.blake2b(named.encode()).digest())
            if content is None:
                entry["path"] = str(clip.path.resolve())
        return entries

    def _read(self, clip: Clip) -> tuple[bytes | None, str]:
        """The clip's bytes, if they are sent, and what tells its content from any other's."""
        path = clip.path.resolve()
        try:
            if self.mode == "path":
                stat = path.stat()
                return None, f"{path} {stat.st_mtime_ns} {stat.st_size}"
            content = path.read_bytes()
        except OSError as error:
            raise RolloutError(f"the clip {path} cannot be sent to the servers: {error}") from error
        return content, hashlib.blake2b(content).hexdigest()


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
