"""Builds the rollout engine that a configuration names."""

import importlib.util
from pathlib import Path
from typing import Literal, assert_never

from omnigrpo.feature_source import MediaConfig
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.interface import RolloutEngine, RolloutError, Spans
from omnigrpo.rollout.native_engine import NativeEngine, NativeEngineConfig
from omnigrpo.rollout.server_config import ServerConfig
from omnigrpo.rollout.sglang_config import SGLangConfig
from omnigrpo.rollout.sglang_engine import SGLangEngine

EngineName = Literal["native", "sglang", "servers"]


def build_engine(
    name: EngineName,
    *,
    policy: HumanOmni,
    directory: Path,
    native: NativeEngineConfig,
    sglang: SGLangConfig,
    servers: tuple[str, ...],
    server: ServerConfig,
    media: MediaConfig,
    spans: Spans,
) -> RolloutEngine:
    """An engine with the policy's weights, which are still those of the checkpoint in ``directory``.

    Raises ImportError when what the engine needs is not installed, RolloutError when it does not start, or when one of
    the servers cannot be used.
    """
    match name:
        case "native":
            return NativeEngine(policy, native, spans=spans)
        case "sglang":
            device = "cuda" if policy.device.type == "cuda" else "cpu"
            return SGLangEngine(directory, sglang, device=device, dtype=policy.head_weight_VD.dtype)
        case "servers":
            return _over_servers(policy, servers, server, media)
    assert_never(name)


def _over_servers(
    policy: HumanOmni, servers: tuple[str, ...], config: ServerConfig, media: MediaConfig
) -> RolloutEngine:
    """Servers that have the policy's weights, whatever an earlier run left them with."""
    missing = [name for name in ("aiohttp", "sglang_router") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"rollout.engine=servers needs {' and '.join(missing)}: pip install 'omnigrpo[servers]'"
        )
    from omnigrpo.rollout.server_engine import ServerEngine

    engine = ServerEngine(servers, config, model=policy.config, media=media)
    trained = ((name, p.detach()) for name, p in policy.named_parameters() if p.requires_grad)
    try:
        engine.publish(trained, 0)
    except RolloutError:
        engine.close()
        raise
    return engine
