"""What a face shows and what a voice does, as continuous numbers: prototypes, jitter, and the broad ranges."""

from dataclasses import astuple, dataclass, fields

import numpy as np

from omnigrpo.data.synthetic.emotions import Face, Voice


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """A facial expression at its apex."""

    mouth_curve: float
    """-1 corners far down, 1 corners far up."""
    mouth_open: float
    """0 closed, 1 wide open."""
    mouth_width: float
    """0 narrow, 1 broad."""
    brow_raise: float
    """-1 pressed down, 1 lifted high."""
    brow_tilt: float
    """-1 inner ends down, 1 inner ends up."""
    eye_open: float
    """0 nearly shut, 1 wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prosody:
    """How something is said."""

    pitch: float
    """-1 five semitones below the speaker's base, 1 five above."""
    contour: float
    """-1 falls by six semitones over the clip, 1 rises by six."""
    energy: float
    """0 soft with a dull spectrum, 1 loud with a sharp one."""
    tempo: float
    """0 two syllables a second, 1 six."""
    tremor: float
    """0 steady, 1 shakes by two semitones and in loudness, and breathes."""


EXPRESSION_LOW = Expression(
    mouth_curve=-1, mouth_open=0, mouth_width=0, brow_raise=-1, brow_tilt=-1, eye_open=0.15
)
EXPRESSION_HIGH = Expression(
    mouth_curve=1, mouth_open=1, mouth_width=1, brow_raise=1, brow_tilt=1, eye_open=1
)
PROSODY_LOW = Prosody(pitch=-1, contour=-1, energy=0, tempo=0, tremor=0)
PROSODY_HIGH = Prosody(pitch=1, contour=1, energy=1, tempo=1, tremor=1)

NEUTRAL = Expression(
    mouth_curve=0.0, mouth_open=0.05, mouth_width=0.45, brow_raise=0.0, brow_tilt=0.0, eye_open=0.55
)
"""Where every clip starts, whatever it comes to show."""

EXPRESSIONS: dict[Face, Expression] = {
    Face.SMILE: Expression(
        mouth_curve=0.8, mouth_open=0.3, mouth_width=0.75, brow_raise=0.15, brow_tilt=0.05, eye_open=0.45
    ),
    Face.WIDE: Expression(
        mouth_curve=-0.05, mouth_open=0.75, mouth_width=0.25, brow_raise=0.8, brow_tilt=0.3, eye_open=0.95
    ),
    Face.SCOWL: Expression(
        mouth_curve=-0.65, mouth_open=0.15, mouth_width=0.5, brow_raise=-0.65, brow_tilt=-0.75, eye_open=0.4
    ),
    Face.FLAT: Expression(
        mouth_curve=-0.15, mouth_open=0.05, mouth_width=0.45, brow_raise=0.0, brow_tilt=0.15, eye_open=0.5
    ),
}
PROSODIES: dict[Voice, Prosody] = {
    Voice.BRIGHT: Prosody(pitch=0.7, contour=0.6, energy=0.6, tempo=0.75, tremor=0.05),
    Voice.TREMBLE: Prosody(pitch=0.15, contour=-0.2, energy=0.3, tempo=0.35, tremor=0.8),
    Voice.FLAT: Prosody(pitch=-0.35, contour=0.0, energy=0.4, tempo=0.4, tremor=0.05),
    Voice.LOUD: Prosody(pitch=-0.05, contour=-0.5, energy=0.95, tempo=0.65, tremor=0.1),
}


def names(kind: type) -> tuple[str, ...]:
    """Field names of a data class in order, which is the order of `vector`."""
    return tuple(item.name for item in fields(kind))


def vector(attributes: Expression | Prosody) -> np.ndarray:
    """The attributes as float32 in the order of their fields."""
    return np.asarray(astuple(attributes), dtype=np.float32)


def sample_expression(
    face: Face, rng: np.random.Generator, *, intensity_low: float, jitter: float
) -> Expression:
    """The category's prototype, weakened towards neutral by a random intensity, plus normal jitter."""
    intensity = rng.uniform(intensity_low, 1.15)
    neutral, prototype = vector(NEUTRAL), vector(EXPRESSIONS[face])
    spread = (vector(EXPRESSION_HIGH) - vector(EXPRESSION_LOW)) / 2
    noisy = neutral + intensity * (prototype - neutral) + jitter * spread * rng.standard_normal(len(neutral))
    return _expression(noisy)


def sample_prosody(voice: Voice, rng: np.random.Generator, *, intensity_low: float, jitter: float) -> Prosody:
    """The category's prototype, weakened towards the mean of all by a random intensity, plus normal jitter."""
    intensity = rng.uniform(intensity_low, 1.15)
    middle = np.mean([vector(item) for item in PROSODIES.values()], axis=0)
    spread = (vector(PROSODY_HIGH) - vector(PROSODY_LOW)) / 2
    noisy = middle + intensity * (vector(PROSODIES[voice]) - middle)
    return _prosody(noisy + jitter * spread * rng.standard_normal(len(middle)))


def sample_any_expression(rng: np.random.Generator) -> Expression:
    """Any face at all, uniform over the ranges: no category, no emotion."""
    return _expression(rng.uniform(vector(EXPRESSION_LOW), vector(EXPRESSION_HIGH)))


def sample_any_prosody(rng: np.random.Generator) -> Prosody:
    """Any voice at all, uniform over the ranges: no category, no emotion."""
    return _prosody(rng.uniform(vector(PROSODY_LOW), vector(PROSODY_HIGH)))


def _expression(values: np.ndarray) -> Expression:
    clipped = np.clip(values, vector(EXPRESSION_LOW), vector(EXPRESSION_HIGH))
    return Expression(**dict(zip(names(Expression), clipped.tolist(), strict=True)))


def _prosody(values: np.ndarray) -> Prosody:
    clipped = np.clip(values, vector(PROSODY_LOW), vector(PROSODY_HIGH))
    return Prosody(**dict(zip(names(Prosody), clipped.tolist(), strict=True)))
