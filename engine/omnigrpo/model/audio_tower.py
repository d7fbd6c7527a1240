"""Whisper encoder: features of a padded log-mel spectrogram, averaged over ``pool`` positions.

Shape suffixes: ``B`` clips, ``M`` mel bins, ``L`` mel frames, ``A`` pooled positions, ``D`` width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from omnigrpo.model.config import AudioConfig


class AudioTower(nn.Module):
    """Whisper encoder with the final norm, and the two heads that its checkpoint holds and nothing uses."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        self.audio_tower = _WhisperHolder(config)

    def forward(self, mel_BML: Tensor) -> Tensor:
        """Return ``[B, A, D]`` in the tower's dtype; ``L`` must be the padded length of the config."""
        hidden_BPD = self.audio_tower.encoder(mel_BML.to(self.dtype_of_weights)).last_hidden_state
        return functional.avg_pool1d(hidden_BPD.transpose(1, 2), self.config.pool).transpose(1, 2)

    @property
    def dtype_of_weights(self) -> torch.dtype:
        """The dtype that the spectrogram is cast to."""
        return self.audio_tower.encoder.conv1.weight.dtype


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
