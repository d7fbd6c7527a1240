"""Whisper encoder: features of a padded log-mel spectrogram, averaged over ``pool`` positions.

Shape suffixes: ``B`` clips, ``M`` mel bins, ``L`` mel frames, ``P`` positions, ``A`` pooled positions,
``D`` width.
"""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnigrpo.model.config import AudioConfig
from omnigrpo.model.tower_layer import TowerLayer

if TYPE_CHECKING:
    from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

FLOAT16_BOUND = torch.finfo(torch.float16).max - 1000
"""Where transformers clamps the residual stream in float16."""


class AudioTower(nn.Module):
    """Whisper encoder with the final norm, and the two heads that its checkpoint holds and nothing uses.

    Without gradients the layers run fused; with gradients, as transformers wrote them.
    """

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_tower = _WhisperHolder(config)

    def forward(self, mel_BML: Tensor) -> Tensor:
        """Return ``[B, A, D]`` in the tower's dtype; ``L`` must be the padded length of the config."""
        if mel_BML.shape[2] != self.config.num_mel_frames:
            raise ValueError(
                f"the spectrogram has {mel_BML.shape[2]} frames: pad the waveform to {self.config.chunk_seconds} s, "
                f"which gives length {self.config.num_mel_frames}"
            )
        mel_BML = mel_BML.to(self.dtype_of_weights)
        encoder = self.audio_tower.encoder
        hidden_BPD = encoder(mel_BML).last_hidden_state if torch.is_grad_enabled() else self._encode(mel_BML)
        used_BPD = hidden_BPD[:, : self.config.num_tokens * self.config.pool]
        return used_BPD.unflatten(1, (self.config.num_tokens, self.config.pool)).mean(2)

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The dtype that the spectrogram is cast to."""
        return self.audio_tower.encoder.conv1.weight.dtype

    def _encode(self, mel_BML: Tensor) -> Tensor:
        encoder = self.audio_tower.encoder
        hidden_BDL = functional.gelu(encoder.conv1(mel_BML))
        hidden_BDP = functional.gelu(encoder.conv2(hidden_BDL))
        # Contiguous with D innermost: every sum with the residual stream keeps its layout.
        hidden_BPD = hidden_BDP.transpose(1, 2).contiguous().add_(encoder.embed_positions.weight)
        for layer in encoder.layers:
            self._fused(cast("WhisperEncoderLayer", layer)).run_(hidden_BPD)
            if hidden_BPD.dtype == torch.float16:  # Of the 16-bit types only this one overflows.
                hidden_BPD.clamp_(-FLOAT16_BOUND, FLOAT16_BOUND)
        return encoder.layer_norm(hidden_BPD)

    def _fused(self, layer: "WhisperEncoderLayer") -> TowerLayer:
        attention = layer.self_attn
        return TowerLayer(
            attention_norm=layer.self_attn_layer_norm,
            projections=(attention.q_proj, attention.k_proj, attention.v_proj),
            attention_out=attention.out_proj,
            ffn_norm=layer.final_layer_norm,
            ffn_in=layer.fc1,
            ffn_out=layer.fc2,
            num_heads=self.config.num_heads,
            gelu="none",
        )


class _WhisperHolder(nn.Module):
    """The part of ``WhisperForAudioClassification`` that the reference checkpoint stores."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        self.encoder = WhisperEncoder(
            WhisperConfig(
                d_model=config.width,
                encoder_layers=config.num_layers,
                encoder_attention_heads=config.num_heads,
                encoder_ffn_dim=config.ffn_width,
                num_mel_bins=config.num_mel_bins,
                max_source_positions=config.num_positions,
            )
        )
        self.projector = nn.Linear(config.width, config.classifier_width)
        self.classifier = nn.Linear(config.classifier_width, config.num_classes)
