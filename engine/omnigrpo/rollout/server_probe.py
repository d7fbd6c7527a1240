"""What a server says about itself, and whether a rollout can use it."""

from dataclasses import dataclass

import torch

from omnigrpo.feature_source import RECIPE_VERSION
from omnigrpo.model.config import DecoderConfig
from omnigrpo.rollout.decoder_shapes import geometry_of
from omnigrpo.rollout.interface import RolloutError
from omnigrpo.rollout.server_client import ServerClient
from omnigrpo.rollout.server_config import ServerMedia
from omnigrpo.rollout.sglang_plugin.names import ARCHITECTURE, IDENTITY_NAME

UNPUBLISHED = "default"
"""SGLang's weight version of a server that was given none."""
_SESSION = "begin_weight_update"
_HINT = "start it with `omnigrpo serve --model DIRECTORY`"


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerInfo:
    """A server that fits."""

    url: str
    devices: int
    """Processes that take weights."""
    capacity_rows: int
    """Of its KV cache."""
    input_rows: int
    """Rows of a prompt at most."""
    dtype: torch.dtype
    version: str
    """Of its weights; UNPUBLISHED for those of its checkpoint."""
    keeps_weights: bool
    """Whether it has a copy of them on the host while their memory is released."""
    has_sessions: bool
    """Whether updates of weights must be begun and ended (SGLang 0.5.21 and later)."""


async def probe(
    client: ServerClient, url: str, *, decoder: DecoderConfig, media: ServerMedia, timeout_seconds: float
) -> ServerInfo:
    """Ask it. Raises ServerLostError when it does not answer, RolloutError when it does not fit."""
    model = await _told(client, f"{url}/model_info", timeout_seconds)
    if ARCHITECTURE not in (model.get("architectures") or ()):
        raise RolloutError(f"{url} serves {model.get('architectures')}, not {ARCHITECTURE}: {_HINT}")
    info = await _told(client, f"{url}/server_info", timeout_seconds)
    if info["dp_size"] != 1:
        raise RolloutError(
            f"{url} runs with dp_size {info['dp_size']}, which takes no weights: start that many servers instead"
        )
    dtype = await _check_identity(client, url, decoder, media, timeout_seconds)
    return ServerInfo(
        url=url,
        devices=info["tp_size"],
        capacity_rows=info["max_total_num_tokens"],
        input_rows=info["max_req_input_len"],
        dtype=dtype,
        version=info["weight_version"],
        keeps_weights=bool(info.get("enable_memory_saver") and info.get("enable_weights_cpu_backup")),
        has_sessions=await client.has_route(f"{url}/{_SESSION}", timeout_seconds=timeout_seconds),
    )


async def version_of(client: ServerClient, url: str, *, timeout_seconds: float) -> str:
    """The version of its weights, from the process that takes requests; raises as ``probe`` does."""
    return (await _told(client, f"{url}/model_info", timeout_seconds))["weight_version"]


async def _told(client: ServerClient, url: str, timeout_seconds: float) -> dict:
    answer = await client.get(url, timeout_seconds=timeout_seconds)
    if not isinstance(answer, dict):
        raise RolloutError(f"{url} answers as no SGLang server does: {_HINT}")
    return answer


async def _check_identity(
    client: ServerClient, url: str, decoder: DecoderConfig, media: ServerMedia, timeout_seconds: float
) -> torch.dtype:
    told = await client.post(
        f"{url}/get_weights_by_name", {"name": IDENTITY_NAME}, timeout_seconds=timeout_seconds
    )
    geometry, dtype, mode, recipe = told
    if geometry != geometry_of(decoder):
        raise RolloutError(
            f"{url} serves another model: its decoder is {geometry}, the policy's {geometry_of(decoder)}"
        )
    if media == "rows":
        return getattr(torch, dtype)
    if mode != "raw":
        raise RolloutError(
            f"{url} was started for ready-made rows and has no towers, but rollout.server.media is {media}: start it "
            "with --media raw, or set rollout.server.media=rows"
        )
    if recipe != str(RECIPE_VERSION):
        raise RolloutError(
            f"{url} reads clips by version {recipe} of the recipe, this program by {RECIPE_VERSION}: install the same "
            "release of omnigrpo on both sides"
        )
    return getattr(torch, dtype)
