"""One clip: what it shows and says, then its frames and its waveform.

The function that draws is given the face category and nothing else of the emotion, the one that sings only the
voice category; all other randomness comes from streams that depend on (seed, split, index) alone. So no trace
of the emotion can leak from one modality into the other.
"""

from dataclasses import asdict, astuple, dataclass
from typing import Literal

import numpy as np

from omnigrpo.data.synthetic.attributes import (
    NEUTRAL,
    Expression,
    Prosody,
    sample_expression,
    sample_prosody,
    vector,
)
from omnigrpo.data.synthetic.emotions import CELLS, Face, Voice
from omnigrpo.data.synthetic.face import FaceStates, draw_faces
from omnigrpo.data.synthetic.identity import (
    Domain,
    FaceIdentity,
    Pose,
    Scene,
    VoiceIdentity,
    sample_face_identity,
    sample_pose,
    sample_scene,
    sample_voice_identity,
)
from omnigrpo.data.synthetic.voice import sing

Split = Literal["cold_start", "rl", "heldout", "ood"]
SPLITS: tuple[Split, ...] = ("cold_start", "rl", "heldout", "ood")
DOMAINS: dict[Split, Domain] = {"cold_start": "in", "rl": "in", "heldout": "in", "ood": "ood"}

FRAMES_PER_SECOND = 12
_STREAMS = ("length", "face", "voice", "text")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difficulty:
    """How far single clips stray from the prototype of their category."""

    expression_jitter: float = 0.16
    """Standard deviation of each facial attribute, as a share of half its range."""
    prosody_jitter: float = 0.16
    """The same for each vocal attribute."""
    intensity_low: float = 0.7
    """Intensity is uniform from here to 1.15; 1 is the prototype, 0 the neutral face or mean voice."""
    occlusion: float = 0.08
    """Share of clips in which something round hides a part of the face."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnFace:
    """A drawn video and the numbers behind it."""

    expression: Expression
    identity: FaceIdentity
    scene: Scene
    frames_FHWC: np.ndarray
    """uint8 RGB ``[frames, size, size, 3]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SungVoice:
    """A synthesised utterance and the numbers behind it."""

    prosody: Prosody
    identity: VoiceIdentity
    waveform: np.ndarray
    """float32 mono samples at 16 kHz."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticClip:
    """Both modalities of one clip."""

    label: str
    face: DrawnFace
    voice: SungVoice

    def attributes(self) -> dict[str, float]:
        """Every facial and vocal attribute by name."""
        return asdict(self.face.expression) | asdict(self.voice.prosody)


def stream(seed: int, split: Split, index: int, name: str) -> np.random.Generator:
    """The random stream ``name`` of one clip; independent of the label and of every other clip."""
    return np.random.default_rng(
        np.random.SeedSequence([seed, SPLITS.index(split), index, _STREAMS.index(name)])
    )


def render_clip(
    label: str, *, seed: int, split: Split, index: int, difficulty: Difficulty, size: int
) -> SyntheticClip:
    """Renders clip ``index`` of a split; equal arguments give bit-equal frames and samples."""
    num_frames = int(stream(seed, split, index, "length").integers(18, 31))
    face, voice = CELLS[label]
    return SyntheticClip(
        label=label,
        face=draw(face, DOMAINS[split], num_frames, difficulty, size, stream(seed, split, index, "face")),
        voice=speak(voice, DOMAINS[split], num_frames, difficulty, stream(seed, split, index, "voice")),
    )


def draw(
    face: Face, domain: Domain, num_frames: int, difficulty: Difficulty, size: int, rng: np.random.Generator
) -> DrawnFace:
    """Draws a person of the domain whose face goes from neutral to the category's expression."""
    identity = sample_face_identity(domain, rng)
    scene = sample_scene(domain, rng, occlusion=difficulty.occlusion)
    pose = sample_pose(rng)
    expression = sample_expression(
        face, rng, intensity_low=difficulty.intensity_low, jitter=difficulty.expression_jitter
    )
    states = FaceStates(
        identities=(identity,),
        scenes=(scene,),
        expressions_FE=_expression_track(expression, num_frames, rng),
        poses_FP=sway(pose, num_frames, rng),
    )
    frames_FHWC = draw_faces(states, size=size, grain_rng=rng)
    return DrawnFace(expression=expression, identity=identity, scene=scene, frames_FHWC=frames_FHWC)


def speak(
    voice: Voice, domain: Domain, num_frames: int, difficulty: Difficulty, rng: np.random.Generator
) -> SungVoice:
    """Sings with a speaker of the domain in the category's tone, as long as the video lasts."""
    identity = sample_voice_identity(domain, rng)
    prosody = sample_prosody(
        voice, rng, intensity_low=difficulty.intensity_low, jitter=difficulty.prosody_jitter
    )
    waveform = sing(prosody, identity, duration_seconds=num_frames / FRAMES_PER_SECOND, rng=rng)
    return SungVoice(prosody=prosody, identity=identity, waveform=waveform)


def _expression_track(apex: Expression, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Neutral to apex over the first part of the clip, with talking lips and blinks that know no emotion."""
    time_F = np.linspace(0, 1, num_frames, dtype=np.float32)
    start, rise = rng.uniform(0.0, 0.1), rng.uniform(0.1, 0.25)
    progress_F = np.clip((time_F - start) / rise, 0, 1)
    weight_F = progress_F**2 * (3 - 2 * progress_F)
    weight_F *= 1 - 0.12 * np.sin(np.pi * rng.uniform(0.5, 2) * time_F + rng.uniform(0, np.pi)) ** 2
    track_FE = vector(NEUTRAL) + weight_F[:, None] * (vector(apex) - vector(NEUTRAL))
    talk_F = np.sin(2 * np.pi * (rng.uniform(4, 8) * time_F + rng.random()))
    track_FE[:, 1] = np.clip(track_FE[:, 1] + rng.uniform(0.02, 0.1) * talk_F, 0, 1)
    for blink in rng.integers(0, num_frames, rng.integers(0, 3)):
        track_FE[blink : blink + 2, 5] *= 0.2
    return track_FE.astype(np.float32)


def sway(rest: Pose, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """A head that sways gently around its rest: the fields of `Pose`, float32 ``[F, 6]``."""
    amplitude_P = np.asarray([0.012, 0.01, 0.004, 0.04, 0.15, 0.2], dtype=np.float32)
    cycles_P, phase_P = rng.uniform(0.4, 1.4, 6), rng.random(6)
    time_F1 = np.linspace(0, 1, num_frames)[:, None]
    sway_FP = amplitude_P * np.sin(2 * np.pi * (cycles_P * time_F1 + phase_P))
    return (np.asarray(astuple(rest)) + sway_FP).astype(np.float32)
