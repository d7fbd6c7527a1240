"""Builds the rollout engine that a configuration names."""

import importlib.util
from pathlib import Path
from typing import assert_never

from omnigrpo.feature_source import MediaConfig
from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.rollout.interface import RolloutEngine, RolloutError, Spans
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.rollout.sglang_engine import SGLangEngine


def build_engine(
    config: RolloutConfig, *, policy: HumanOmni, directory: Path, media: MediaConfig, spans: Spans
) -> RolloutEngine:
    """An engine with the policy's weights, which are still those of the checkpoint in ``directory``.

    Raises ImportError when what the engine needs is not installed, RolloutError when it does not start, or when one of
    the servers cannot be used.
    """
    match config.engine:
        case "native":
            return NativeEngine(policy, config.native, spans=spans)
        case "sglang":
            device = "cuda" if policy.device.type == "cuda" else "cpu"
            return SGLangEngine(directory, config.sglang, device=device, dtype=policy.head_weight_VD.dtype)
        case "servers":
            return _over_servers(policy, config, media)
    assert_never(config.engine)


def _over_servers(policy: HumanOmni, config: RolloutConfig, media: MediaConfig) -> RolloutEngine:
    """Servers that have the policy's weights, whatever an earlier run left them with."""
    missing = [name for name in ("aiohttp", "sglang_router") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"rollout.engine=servers needs {' and '.join(missing)}: pip install 'omnigrpo[servers]'"
        )
    from omnigrpo.rollout.server_engine import ServerEngine

    engine = ServerEngine(config.servers, config.server, model=policy.config, media=media)
    trained = ((name, p.detach()) for name, p in policy.trainable_parameters().items())
    try:
        engine.publish(trained, 0)
    except RolloutError:
        engine.close()
        raise
    return engine
