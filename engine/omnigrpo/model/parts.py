"""The parts of HumanOmni, and which weights they hold only because the reference checkpoint does."""

from torch import nn

from omnigrpo.model.config import VisionConfig
from omnigrpo.model.humanomni import HumanOmni

PART_PREFIXES = {
    "vision tower": "model.vision_tower.",
    "audio tower": "model.audio_tower.",
    "mm_projector": "model.mm_projector.",
    "audio_projector": "model.audio_projector.",
    "bert": "model.bert_model.",
    "gate": "model.bert_gate.",
    "llm": "",
}
"""Name prefix of each part; the LLM is whatever no other prefix claims."""

TOWER_PARTS = ("vision tower", "audio tower")
_SIGLIP = "model.vision_tower.vision_tower.vision_model."
_WHISPER = "model.audio_tower.audio_tower."


def part_of(name: str) -> str:
    """Return the part that a tensor of this name belongs to."""
    return next(part for part, prefix in PART_PREFIXES.items() if name.startswith(prefix))


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count the parameters of each part; tied weights count once."""
    counts = dict.fromkeys(PART_PREFIXES, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def unused_prefixes(config: VisionConfig) -> tuple[str, ...]:
    """Name prefixes of the weights that no forward pass reads; a file may leave them out."""
    return (
        f"{_SIGLIP}post_layernorm.",
        f"{_SIGLIP}head.",
        *(f"{_SIGLIP}encoder.layers.{i}." for i in range(config.num_computed_layers, config.num_layers)),
        f"{_WHISPER}projector.",
        f"{_WHISPER}classifier.",
        "model.bert_model.pooler.",
    )


def used_tower_names(model: HumanOmni) -> list[str]:
    """Return the names of all tower weights that a forward pass reads."""
    unused = unused_prefixes(model.config.vision)
    return [n for n in model.state_dict() if part_of(n) in TOWER_PARTS and not n.startswith(unused)]
