"""Names that both sides of SGLang's process boundary use; imports nothing."""

ARCHITECTURE = "HumanOmniQwen2ForCausalLM"
"""The name in ``architectures`` of config.json."""
PRECOMPUTED_KEY = "omnigrpo_precomputed"
"""Key added to the checkpoint's config.json: media rows come ready-made, so towers and projectors are not built."""
COUNTERS_NAME = "omnigrpo.counters"
"""SGLang's ``get_weights_by_name`` of this name returns [prefill calls, prefill rows, encoder calls]."""
