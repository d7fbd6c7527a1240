"""Who is seen and heard and where: everything random that knows nothing of the emotion.

Two disjoint domains exist. `in` serves training and held-out clips: natural skin and hair, mid-range voices,
plain backgrounds. `ood` has other skin and hair colours, other head shapes, very low or high voices, other
backgrounds and more noise.
"""

import colorsys
from dataclasses import dataclass
from typing import Literal

import numpy as np

Domain = Literal["in", "ood"]
Rgb = tuple[float, float, float]
"""Red, green and blue in 0..1."""

HAIR_STYLES = ("short", "long", "puffs", "bald")
BACKGROUNDS = ("gradient", "stripes", "blobs", "checks", "rings")
_DOMAIN_BACKGROUNDS: dict[Domain, tuple[int, ...]] = {"in": (0, 1, 2), "ood": (3, 4)}


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceIdentity:
    """One drawn person; lengths in units of half the head's height."""

    aspect: float
    """Head width over height."""
    jaw: float
    """0 oval, 0.3 pointed chin."""
    skin: Rgb
    hair: Rgb
    hair_style: int
    """Index into HAIR_STYLES."""
    eye_spacing: float
    eye_size: float
    iris: Rgb
    brow_thickness: float
    mouth_drop: float
    """How far the mouth lies below its usual place."""
    lip: Rgb
    nose: float
    glasses: bool
    shirt: Rgb


@dataclass(frozen=True, kw_only=True, slots=True)
class Balloon:
    """A disc that hides part of the face; head units."""

    u: float
    v: float
    radius: float
    colour: Rgb


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """Background, light and camera."""

    background: int
    """Index into BACKGROUNDS."""
    colour_a: Rgb
    colour_b: Rgb
    frequency: float
    """Pattern periods across the picture."""
    angle: float
    """Radians."""
    phase: float
    light_angle: float
    light_strength: float
    exposure: float
    grain: int
    """Amplitude of the sensor noise, 8-bit levels."""
    balloon: Balloon
    """Something round in front of the face; a radius of 0 for nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """Where the head rests; fractions of the picture's side, radians."""

    x: float
    y: float
    size: float
    """Half the head's height."""
    roll: float
    yaw: float
    """-1 turned left, 1 turned right."""
    nod: float
    """-1 up, 1 down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VoiceIdentity:
    """One speaker and one recording."""

    base_hz: float
    formant_scale: float
    breath: float
    """Share of noise in the source."""
    gain_db: float
    snr_db: float


POSE_RANGES = ((0.41, 0.59), (0.45, 0.56), (0.29, 0.39), (-0.2, 0.2), (-0.7, 0.7), (-0.6, 0.6))
"""Low and high of each field of `Pose`, in both domains."""


def sample_face_identity(domain: Domain, rng: np.random.Generator) -> FaceIdentity:
    """A person of the domain."""
    skin, hair, style = _natural(rng) if domain == "in" else _fantastic(rng)
    wide = rng.uniform(0.72, 0.86) if domain == "in" else rng.uniform(0.9, 1.0)
    lip = tuple(0.55 * s + 0.45 * r for s, r in zip(skin, (0.75, 0.2, 0.25), strict=True))
    return FaceIdentity(
        aspect=wide,
        jaw=rng.uniform(0.05, 0.28) if domain == "in" else rng.uniform(0.0, 0.05),
        skin=skin,
        hair=hair,
        hair_style=style,
        eye_spacing=rng.uniform(0.3, 0.38),
        eye_size=rng.uniform(0.85, 1.15) if domain == "in" else rng.uniform(1.0, 1.3),
        iris=_hsv(rng.uniform(0.05, 0.62), rng.uniform(0.4, 0.8), rng.uniform(0.25, 0.55)),
        brow_thickness=rng.uniform(0.04, 0.07),
        mouth_drop=rng.uniform(-0.05, 0.06),
        lip=(lip[0], lip[1], lip[2]),
        nose=rng.uniform(0.7, 1.3),
        glasses=bool(rng.random() < 0.15),
        shirt=_hsv(rng.random(), rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.8)),
    )


def sample_scene(domain: Domain, rng: np.random.Generator, *, occlusion: float) -> Scene:
    """A background, a light and a camera of the domain; ``occlusion`` is the chance of a balloon."""
    hue, value = rng.random(), rng.uniform(0.35, 0.85)
    low, high = (0, 5) if domain == "in" else (3, 9)
    return Scene(
        background=int(rng.choice(_DOMAIN_BACKGROUNDS[domain])),
        colour_a=_hsv(hue, rng.uniform(0.1, 0.5), value),
        colour_b=_hsv(hue + rng.uniform(-0.12, 0.12), rng.uniform(0.1, 0.5), value * rng.uniform(0.65, 1.0)),
        frequency=rng.uniform(1.5, 5.0),
        angle=rng.uniform(0, np.pi),
        phase=rng.random(),
        light_angle=rng.uniform(0, 2 * np.pi),
        light_strength=rng.uniform(0.0, 0.25),
        exposure=rng.uniform(0.85, 1.1),
        grain=int(rng.integers(low, high)),
        balloon=_balloon(occlusion, rng),
    )


def sample_pose(rng: np.random.Generator) -> Pose:
    """Where the head rests; the same in both domains."""
    return Pose(
        **{
            name: rng.uniform(low, high)
            for name, (low, high) in zip(Pose.__slots__, POSE_RANGES, strict=True)
        }
    )


def sample_voice_identity(domain: Domain, rng: np.random.Generator) -> VoiceIdentity:
    """A speaker and a recording of the domain."""
    if domain == "in":
        base, formants, snr = np.exp(rng.uniform(np.log(115), np.log(225))), rng.uniform(0.92, 1.1), (18, 36)
    elif rng.random() < 0.5:
        base, formants, snr = rng.uniform(82, 108), rng.uniform(0.84, 0.9), (14, 26)
    else:
        base, formants, snr = rng.uniform(235, 290), rng.uniform(1.12, 1.22), (14, 26)
    return VoiceIdentity(
        base_hz=float(base),
        formant_scale=float(formants),
        breath=rng.uniform(0.02, 0.12),
        gain_db=rng.uniform(-3, 3),
        snr_db=rng.uniform(*snr),
    )


def _balloon(occlusion: float, rng: np.random.Generator) -> Balloon:
    present, radius = rng.random() < occlusion, rng.uniform(0.25, 0.45)
    return Balloon(
        u=rng.uniform(-0.8, 0.8),
        v=rng.uniform(-0.6, 0.9),
        radius=radius if present else 0.0,
        colour=_hsv(rng.random(), 0.7, 0.8),
    )


def _natural(rng: np.random.Generator) -> tuple[Rgb, Rgb, int]:
    depth = rng.random()
    skin = _hsv(rng.uniform(0.05, 0.085), 0.28 + 0.32 * depth, 0.99 - 0.5 * depth)
    hair = _hsv(rng.uniform(0.04, 0.12), rng.uniform(0.3, 0.75), rng.uniform(0.1, 0.75) * (1 - 0.5 * depth))
    return skin, hair, int(rng.choice(len(HAIR_STYLES), p=(0.4, 0.35, 0.1, 0.15)))


def _fantastic(rng: np.random.Generator) -> tuple[Rgb, Rgb, int]:
    skin = _hsv(rng.uniform(0.25, 0.8), rng.uniform(0.25, 0.45), rng.uniform(0.6, 0.95))
    hair = _hsv(rng.random(), rng.uniform(0.6, 0.9), rng.uniform(0.4, 0.8))
    return skin, hair, int(rng.choice(len(HAIR_STYLES), p=(0.2, 0.2, 0.5, 0.1)))


def _hsv(hue: float, saturation: float, value: float) -> Rgb:
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)
