"""The towers' weights in directories of their own, as transformers saves SigLIP and Whisper."""

from collections.abc import Mapping
from pathlib import Path

from omnigrpo.model.weight_files import CheckpointError, StoredTensor, stored_checkpoint

_SIGLIP = "model.vision_tower.vision_tower.vision_model."
_WHISPER = "model.audio_tower.audio_tower."
_SIGLIP_NAMES = {
    "vision_model.": _SIGLIP,
    "embeddings.": f"{_SIGLIP}embeddings.",
    "encoder.": f"{_SIGLIP}encoder.",
    "post_layernorm.": f"{_SIGLIP}post_layernorm.",
    "head.": f"{_SIGLIP}head.",
}
"""Of the whole model, and of the vision half alone."""
_WHISPER_NAMES = {
    "model.encoder.": f"{_WHISPER}encoder.",
    "encoder.": f"{_WHISPER}encoder.",
    "conv1.": f"{_WHISPER}encoder.conv1.",
    "conv2.": f"{_WHISPER}encoder.conv2.",
    "embed_positions.": f"{_WHISPER}encoder.embed_positions.",
    "layers.": f"{_WHISPER}encoder.layers.",
    "layer_norm.": f"{_WHISPER}encoder.layer_norm.",
    "projector.": f"{_WHISPER}projector.",
    "classifier.": f"{_WHISPER}classifier.",
}
"""Of the whole model, of the classifier that HumanOmni builds, and of the encoder alone."""


def vision_tower_tensors(directory: Path) -> dict[str, StoredTensor]:
    """SigLIP's vision weights under HumanOmni's names; its text half is passed over.

    Raises:
        CheckpointError: no weights, or none of a SigLIP vision tower.
    """
    return _renamed(directory, _SIGLIP_NAMES, "SigLIP vision tower")


def audio_tower_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Whisper's encoder weights under HumanOmni's names; its decoder is passed over.

    Raises:
        CheckpointError: no weights, or none of a Whisper encoder.
    """
    return _renamed(directory, _WHISPER_NAMES, "Whisper encoder")


def _renamed(directory: Path, names: Mapping[str, str], what: str) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    for name, stored in stored_checkpoint(directory).items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), None)
        if prefix is not None:
            found[names[prefix] + name.removeprefix(prefix)] = stored
    if not found:
        raise CheckpointError(f"{directory} holds no weights of a {what}: give the directory of one")
    return found
