"""Builds the rollout engine that a configuration names."""

from pathlib import Path
from typing import assert_never

from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.config import RolloutConfig
from omnigrpo.rollout.interface import RolloutEngine, Spans
from omnigrpo.rollout.native_engine import NativeEngine
from omnigrpo.rollout.sglang_engine import SGLangEngine


def build_engine(config: RolloutConfig, *, policy: HumanOmni, directory: Path, spans: Spans) -> RolloutEngine:
    """An engine with the policy's weights, which are still those of the checkpoint in ``directory``.

    Raises ImportError when ``sglang`` is asked for and not installed, RolloutError when it does not start.
    """
    match config.engine:
        case "native":
            return NativeEngine(policy, config.native, spans=spans)
        case "sglang":
            device = "cuda" if policy.device.type == "cuda" else "cpu"
            return SGLangEngine(directory, config.sglang, device=device, dtype=policy.head_weight_VD.dtype)
    assert_never(config.engine)
