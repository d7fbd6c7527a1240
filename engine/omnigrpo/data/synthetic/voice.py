"""Sings: a glottal source of harmonics and breath through formants, in syllables, as prosody and speaker ask."""

from dataclasses import dataclass

import numpy as np

from omnigrpo.data.synthetic.attributes import Prosody
from omnigrpo.data.synthetic.identity import VoiceIdentity

SAMPLE_RATE_HZ = 16_000
BLOCK_SAMPLES = 80
"""Pitch, loudness and spectrum are constant over 5 ms and interpolated for the pitch."""

PITCH_SEMITONES = 5.0
CONTOUR_SEMITONES = 6.0
TREMOR_SEMITONES = 2.0
TREMOR_HZ = 6.0
TREMOR_DEPTH = 0.65
"""Share of the loudness that a full tremor takes away at its troughs."""
TREMOR_BREATH = 0.2
"""Breath that a full tremor adds to the speaker's own."""
SYLLABLES_PER_SECOND = (2.0, 6.0)
LOUDNESS_DB = (-32.0, -14.0)
"""Root mean square of a syllable's top, relative to full scale, at energy 0 and 1."""
TILT_DB_PER_OCTAVE = (-13.0, -5.0)
"""Slope of the source spectrum at energy 0 and 1."""

_VOWELS_HZ = np.asarray(
    [(730, 1090, 2440), (530, 1840, 2480), (300, 2200, 2900), (570, 840, 2410), (330, 900, 2240)], np.float32
)
_BANDWIDTHS_HZ = np.asarray([90, 110, 170], np.float32)
_NUM_HARMONICS = 44


@dataclass(frozen=True, kw_only=True, slots=True)
class Melody:
    """Prosody over time, one value per block."""

    f0_hz_B: np.ndarray
    level_B: np.ndarray
    """Linear amplitude, 0..1."""
    formants_B3: np.ndarray
    """Formant frequencies, Hz."""


def sing(
    prosody: Prosody, identity: VoiceIdentity, *, duration_seconds: float, rng: np.random.Generator
) -> np.ndarray:
    """Synthesise one utterance: float32 mono ``[duration * 16000]`` within [-1, 1]."""
    num_blocks = round(duration_seconds * SAMPLE_RATE_HZ) // BLOCK_SAMPLES
    melody = compose(prosody, identity, num_blocks=num_blocks, rng=rng)
    voiced = _harmonics(melody, prosody)
    breath = rng.standard_normal(len(voiced), dtype=np.float32)
    breath[1:] -= 0.6 * breath[:-1].copy()
    breathiness = identity.breath + TREMOR_BREATH * prosody.tremor
    voiced += breathiness * np.repeat(melody.level_B, BLOCK_SAMPLES) * breath
    gain_db = LOUDNESS_DB[0] + prosody.energy * (LOUDNESS_DB[1] - LOUDNESS_DB[0]) + identity.gain_db
    voiced *= 10 ** (gain_db / 20)
    room_db = (LOUDNESS_DB[0] + LOUDNESS_DB[1]) / 2 - identity.snr_db
    room = np.cumsum(rng.standard_normal(len(voiced), dtype=np.float32))
    room[40:] -= room[:-40].copy()
    voiced += room * np.float32(10 ** (room_db / 20) / np.sqrt(40))
    return np.clip(voiced, -1, 1)


def compose(
    prosody: Prosody, identity: VoiceIdentity, *, num_blocks: int, rng: np.random.Generator
) -> Melody:
    """Pitch, level and formants of each 5 ms block."""
    seconds = np.arange(num_blocks, dtype=np.float32) * (BLOCK_SAMPLES / SAMPLE_RATE_HZ)
    duration = num_blocks * BLOCK_SAMPLES / SAMPLE_RATE_HZ
    starts, lengths = _syllables(prosody.tempo, duration, rng)
    which = np.clip(np.searchsorted(starts, seconds, side="right") - 1, 0, len(starts) - 1)
    inside = np.clip((seconds - starts[which]) / lengths[which], 0, 1)
    level = np.clip(np.minimum(inside / 0.2, (1 - inside) / 0.4), 0, 1) ** 0.8
    level *= rng.uniform(0.8, 1.0, len(starts)).astype(np.float32)[which]
    shake = np.sin(2 * np.pi * (TREMOR_HZ * seconds + rng.random()))
    level *= 1 - TREMOR_DEPTH * prosody.tremor * (0.5 + 0.5 * shake)
    accents = rng.normal(0, 0.7, len(starts)).astype(np.float32)
    semitones = (
        PITCH_SEMITONES * prosody.pitch
        + CONTOUR_SEMITONES * prosody.contour * (seconds / duration - 0.5)
        + TREMOR_SEMITONES * prosody.tremor * shake
        + accents[which] * (1 - (2 * inside - 1) ** 2)
        + rng.normal(0, 0.12, num_blocks)
    )
    vowels = _VOWELS_HZ[rng.integers(0, len(_VOWELS_HZ), len(starts))] * identity.formant_scale
    return Melody(
        f0_hz_B=(identity.base_hz * 2 ** (semitones / 12)).astype(np.float32),
        level_B=level.astype(np.float32),
        formants_B3=vowels[which],
    )


def _syllables(tempo: float, duration: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Start and length in seconds of each syllable, pauses between them left out of the lengths."""
    slow, fast = SYLLABLES_PER_SECOND
    period = 1 / (slow + tempo * (fast - slow))
    lead = rng.uniform(0.03, 0.15)
    count = max(1, round((duration - lead - 0.08) / period))
    steps = period * rng.uniform(0.85, 1.15, count)
    steps *= (duration - lead - 0.08) / steps.sum()
    starts = lead + np.concatenate([[0.0], np.cumsum(steps)[:-1]])
    return starts.astype(np.float32), (0.88 * steps).astype(np.float32)


def _harmonics(melody: Melody, prosody: Prosody) -> np.ndarray:
    """The voiced part at unit level, float32 samples; harmonics above 7 kHz stay silent."""
    blocks = np.arange(len(melody.f0_hz_B) * BLOCK_SAMPLES, dtype=np.float32) / BLOCK_SAMPLES - 0.5
    f0 = np.interp(blocks, np.arange(len(melody.f0_hz_B)), melody.f0_hz_B)
    phase = 2 * np.pi * np.cumsum(f0 / SAMPLE_RATE_HZ)
    amplitudes_NB = _harmonic_amplitudes(melody, prosody)
    turn = np.exp(1j * phase).astype(np.complex64)
    wave, total = turn.copy(), np.zeros(len(turn), dtype=np.float32)
    for amplitude_B in amplitudes_NB:
        total += np.repeat(amplitude_B, BLOCK_SAMPLES) * wave.imag
        wave *= turn
    return total


def _harmonic_amplitudes(melody: Melody, prosody: Prosody) -> np.ndarray:
    """Amplitude ``[N, B]`` of each harmonic: source slope times formants, unit energy, times the level."""
    order_N1 = np.arange(1, _NUM_HARMONICS + 1, dtype=np.float32)[:, None]
    hertz_NB = order_N1 * melody.f0_hz_B
    tilt_db = TILT_DB_PER_OCTAVE[0] + prosody.energy * (TILT_DB_PER_OCTAVE[1] - TILT_DB_PER_OCTAVE[0])
    slope_N1 = 10 ** (tilt_db / 20 * np.log2(order_N1))
    resonance_NB = np.full(hertz_NB.shape, 0.05, dtype=np.float32)
    for formant in range(3):
        distance_NB = (hertz_NB - melody.formants_B3[:, formant]) / _BANDWIDTHS_HZ[formant]
        resonance_NB += 0.7**formant / np.sqrt(1 + distance_NB**2)
    amplitude_NB = slope_N1 * resonance_NB * (hertz_NB < 7000)
    power_B = np.sqrt((amplitude_NB**2).sum(axis=0) / 2)
    smooth = np.ones(9, dtype=np.float32) / 9
    level_B = np.convolve(melody.level_B, smooth, mode="same")
    return (amplitude_NB / power_B * level_B).astype(np.float32)
