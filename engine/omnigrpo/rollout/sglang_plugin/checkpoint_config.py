"""HumanOmni's config.json as SGLang reads it, through transformers."""

from collections.abc import Mapping

from transformers import Qwen2Config

from omnigrpo.rollout.sglang_plugin.names import DOCUMENT_KEY

_SECTIONS = ("vision_config", "audio_config", "bert_config")


class HumanOmniCheckpointConfig(Qwen2Config):
    """The decoder's keys; those of towers and gate, which SGLang would misread, are under a key of their own."""

    model_type = "HumanOmni_qwen2"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, object], **options):
        """Read the file's content; whole, it is under DOCUMENT_KEY."""
        decoder = {k: v for k, v in config_dict.items() if k not in _SECTIONS}
        return super().from_dict({DOCUMENT_KEY: dict(config_dict), **decoder}, **options)
