"""Unrelated faces and voices with the numbers behind them: what towers are pre-trained on.

No emotion, category or prototype is used: expression and prosody are uniform over their whole ranges; people,
speakers and scenes come from both domains. Pictures go through H.264 and sounds through AAC, and both through
the engine's media path.
"""

import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from omnigrpo.data.synthetic.attributes import (
    EXPRESSION_HIGH,
    EXPRESSION_LOW,
    PROSODY_HIGH,
    PROSODY_LOW,
    Expression,
    Prosody,
    names,
    sample_any_expression,
    sample_any_prosody,
    vector,
)
from omnigrpo.data.synthetic.clip import FRAMES_PER_SECOND, sway
from omnigrpo.data.synthetic.encode import write_mp4
from omnigrpo.data.synthetic.face import FaceStates, draw_faces
from omnigrpo.data.synthetic.identity import (
    POSE_RANGES,
    Domain,
    Pose,
    sample_face_identity,
    sample_pose,
    sample_scene,
    sample_voice_identity,
)
from omnigrpo.data.synthetic.voice import PITCH_SEMITONES, SAMPLE_RATE_HZ, sing
from omnigrpo.media.decode import decode
from omnigrpo.media.log_mel import whisper_log_mel
from omnigrpo.media.pixels import siglip_pixels
from omnigrpo.media.sampling import SamplingConfig
from omnigrpo.schema import Clip

FACE_TARGETS = names(Expression) + tuple(f"pose_{name}" for name in names(Pose))
VOICE_TARGETS = names(Prosody)
FACES_PER_REEL = 24
VOICES_PER_REEL = 8

_OOD_SHARE = 0.35
_OCCLUSION = 0.1
_DRAWN_SIZE = 112
_SLOT_SECONDS = 2.5
_HEARD_PITCH_HZ = 160.0
_HEARD_PITCH_SEMITONES = 12.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Studies:
    """Inputs of one tower and what to regress."""

    inputs: Tensor
    """uint8 RGB ``[n, S, S, 3]`` for faces, float16 log-mel ``[n, M, L]`` for voices."""
    targets_NT: Tensor
    """float32, scaled so that the uniform range of each attribute has mean 0 and variance 1."""

    def split(self, num_test: int) -> tuple["Studies", "Studies"]:
        """All but the last ``num_test``, and those."""
        head, tail = slice(None, -num_test), slice(-num_test, None)
        return (
            replace(self, inputs=self.inputs[head], targets_NT=self.targets_NT[head]),
            replace(self, inputs=self.inputs[tail], targets_NT=self.targets_NT[tail]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyFormat:
    """What the towers take in."""

    image_size: int
    num_mel_bins: int
    chunk_seconds: int


def make_studies(
    study_format: StudyFormat, *, seed: int, num_reels: int, num_workers: int
) -> tuple[Studies, Studies]:
    """Draw and sing ``num_reels`` files of 24 faces and 8 voices; returns the faces and the voices."""
    work = partial(_make_reel, seed, study_format)
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        reels = list(pool.map(work, range(num_reels), chunksize=4))
    faces, face_targets, voices, voice_targets = (
        torch.from_numpy(np.concatenate(column)) for column in zip(*reels, strict=True)
    )
    return (
        Studies(inputs=faces, targets_NT=face_targets),
        Studies(inputs=voices, targets_NT=voice_targets),
    )


def _make_reel(
    seed: int, study_format: StudyFormat, index: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One file of unrelated faces and voices, written and read back: pixels, targets, log-mels, targets."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, index])
    frames_FHWC, face_targets = _draw_reel(rng)
    waves, voice_targets = _sing_reel(rng)
    slot = round(_SLOT_SECONDS * SAMPLE_RATE_HZ)
    track = np.concatenate([np.pad(wave, (0, slot - len(wave))) for wave in waves])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "reel.mp4"
        write_mp4(
            path, frames_FHWC, track, frames_per_second=FRAMES_PER_SECOND, sample_rate_hz=SAMPLE_RATE_HZ
        )
        sampling = SamplingConfig(num_frames=FACES_PER_REEL)
        decoded = decode([Clip(path=path)], [("video", "audio")], sampling).clips[0]
    assert decoded.frames_FHWC is not None, decoded.error
    assert decoded.waveform is not None, decoded.error
    pixels = siglip_pixels(decoded.frames_FHWC, image_size=study_format.image_size, aspect="pad")
    pixels_FSS3 = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    mels = [
        whisper_log_mel(
            decoded.waveform[position * slot :][: len(wave)],
            num_mel_bins=study_format.num_mel_bins,
            chunk_seconds=study_format.chunk_seconds,
        )
        for position, wave in enumerate(waves)
    ]
    return pixels_FSS3.numpy(), face_targets, torch.stack(mels).half().numpy(), voice_targets


def _draw_reel(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    domains: list[Domain] = [_domain(rng) for _ in range(FACES_PER_REEL)]
    expressions = np.stack([vector(sample_any_expression(rng)) for _ in domains])
    poses = np.concatenate([sway(sample_pose(rng), 1, rng) for _ in domains])
    states = FaceStates(
        identities=tuple(sample_face_identity(domain, rng) for domain in domains),
        scenes=tuple(sample_scene(domain, rng, occlusion=_OCCLUSION) for domain in domains),
        expressions_FE=expressions,
        poses_FP=poses,
    )
    low = np.concatenate([vector(EXPRESSION_LOW), [low for low, _ in POSE_RANGES]])
    high = np.concatenate([vector(EXPRESSION_HIGH), [high for _, high in POSE_RANGES]])
    frames_FHWC = draw_faces(states, size=_DRAWN_SIZE, grain_rng=rng)
    return frames_FHWC, _standardise(np.concatenate([expressions, poses], axis=1), low, high)


def _sing_reel(rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    waves, values = [], []
    for _ in range(VOICES_PER_REEL):
        identity, prosody = sample_voice_identity(_domain(rng), rng), sample_any_prosody(rng)
        seconds = int(rng.integers(18, 31)) / FRAMES_PER_SECOND
        waves.append(sing(prosody, identity, duration_seconds=seconds, rng=rng))
        values.append([_heard_pitch(prosody, identity.base_hz), *vector(prosody)[1:]])
    low, high = vector(PROSODY_LOW), vector(PROSODY_HIGH)
    return waves, _standardise(np.asarray(values), low, high)


def _heard_pitch(prosody: Prosody, base_hz: float) -> float:
    """Pitch as one hears it from a stranger, whose base nobody knows: -1 an octave below 160 Hz, 1 above."""
    semitones = 12 * math.log2(base_hz / _HEARD_PITCH_HZ) + PITCH_SEMITONES * prosody.pitch
    return semitones / _HEARD_PITCH_SEMITONES


def _domain(rng: np.random.Generator) -> Domain:
    return "ood" if rng.random() < _OOD_SHARE else "in"


def _standardise(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return ((values - (low + high) / 2) / ((high - low) / math.sqrt(12))).astype(np.float32)
