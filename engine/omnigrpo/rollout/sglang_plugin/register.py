# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""Entry point of the group ``sglang.srt.plugins``: SGLang calls ``register`` in each of its processes."""

import os
from collections.abc import Callable

from sglang.srt.configs import model_config
from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from transformers import AutoConfig

from omnigrpo.rollout.sglang_plugin.checkpoint_config import HumanOmniCheckpointConfig
from omnigrpo.rollout.sglang_plugin.model import HumanOmniQwen2ForCausalLM, MisfitError
from omnigrpo.rollout.sglang_plugin.names import ARCHITECTURE
from omnigrpo.rollout.sglang_plugin.processor import HumanOmniProcessor

_UPDATER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"


def register() -> None:
    """Make HumanOmni's architecture known: its configuration, its model, and what prepares its requests.

    SGLang's cache of encoder outputs outlives the projectors that made them, so it is off unless someone sized it.
    """
    os.environ.setdefault("SGLANG_VLM_CACHE_SIZE_MB", "0")
    AutoConfig.register(HumanOmniCheckpointConfig.model_type, HumanOmniCheckpointConfig, exist_ok=True)
    ModelRegistry.models[ARCHITECTURE] = HumanOmniQwen2ForCausalLM
    PROCESSOR_MAPPING[HumanOmniQwen2ForCausalLM] = HumanOmniProcessor
    if ARCHITECTURE not in model_config.multimodal_model_archs:
        model_config.multimodal_model_archs.append(ARCHITECTURE)
    HookRegistry.register(f"{_UPDATER}.update_weights_from_tensor", _refuse_misfits, HookType.AROUND)


def _refuse_misfits(
    update: Callable[..., tuple[bool, str]], *given: object, **named: object
) -> tuple[bool, str]:
    """Answer that weights do not fit, where SGLang's scheduler would end itself and its parent."""
    try:
        return update(*given, **named)
    except MisfitError as error:
        return False, str(error)
