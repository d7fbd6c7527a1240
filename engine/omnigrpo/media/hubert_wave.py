"""Waveforms to HuBERT's input: each brought to zero mean and unit variance, then padded to one length.

Shape suffixes: ``B`` waveforms, ``N`` samples of the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from omnigrpo.media.log_mel import check_waveforms

VARIANCE_FLOOR = 1e-7
"""Added to the variance before its root, so that silence stays silence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HubertWaves:
    """What a HuBERT tower takes."""

    waveforms_BN: Tensor
    """float32, 16 kHz; 0 after the end of each waveform."""
    mask_BN: Tensor
    """int32: 1 where a waveform sounds, 0 after its end. Towers with ``feat_extract_norm="layer"`` (the large ones)
    want it, those with ``"group"`` were trained without."""


def hubert_waves(
    waveforms: Sequence[Tensor], *, num_samples: int | None = None, normalise: bool = True
) -> HubertWaves:
    """Compute what ``Wav2Vec2FeatureExtractor`` does for a padded batch, on the device where the waveforms lie.

    Mean and variance are taken in float64: the extractor's float32 drifts on a large constant offset.

    Args:
        waveforms: B waveforms of float samples ``[n]`` at 16 kHz, mono, each of its own length.
        num_samples: N; longer waveforms are cut to it, before their mean is taken. The longest one's by default.
        normalise: bring each waveform to zero mean and unit variance (``do_normalize``).

    Returns:
        The padded waveforms and their mask.

    Raises:
        ValueError: There are no waveforms, one is no float samples or has none, or they lie on several devices.
    """
    device = check_waveforms(waveforms)
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    for index, waveform in enumerate(waveforms):
        if len(waveform) == 0:
            raise ValueError(f"waveform {index} has no samples, so no mean; leave it out")
    heard = [waveform[:num_samples].float() for waveform in waveforms]
    width = num_samples or max(len(waveform) for waveform in heard)
    lengths_B1 = torch.tensor([[len(waveform)] for waveform in heard], device=device)
    padded_BN = pad_sequence(heard, batch_first=True)
    padded_BN = F.pad(padded_BN, (0, width - padded_BN.shape[1]))
    mask_BN = torch.arange(width, device=device) < lengths_B1
    if normalise:
        padded_BN = _standardised(padded_BN, mask_BN, lengths_B1)
    return HubertWaves(waveforms_BN=padded_BN, mask_BN=mask_BN.to(torch.int32))


def _standardised(waveforms_BN: Tensor, mask_BN: Tensor, lengths_B1: Tensor) -> Tensor:
    """Zero mean and unit variance over the masked samples, 0 elsewhere."""
    mean_B1 = waveforms_BN.sum(dim=1, keepdim=True, dtype=torch.float64) / lengths_B1
    centred_BN = torch.where(mask_BN, waveforms_BN - mean_B1, 0.0)
    variance_B1 = centred_BN.square().sum(dim=1, keepdim=True) / lengths_B1
    return (centred_BN / (variance_B1 + VARIANCE_FLOOR).sqrt()).float()
