"""SigLIP tower: patch features of single frames, as deep as the selected layer and no deeper.

Shape suffixes: ``B`` frames, ``S`` side in pixels, ``N`` patches, ``D`` width.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from omnigrpo.model.config import VisionConfig
from omnigrpo.model.tower_layer import TowerLayer

if TYPE_CHECKING:
    from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer


class VisionTower(nn.Module):
    """SigLIP vision transformer whose patch features feed the visual projector.

    The last layers, the post-norm and the pooling head are held, as the reference checkpoint holds them,
    but never computed. Without gradients the layers run fused; with gradients, as transformers wrote them.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = _SiglipHolder(config)

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Return ``hidden_states[select_layer]`` ``[B, N, D]`` in the tower's dtype."""
        siglip = self.vision_tower.vision_model
        hidden_BND = siglip.embeddings(pixels_B3SS.to(self.dtype_of_weights))
        layers = siglip.encoder.layers[: self.config.num_computed_layers]
        if torch.is_grad_enabled():
            for layer in layers:
                hidden_BND = layer(hidden_BND, None)
            return hidden_BND
        # The patch convolution leaves D outermost; every sum with the residual stream would keep it so.
        hidden_BND = hidden_BND.contiguous()
        for layer in layers:
            self._fused(cast("SiglipEncoderLayer", layer)).run_(hidden_BND)
        return hidden_BND

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The dtype that pixels are cast to."""
        return self.vision_tower.vision_model.embeddings.patch_embedding.weight.dtype

    def _fused(self, layer: "SiglipEncoderLayer") -> TowerLayer:
        attention = layer.self_attn
        return TowerLayer(
            attention_norm=layer.layer_norm1,
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            attention_out=attention.out_proj,
            ffn_norm=layer.layer_norm2,
            ffn_in=layer.mlp.fc1,
            ffn_out=layer.mlp.fc2,
            num_heads=self.config.num_heads,
            gelu="tanh",
        )


class _SiglipHolder(nn.Module):
    """The level of names that the reference's ``SiglipVisionModel`` has above its transformer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        from transformers import SiglipVisionConfig, SiglipVisionModel

        siglip = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.ffn_width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )
        # Recent transformers have no inner ``vision_model``; older ones do.
        self.vision_model = getattr(siglip, "vision_model", siglip)
