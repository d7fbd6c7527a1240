"""What bench_encode compares with: transformers' towers, and the projector and prefix rows written the plain way.

Shape suffixes: ``B`` clips, ``F`` frames, ``N`` patches of a frame, ``C`` tower width, ``D`` decoder width,
``Y``, ``X`` patch grid, ``V`` visual rows of a clip, ``S`` side in pixels, ``M`` mel bins, ``L`` mel frames,
``T`` packed rows.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import SiglipVisionConfig, SiglipVisionModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from omnigrpo.model.audio_tower import AudioTower
from omnigrpo.model.projectors import AllInOneSmall, Bottleneck, ConvNorm
from omnigrpo.model.vision_tower import VisionTower


class TransformersVision(nn.Module):
    """SigLIP as HumanOmni's code calls it: all hidden states, of which one is taken."""

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        config = tower.config
        self.select_layer = config.select_layer
        self.siglip = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.ffn_width,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
            )
        )
        inner = getattr(self.siglip, "vision_model", self.siglip)
        inner.load_state_dict(tower.vision_tower.vision_model.state_dict())

    def forward(self, pixels_BF3SS: Tensor) -> Tensor:
        """Patch features ``[B, F, N, C]``."""
        output = self.siglip(pixel_values=pixels_BF3SS.flatten(0, 1), output_hidden_states=True)
        return output.hidden_states[self.select_layer].unflatten(0, pixels_BF3SS.shape[:2])


class TransformersAudio(nn.Module):
    """Whisper's encoder as HumanOmni's code calls it, with its average over time behind."""

    def __init__(self, tower: AudioTower) -> None:
        super().__init__()
        config = tower.config
        self.pool = config.pool
        self.whisper = WhisperEncoder(
            WhisperConfig(
                d_model=config.width,
                encoder_layers=config.num_layers,
                encoder_attention_heads=config.num_heads,
                encoder_ffn_dim=config.ffn_width,
                num_mel_bins=config.num_mel_bins,
                max_source_positions=config.num_positions,
            )
        )
        self.whisper.load_state_dict(tower.audio_tower.encoder.state_dict())

    def forward(self, mel_BML: Tensor) -> Tensor:
        """Pooled features ``[B, positions / pool, width]``."""
        hidden = self.whisper(mel_BML).last_hidden_state
        return functional.avg_pool1d(hidden.transpose(1, 2), self.pool).transpose(1, 2)


def plain_projector(projector: AllInOneSmall, features_BFNC: Tensor, weights_B3: Tensor) -> Tensor:
    """HumanOmni's projector on its own weights: channels first, every convolution a convolution."""
    clips, frames = features_BFNC.shape[:2]
    grid = projector.grid
    image_BCYX = features_BFNC.flatten(0, 1).transpose(1, 2).unflatten(2, (grid, grid)).contiguous()
    branches = []
    for branch in ("video", "body"):
        image = _plain_stage(projector.get_submodule(f"s1_{branch}"), image_BCYX)
        sampler = cast("nn.Conv3d", projector.get_submodule(f"sampler_{branch}.0"))
        volume = image.unflatten(0, (clips, frames)).transpose(1, 2).contiguous()
        volume = functional.conv3d(volume, sampler.weight, sampler.bias, (1, 2, 2), (1, 0, 0))[:, :, :-1]
        image = functional.silu(volume).transpose(1, 2).flatten(0, 1).contiguous()
        image = _plain_stage(projector.get_submodule(f"s2_{branch}"), image)
        rows_BVD = image.unflatten(0, (clips, frames)).permute(0, 1, 3, 4, 2).flatten(1, 3)
        branches.append(projector.get_submodule(f"readout_{branch}")(rows_BVD))
    rows = projector.mlp_2xgelu_face(features_BFNC).flatten(0, 1).transpose(1, 2).unflatten(2, (grid, grid))
    halved = functional.interpolate(rows.contiguous(), size=(grid // 2, grid // 2), mode="bilinear")
    branches.append(halved.flatten(2).transpose(1, 2).unflatten(0, (clips, frames)).flatten(1, 2))
    return (weights_B3[:, :, None, None] * torch.stack(branches, dim=1)).sum(1)


def plain_rows(ids_T: Tensor, embedding: nn.Embedding, modality_rows: Mapping[int, Tensor]) -> Tensor:
    """All ids embedded, then each modality's rows written over a copy."""
    rows_TD = embedding(ids_T.clamp(min=0))
    for row_id, rows in modality_rows.items():
        rows_TD = rows_TD.index_copy(0, (ids_T == row_id).nonzero().squeeze(1), rows)
    return rows_TD


def _plain_stage(stage: nn.Module, image_BCYX: Tensor) -> Tensor:
    for block in cast("list[Bottleneck]", list(stage.children())):
        shortcut = image_BCYX if block.downsample is None else _plain_conv_norm(block.downsample, image_BCYX)
        image = _plain_conv_norm(block.conv2, _plain_conv_norm(block.conv1, image_BCYX))
        gates = block.se.fc2(functional.silu(block.se.fc1(image.mean((2, 3), keepdim=True)))).sigmoid()
        image_BCYX = functional.silu(_plain_conv_norm(block.conv3, image * gates) + shortcut)
    return image_BCYX


def _plain_conv_norm(module: ConvNorm, image_BCYX: Tensor) -> Tensor:
    image = module.bn(module.conv(image_BCYX).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return functional.silu(image) if module.act else image
