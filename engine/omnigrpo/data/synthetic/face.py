"""Draws faces: a batch of them from arrays, whether the frames of one clip or many different people.

Everything is given in head units: the head's centre is (0, 0) and its top and bottom are at v = -1 and 1.
"""

from dataclasses import dataclass

import numpy as np

from omnigrpo.data.synthetic.canvas import Canvas, Frame, Layer, ellipse, over_box
from omnigrpo.data.synthetic.identity import BACKGROUNDS, HAIR_STYLES, FaceIdentity, Scene

_WHITE = np.asarray([[0.97, 0.97, 0.95]], dtype=np.float32)
_DARK = np.asarray([[0.1, 0.07, 0.07]], dtype=np.float32)
_MOUTH = np.asarray([[0.32, 0.07, 0.09]], dtype=np.float32)
_TONGUE = np.asarray([[0.75, 0.35, 0.36]], dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class FaceStates:
    """What to draw in each of F pictures."""

    identities: tuple[FaceIdentity, ...]
    """One, or one per picture."""
    scenes: tuple[Scene, ...]
    """One, or one per picture."""
    expressions_FE: np.ndarray
    """float32, the fields of `Expression` in their order."""
    poses_FP: np.ndarray
    """float32, the fields of `Pose` in their order."""


def draw_faces(states: FaceStates, *, size: int, grain_rng: np.random.Generator) -> np.ndarray:
    """Draws the pictures: uint8 ``[F, size, size, 3]``; ``grain_rng`` only makes the sensor noise.

    With one identity and one scene, the body stays where the first pose puts it and only the head moves.
    """
    person = _Person(states.identities)
    still = slice(0, max(len(states.identities), len(states.scenes)))
    body = Canvas(
        np.concatenate([_background(scene, size) for scene in states.scenes], axis=1),
        _head_frame(states.poses_FP[still], size),
    )
    _paint_body(body, person)
    canvas = Canvas(body.planes(), _head_frame(states.poses_FP, size))
    _paint_head(canvas, person)
    yaw, nod = states.poses_FP[:, 4], states.poses_FP[:, 5]
    shift_u, shift_v = 0.2 * yaw, 0.12 * nod
    _paint_nose(canvas, person, 1.5 * shift_u, shift_v)
    _paint_eyes(canvas, person, states.expressions_FE, shift_u, shift_v)
    _paint_brows(canvas, person, states.expressions_FE, shift_u, shift_v)
    _paint_mouth(canvas, person, states.expressions_FE, shift_u, shift_v)
    _paint_balloon(canvas, states.scenes)
    return _expose(canvas.planes(), states.scenes, grain_rng)


def _head_frame(poses_FP: np.ndarray, size: int) -> Frame:
    x_F, y_F, unit_F, roll_F = (poses_FP[:, i].astype(np.float32) for i in range(4))
    return Frame(x_F=x_F * size, y_F=y_F * size, unit_F=unit_F * size, roll_F=roll_F)


class _Person:
    """Identities as arrays over pictures."""

    def __init__(self, identities: tuple[FaceIdentity, ...]) -> None:
        def numbers(name: str) -> np.ndarray:
            return np.asarray([getattr(item, name) for item in identities], dtype=np.float32)

        self.half_width = numbers("aspect")
        self.jaw, self.nose, self.mouth_drop = numbers("jaw"), numbers("nose"), numbers("mouth_drop")
        self.spacing, self.eye_size = numbers("eye_spacing"), numbers("eye_size")
        self.brow_thickness, self.glasses = numbers("brow_thickness"), numbers("glasses")
        self.skin, self.hair, self.iris = numbers("skin"), numbers("hair"), numbers("iris")
        self.lip, self.shirt = numbers("lip"), numbers("shirt")
        style = np.asarray([item.hair_style for item in identities])
        self.has = {name: (style == index).astype(np.float32) for index, name in enumerate(HAIR_STYLES)}


def _paint_body(canvas: Canvas, person: _Person) -> None:
    def shape(u: np.ndarray, v: np.ndarray) -> list[Layer]:
        half = over_box(person.half_width)
        behind = canvas.coverage(ellipse(u, v + 0.55, half * 1.16, np.float32(1.25)))
        neck = canvas.coverage(np.maximum(np.abs(u) - 0.3, np.abs(v - 0.3) - 0.6))
        shoulders = canvas.coverage(ellipse(u, v - 1.35, np.float32(1.35), np.float32(0.75)))
        return [
            (behind * over_box(person.has["long"]), person.hair * 0.85),
            (neck, person.skin * 0.82),
            (shoulders, person.shirt),
        ]

    zero = np.zeros(1, dtype=np.float32)
    canvas.paint(zero, zero + 0.8, zero + 1.4, zero + 1.5, shape)


def _paint_head(canvas: Canvas, person: _Person) -> None:
    half_F, zero = person.half_width, np.zeros(1, dtype=np.float32)

    def puff(u: np.ndarray, v: np.ndarray) -> list[Layer]:
        radius = np.float32(0.36)
        return [(canvas.coverage(ellipse(u, v, radius, radius)) * over_box(person.has["puffs"]), person.hair)]

    def ear(u: np.ndarray, v: np.ndarray) -> list[Layer]:
        return [(canvas.coverage(ellipse(u, v, np.float32(0.11), np.float32(0.2))), person.skin * 0.9)]

    def skull(u: np.ndarray, v: np.ndarray) -> list[Layer]:
        half, hairy = over_box(half_F), over_box(1 - person.has["bald"])
        v = v - 0.04
        head = ellipse(u / (1 - over_box(person.jaw) * np.clip(v, 0, 1)), v, half, np.float32(1.0))
        cap = canvas.coverage(ellipse(u, v + 0.06, half * 1.08, np.float32(1.06)))
        bare = 0.5 * (u / half) ** 2 - 0.52 - v - 9 * (1 - hairy)
        return [
            (cap * hairy * (v < 0.15), person.hair),
            (canvas.coverage(np.maximum(head, bare)), person.skin),
        ]

    for side in (-1.0, 1.0):
        if np.any(person.has["puffs"]):
            canvas.paint(side * 0.85 * half_F, zero - 0.85, zero + 0.38, zero + 0.38, puff)
        canvas.paint(side * half_F, zero + 0.03, zero + 0.13, zero + 0.22, ear)
    canvas.paint(zero, zero - 0.04, half_F * 1.08, zero + 1.08, skull)


def _paint_nose(canvas: Canvas, person: _Person, u_F: np.ndarray, v_F: np.ndarray) -> None:
    def shape(u: np.ndarray, v: np.ndarray) -> list[Layer]:
        size = over_box(person.nose)
        tip = ellipse(u, v, 0.1 * size, 0.055 * size)
        bridge = np.maximum(np.abs(u + 0.05 * size) - 0.018, np.abs(v + 0.17) - 0.16)
        return [
            (canvas.coverage(bridge) * 0.5, person.skin * 0.8),
            (canvas.coverage(tip) * 0.8, person.skin * 0.78),
        ]

    zero = np.zeros(1, dtype=np.float32)
    canvas.paint(u_F, v_F + 0.24, zero + 0.15, zero + 0.35, shape)


def _paint_eyes(
    canvas: Canvas, person: _Person, expressions_FE: np.ndarray, shift_u: np.ndarray, shift_v: np.ndarray
) -> None:
    half_u = 0.165 * person.eye_size
    half_v = half_u * (0.1 + 1.05 * expressions_FE[:, 5])
    tilt = expressions_FE[:, 4]

    def eye(side: float) -> None:
        def shape(u: np.ndarray, v: np.ndarray) -> list[Layer]:
            wide, high = over_box(half_u), over_box(half_v)
            # Brows drawn down also lower the inner end of the upper lid.
            slope = over_box(tilt) * 0.75 * high * (side * u / wide - 0.3)
            lid = np.where(over_box(tilt) < 0, slope - 0.72 * high - v, np.float32(-1))
            opening = np.maximum(ellipse(u, v, wide, high), lid)
            white = canvas.coverage(opening)
            iris = canvas.coverage(ellipse(u, v, 0.62 * wide, 0.62 * wide))
            pupil = canvas.coverage(ellipse(u, v, 0.3 * wide, 0.3 * wide))
            glint = canvas.coverage(ellipse(u + 0.2 * wide, v + 0.2 * wide, 0.16 * wide, 0.16 * wide))
            rim = canvas.coverage(np.abs(opening) - 0.022) * (v < 0.4 * high)
            frame = canvas.coverage(np.abs(ellipse(u, v, np.float32(0.27), np.float32(0.25))) - 0.02)
            return [
                (white, _WHITE),
                (white * iris, person.iris),
                (white * pupil, _DARK),
                (white * glint, _WHITE),
                (rim, _DARK),
                (frame * over_box(person.glasses), _DARK),
            ]

        zero = np.zeros(1, dtype=np.float32)
        canvas.paint(shift_u + side * person.spacing, shift_v - 0.08, zero + 0.31, zero + 0.29, shape)

    eye(-1.0)
    eye(1.0)


def _paint_brows(
    canvas: Canvas, person: _Person, expressions_FE: np.ndarray, shift_u: np.ndarray, shift_v: np.ndarray
) -> None:
    lift, tilt = expressions_FE[:, 3], expressions_FE[:, 4]

    def brow(side: float) -> None:
        def shape(u: np.ndarray, v: np.ndarray) -> list[Layer]:
            along = side * u / 0.21
            line = over_box(tilt) * 0.1 * along + 0.045 * along**2
            thick = over_box(person.brow_thickness) * (1.1 - 0.35 * along)
            return [
                (
                    canvas.coverage(np.maximum(np.abs(v - line) - thick, (np.abs(along) - 1) * 0.21)),
                    person.hair * 0.55,
                )
            ]

        zero = np.zeros(1, dtype=np.float32)
        height = shift_v - 0.4 - 0.13 * lift
        inward = side * (person.spacing + 0.03 * np.minimum(tilt, 0))
        canvas.paint(shift_u + inward, height, zero + 0.24, zero + 0.28, shape)

    brow(-1.0)
    brow(1.0)


def _paint_mouth(
    canvas: Canvas, person: _Person, expressions_FE: np.ndarray, shift_u: np.ndarray, shift_v: np.ndarray
) -> None:
    curve, opened, broad = (over_box(expressions_FE[:, i]) for i in range(3))
    half_u = 0.17 + 0.2 * broad

    def shape(u: np.ndarray, v: np.ndarray) -> list[Layer]:
        along = u / half_u
        arch = np.sqrt(np.clip(1 - along**2, 0, 1))
        middle = v - curve * 0.2 * (0.55 - along**2)
        gap = 0.25 * opened * arch
        ends = (np.abs(along) - 1) * half_u
        inside = canvas.coverage(np.maximum(np.abs(middle) - gap - 0.012, ends))
        lips = canvas.coverage(np.maximum(np.abs(middle) - gap - 0.03 - 0.035 * arch, ends - 0.02))
        line = canvas.coverage(np.maximum(np.abs(middle) - 0.02, ends)) * (opened < 0.1)
        teeth = canvas.coverage(np.maximum(middle + 0.45 * gap, 0.04 - gap))
        tongue = canvas.coverage(np.maximum(0.45 * gap - middle, 0.06 - gap))
        return [
            (lips, person.lip),
            (inside, _MOUTH),
            (inside * teeth, _WHITE),
            (inside * tongue, _TONGUE),
            (line, _MOUTH),
        ]

    zero = np.zeros(1, dtype=np.float32)
    canvas.paint(shift_u, shift_v + 0.58 + person.mouth_drop, zero + 0.42, zero + 0.36, shape)


def _paint_balloon(canvas: Canvas, scenes: tuple[Scene, ...]) -> None:
    u, v, radius = (
        np.asarray([getattr(scene.balloon, name) for scene in scenes], np.float32)
        for name in ("u", "v", "radius")
    )
    if not np.any(radius):
        return
    colour = np.asarray([scene.balloon.colour for scene in scenes], np.float32)

    def shape(du: np.ndarray, dv: np.ndarray) -> list[Layer]:
        shown, size = over_box(radius > 0), over_box(np.maximum(radius, 0.01))
        disc = canvas.coverage(ellipse(du, dv, size, size)) * shown
        glint = canvas.coverage(ellipse(du + 0.35 * size, dv + 0.4 * size, 0.2 * size, 0.15 * size)) * shown
        return [(disc, colour), (0.7 * glint, _WHITE)]

    canvas.paint(u, v, radius, radius, shape)


def _background(scene: Scene, size: int) -> np.ndarray:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = axis[None, :], axis[:, None]
    along = x * np.cos(scene.angle) + y * np.sin(scene.angle)
    across = y * np.cos(scene.angle) - x * np.sin(scene.angle)
    turn = 2 * np.pi * scene.phase
    name = BACKGROUNDS[scene.background]
    if name == "gradient":
        mix = along + 0.5
    elif name == "stripes":
        mix = 0.5 + 2 * np.sin(2 * np.pi * scene.frequency * along + turn)
    elif name == "blobs":
        wave = 2 * np.pi * 0.6 * scene.frequency
        mix = 0.5 + np.sin(wave * along + turn) * np.cos(wave * across - 2 * turn)
    elif name == "checks":
        wave = 2 * np.pi * scene.frequency
        mix = 0.5 + 8 * np.sin(wave * along + turn) * np.sin(wave * across + turn)
    else:
        radius = np.hypot(x - 0.3 * np.cos(turn), y - 0.3 * np.sin(turn))
        mix = 0.5 + 3 * np.sin(2 * np.pi * 1.6 * scene.frequency * radius)
    mix = np.clip(mix, 0, 1).astype(np.float32)
    colour_a, colour_b = (
        np.asarray(c, np.float32)[:, None, None, None] for c in (scene.colour_a, scene.colour_b)
    )
    return colour_a * (1 - mix) + colour_b * mix


def _expose(planes_3FHW: np.ndarray, scenes: tuple[Scene, ...], rng: np.random.Generator) -> np.ndarray:
    size = planes_3FHW.shape[-1]
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    angle, strength, exposure, grain = (
        np.asarray([getattr(scene, name) for scene in scenes], np.float32)[:, None, None]
        for name in ("light_angle", "light_strength", "exposure", "grain")
    )
    slope = axis[None, None, :] * np.cos(angle) + axis[None, :, None] * np.sin(angle)
    light_FHW = 255 * exposure * (1 + 2 * strength * slope)
    shape = (planes_3FHW.shape[1], size, size)
    noise_FHW = rng.integers(-127, 128, shape, dtype=np.int8) * (grain / 127) + np.float32(0.5)
    pixels = np.empty((*shape, 3), dtype=np.uint8)
    for channel, plane_FHW in enumerate(planes_3FHW):
        level = plane_FHW * light_FHW
        level += noise_FHW
        pixels[..., channel] = np.clip(level, 0, 255, out=level)
    return pixels
