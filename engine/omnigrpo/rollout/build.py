"""Builds the rollout engine that a configuration names."""

from pathlib import Path
from typing import Literal, assert_never

from omnigrpo.model.humanomni import HumanOmni
from omnigrpo.rollout.interface import RolloutEngine, Spans
from omnigrpo.rollout.native_engine import NativeEngine, NativeEngineConfig
from omnigrpo.rollout.sglang_config import SGLangConfig
from omnigrpo.rollout.sglang_engine import SGLangEngine

EngineName = Literal["native", "sglang"]


def build_engine(
    name: EngineName,
    *,
    policy: HumanOmni,
    directory: Path,
    native: NativeEngineConfig,
    sglang: SGLangConfig,
    spans: Spans,
) -> RolloutEngine:
    """An engine with the policy's weights, which are still those of the checkpoint in ``directory``.

    Raises ImportError when ``sglang`` is asked for and not installed, RolloutError when it does not start.
    """
    match name:
        case "native":
            return NativeEngine(policy, native, spans=spans)
        case "sglang":
            device = "cuda" if policy.device.type == "cuda" else "cpu"
            return SGLangEngine(directory, sglang, device=device, dtype=policy.head_weight_VD.dtype)
    assert_never(name)
