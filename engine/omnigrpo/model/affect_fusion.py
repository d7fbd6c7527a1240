"""AffectGPT's trainable front: each modality pooled into one row of the decoder, and one row of both fused.

Nothing here goes through a softmax or a non-linearity, as in the reference: pooling weights may be negative and need
not add up to 1. Module names are the reference checkpoint's.

Shape suffixes: ``B`` clips, ``F`` frames, ``V`` width of a frame's feature, ``A`` audio windows, ``S`` width of a
window's, ``X`` fusion width, ``D`` decoder width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from omnigrpo.model.affect_config import AffectGPTConfig


class FusedRows(NamedTuple):
    """Embeddings of one row each, ``[B, D]``."""

    video_BD: Tensor
    audio_BD: Tensor
    multi_BD: Tensor


class AffectFusion(nn.Module):
    """Attention pooling of each modality, and the pre-fusion of both."""

    def __init__(self, config: AffectGPTConfig) -> None:
        super().__init__()
        video, audio = config.vision.projection_width, config.audio.width
        fused, width = config.fusion_width, config.decoder.width
        self.video_attention_mlp = nn.Linear(video, 1)
        self.affectgpt_proj = nn.Linear(video, width)
        self.audio_attention_mlp = nn.Linear(audio, 1)
        self.audio_llama_proj = nn.Linear(audio, width)
        self.multi_video_embs = nn.Linear(video, fused)
        self.multi_audio_embs = nn.Linear(audio, fused)
        self.attention_mlp = nn.Linear(2 * fused, fused)
        self.fc_att = nn.Linear(fused, 2)
        self.multi_llama_proj = nn.Linear(fused, width)

    def forward(self, frames_BFV: Tensor, windows_BAS: Tensor) -> FusedRows:
        """Rows of clips with both modalities."""
        return FusedRows(
            video_BD=self.video(frames_BFV),
            audio_BD=self.audio(windows_BAS),
            multi_BD=self.multi(frames_BFV, windows_BAS),
        )

    def video(self, frames_BFV: Tensor) -> Tensor:
        """``[B, D]``: frames summed by a linear weight of each, then projected."""
        return self.affectgpt_proj(_pooled(frames_BFV, self.video_attention_mlp))

    def audio(self, windows_BAS: Tensor) -> Tensor:
        """``[B, D]``: windows summed by a linear weight of each, then projected."""
        return self.audio_llama_proj(_pooled(windows_BAS, self.audio_attention_mlp))

    def multi(self, frames_BFV: Tensor, windows_BAS: Tensor) -> Tensor:
        """``[B, D]``: the means of both modalities in one width, summed by two weights that depend on both."""
        video_BX = self.multi_video_embs(frames_BFV.mean(1))
        audio_BX = self.multi_audio_embs(windows_BAS.mean(1))
        weights_B2 = self.fc_att(self.attention_mlp(torch.cat([video_BX, audio_BX], dim=1)))
        return self.multi_llama_proj(video_BX * weights_B2[:, :1] + audio_BX * weights_B2[:, 1:])


def _pooled(features_BFV: Tensor, weigh: nn.Linear) -> Tensor:
    return (features_BFV * weigh(features_BFV)).sum(1)
