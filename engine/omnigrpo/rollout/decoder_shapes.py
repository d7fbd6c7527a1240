"""The decoder's weights by name, as a rollout engine of another process takes them."""

import torch

from omnigrpo.model.config import DecoderConfig
from omnigrpo.model.qwen2 import Qwen2Decoder

HEAD_NAME = "lm_head.weight"


def decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight of the decoder by its name in the checkpoint; a tied head is the embedding and has none."""
    with torch.device("meta"):
        decoder = Qwen2Decoder(config)
    shapes = {f"model.{name}": tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    if not config.tie_word_embeddings:
        shapes[HEAD_NAME] = (config.vocab_size, config.width)
    return shapes


def geometry_of(config: DecoderConfig) -> str:
    """What makes two decoders' weights interchangeable."""
    return (
        f"vocab={config.vocab_size} width={config.width} layers={config.num_layers} heads={config.num_heads} "
        f"kv_heads={config.num_kv_heads} ffn={config.ffn_width} tied={config.tie_word_embeddings}"
    )
