"""HumanOmni's config.json as SGLang reads it, through transformers."""

from collections.abc import Mapping

from transformers import Qwen2Config

_SECTIONS = ("vision_config", "audio_config", "bert_config")


class HumanOmniCheckpointConfig(Qwen2Config):
    """The decoder's keys; the sections of towers and gate are left to whoever builds those (SGLang misreads them)."""

    model_type = "HumanOmni_qwen2"

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, object], **options):
        """Read the file's content, sections left out."""
        return super().from_dict({k: v for k, v in config_dict.items() if k not in _SECTIONS}, **options)
