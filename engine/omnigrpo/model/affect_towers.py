"""AffectGPT's frozen towers: CLIP on single frames, HuBERT on windows of sound. transformers' own modules.

Shape suffixes: ``B`` frames or windows, ``S`` side in pixels, ``N`` samples, ``V`` and ``D`` widths.
"""

import torch
from torch import Tensor, nn

from omnigrpo.model.affect_config import ClipVisionConfig, HubertConfig

SAMPLE_RATE_HZ = 16_000


class ClipTower(nn.Module):
    """CLIP's image tower with its projection, as ``CLIPModel.get_image_features``."""

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.model = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.ffn_width,
                projection_dim=config.projection_width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )

    def forward(self, pixels_B3SS: Tensor) -> Tensor:
        """Return one feature per frame, ``[B, V]``, not normalised."""
        dtype = self.model.visual_projection.weight.dtype
        return self.model(pixel_values=pixels_B3SS.to(dtype)).image_embeds


class HubertTower(nn.Module):
    """HuBERT with layer-normed convolutions (the large ones), averaged over its last layers and over time."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        from transformers import HubertConfig as TransformersConfig
        from transformers import HubertModel

        self._num_averaged = config.num_averaged_layers
        num_convolutions = 7
        self.model = HubertModel(
            TransformersConfig(
                hidden_size=config.width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                intermediate_size=config.ffn_width,
                conv_dim=[config.conv_width] * num_convolutions,
                conv_bias=True,
                do_stable_layer_norm=True,
                feat_extract_norm="layer",
            )
        )

    def forward(self, waveforms_BN: Tensor) -> Tensor:
        """Return one feature per window, ``[B, D]``; windows of one length, each of zero mean and unit variance."""
        dtype = self.model.feature_projection.projection.weight.dtype
        states = self.model(waveforms_BN.to(dtype), output_hidden_states=True).hidden_states
        return torch.stack(states[-self._num_averaged :]).mean(0).mean(1)


def audio_windows(waveform_N: Tensor, config: HubertConfig) -> Tensor:
    """Cut a waveform into windows of equal length that start at equal distances, ``[A, N]``.

    The first starts at 0, the last ends at the end. A waveform shorter than one window is followed by zeros, and all
    windows are the same.
    """
    length = round(config.window_seconds * SAMPLE_RATE_HZ)
    room = max(len(waveform_N) - length, 0)
    last = max(config.num_windows - 1, 1)
    starts = [room * index // last for index in range(config.num_windows)]
    windows = [waveform_N[start : start + length] for start in starts]
    return torch.stack([nn.functional.pad(window, (0, length - len(window))) for window in windows])
