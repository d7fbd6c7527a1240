# pyright: reportMissingImports=false
# SGLang lives in an environment of its own (make sglang).
"""Entry point of the group ``sglang.srt.plugins``: SGLang calls ``register`` in each of its processes."""

from sglang.srt.configs import model_config
from sglang.srt.managers.multimodal_processor import PROCESSOR_MAPPING
from sglang.srt.models.registry import ModelRegistry
from transformers import AutoConfig

from omnigrpo.rollout.sglang_plugin.checkpoint_config import HumanOmniCheckpointConfig
from omnigrpo.rollout.sglang_plugin.model import HumanOmniQwen2ForCausalLM
from omnigrpo.rollout.sglang_plugin.names import ARCHITECTURE
from omnigrpo.rollout.sglang_plugin.processor import HumanOmniProcessor


def register() -> None:
    """Make HumanOmni's architecture known: its configuration, its model, and what prepares its requests."""
    AutoConfig.register(HumanOmniCheckpointConfig.model_type, HumanOmniCheckpointConfig, exist_ok=True)
    ModelRegistry.models[ARCHITECTURE] = HumanOmniQwen2ForCausalLM
    PROCESSOR_MAPPING[HumanOmniQwen2ForCausalLM] = HumanOmniProcessor
    if ARCHITECTURE not in model_config.multimodal_model_archs:
        model_config.multimodal_model_archs.append(ARCHITECTURE)
