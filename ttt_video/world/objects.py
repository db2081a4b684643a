"""Adds the things of the street to a ``Scene``: persons, plants, poles, signs, buildings.

Each thing has its own ``Draw``, so that it looks the same in every frame.
"""

from __future__ import annotations

import math

import numpy as np

from .renderer import Shaded
from .rng import Draw, wave
from .scene import BUILDING, PERSON, POLE, SIGN, VEGETATION, Scene
from .style import Color, Vector, scale
from .textures import (
    make_bark,
    make_crown,
    make_leaves,
    make_roof,
    make_sign,
    make_wall,
    plain,
    rgb,
)

_CLOTH_COLORS: tuple[Color, ...] = (
    (0.15, 0.17, 0.25), (0.10, 0.10, 0.11), (0.75, 0.74, 0.72), (0.60, 0.12, 0.14),
    (0.18, 0.32, 0.60), (0.20, 0.42, 0.28), (0.82, 0.66, 0.20), (0.48, 0.36, 0.26),
    (0.62, 0.35, 0.55), (0.40, 0.42, 0.45), (0.88, 0.48, 0.20), (0.35, 0.55, 0.62),
)  # fmt: skip
_SKINS: tuple[Color, ...] = (
    (0.87, 0.68, 0.56), (0.76, 0.55, 0.42), (0.55, 0.37, 0.27), (0.36, 0.24, 0.18),
)  # fmt: skip


def add_person(
    scene: Scene, d: Draw, x: float, z: float, time: float, walking: bool, instance: int
) -> None:
    """Adds a person who stands or walks at (x, z)."""
    if not scene.sees(x, z, 0.6, 1.8):
        return
    height = d.uniform(1.50, 1.92) if d.chance(0.88) else d.uniform(1.05, 1.35)
    shirt, trousers = (rgb(d.jitter(d.choice(_CLOTH_COLORS), 0.15)) for _ in range(2))
    skin = rgb(d.choice(_SKINS))
    hair = rgb(d.choice(((0.10, 0.08, 0.07), (0.30, 0.20, 0.12), (0.62, 0.50, 0.32), (0.6,) * 3)))
    build = d.uniform(0.85, 1.2)
    skirt, bag = d.chance(0.2), d.chance(0.3)
    swing = wave(time * d.uniform(0.85, 1.1) + d.random()) if walking else 0.12
    width = 1.0 * height / 1.75

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        # in units of a 1.75 m person
        px, py = (x - 0.5 * width) * (1.75 / height), y * (1.75 / height)
        leg = 0.075 * build
        legs = _capsule(px, py, 0.04, 0.86, 0.05 + 0.24 * swing, 0.06, leg)
        legs |= _capsule(px, py, -0.04, 0.86, -0.05 - 0.24 * swing, 0.06, leg)
        if skirt:
            legs |= (py > 0.42) & (py < 0.9) & (np.abs(px) < (0.17 + 0.22 * (0.9 - py)) * build)
        torso = (np.abs(px) < (0.155 + 0.07 * (py - 0.85)) * build) & (py > 0.82) & (py < 1.42)
        torso |= _capsule(px, py, -0.11 * build, 1.38, 0.11 * build, 1.38, 0.075)
        arms = _capsule(px, py, 0.19 * build, 1.36, 0.24 - 0.20 * swing, 0.86, 0.052)
        arms |= _capsule(px, py, -0.19 * build, 1.36, -0.24 + 0.20 * swing, 0.86, 0.052)
        head = px * px + 0.72 * (py - 1.58) * (py - 1.58) < 0.0125
        neck = (np.abs(px) < 0.05) & (py > 1.40) & (py < 1.52)
        color = np.empty((x.size, 3), dtype=np.float32)
        color[:] = trousers
        body = torso | arms
        color[body] = shirt
        color[arms & ~torso] = shirt * 0.85
        color[arms & (py < 0.93)] = skin
        color[head | neck] = skin
        color[head & (py > 1.60 + 0.25 * np.abs(px))] = hair
        color[py < 0.08] = (0.08, 0.07, 0.07)
        keep = legs | body | head | neck
        if bag:
            pack = (np.abs(px - 0.20) < 0.10) & (np.abs(py - 1.0) < 0.16)
            color[pack & ~arms] = trousers * 0.6
            keep |= pack
        return color, keep

    scene.billboard(x, 0.0, z, width, height, shade, PERSON, instance)
    scene.contact(x, z, (0.7, 0.0, 0.0), (0.0, 0.0, 0.7), 0.6)
    scene.shadow(x, z, (0.4, 0.0, 0.15), height, ragged=True)


def _capsule(
    px: np.ndarray, py: np.ndarray, x0: float, y0: float, x1: float, y1: float, radius: float
) -> np.ndarray:
    """Returns which points are within ``radius`` of the segment (x0, y0)-(x1, y1)."""
    dx, dy = x1 - x0, y1 - y0
    part = ((px - x0) * dx + (py - y0) * dy) * (1.0 / (dx * dx + dy * dy))
    part = np.minimum(np.maximum(part, 0.0), 1.0)
    ex, ey = px - x0 - part * dx, py - y0 - part * dy
    return ex * ex + ey * ey < radius * radius


def add_tree(scene: Scene, d: Draw, x: float, z: float) -> None:
    """Adds a tree: a trunk and a crown of a few overlapping parts."""
    if not scene.sees(x, z, 5.0, 6.0):
        return
    style = scene.local(z)
    color = d.jitter(d.choice(style.leaves), 0.2)
    bark = make_bark(d.jitter((0.33, 0.26, 0.20), 0.3), 0.34)
    if d.chance(style.conifers):
        height, width = d.uniform(5.0, 11.0), d.uniform(1.8, 3.2)
        scene.billboard(x, 0.0, z, 0.34, 1.2, bark, VEGETATION)
        crown = make_crown(color, d.integer(1 << 30), width, height, conifer=True)
        scene.billboard(x, 0.6, z, width, height, crown, VEGETATION)
        scene.shadow(x, z, (width * 0.8, 0.0, 0.0), height, ragged=True)
        return
    trunk = d.uniform(1.9, 3.2)
    size = d.uniform(2.6, 5.5)
    scene.billboard(x, 0.0, z, 0.34, trunk + 0.9, bark, VEGETATION)
    for _ in range(3):
        width, height = size * d.uniform(0.75, 1.1), size * d.uniform(0.65, 0.95)
        crown = make_crown(color, d.integer(1 << 30), width, height, conifer=False)
        dx, dy, dz = (d.uniform(-0.22, 0.22) * size for _ in range(3))
        scene.billboard(x + dx, trunk + 0.2 * size + dy - 0.2 * height, z + dz, width, height,
                        crown, VEGETATION)  # fmt: skip
    scene.shadow(x, z, (0.34, 0.0, 0.1), trunk + 0.3)
    scene.shadow(x, z, (size, 0.0, 0.0), trunk + 0.9 * size, ragged=True)


def add_bush(scene: Scene, d: Draw, x: float, z: float) -> None:
    """Adds a bush, about a metre high."""
    if not scene.sees(x, z, 1.2):
        return
    width, height = d.uniform(0.9, 2.2), d.uniform(0.7, 1.5)
    color = d.jitter(d.choice(scene.local(z).leaves), 0.25)
    crown = make_crown(color, d.integer(1 << 30), width, height, conifer=False)
    scene.billboard(x, -0.12 * height, z, width, height, crown, VEGETATION)
    scene.contact(x, z, (width, 0, 0), (0, 0, width), 0.65)


def add_hedge(scene: Scene, d: Draw, start: Vector, run: Vector, normal: Vector) -> None:
    """Adds a clipped hedge that starts at ``start`` and runs along ``run``."""
    height = d.uniform(0.8, 1.6)
    color = d.jitter(d.choice(scene.local(start[2]).leaves), 0.2)
    leaves = make_leaves(color, d.integer(1 << 30))

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        return leaves(x, y / height, depth)

    scene.add(start, run, (0.0, height, 0.0), shade, VEGETATION, 0, normal)


def add_pole(scene: Scene, d: Draw, x: float, z: float, side: float) -> None:
    """Adds a street lamp at the kerb with an arm over the road; ``side``: +1 right, -1 left."""
    if not scene.sees(x, z, 2.5, 7.0):
        return
    style = scene.local(z)
    height, width = d.uniform(4.5, 7.5), d.uniform(0.16, 0.24)
    scene.billboard(x, 0.0, z, width, height, make_bark(style.lamp_color, width), POLE)
    if d.chance(0.75):
        arm = d.uniform(0.8, 1.8)
        dark = plain(scale(style.lamp_color, 0.9))
        scene.add((x, height - 0.14, z), (-side * arm, 0, 0), (0, 0.14, 0), dark, POLE)
        scene.add((x - side * (arm + 0.5), height - 0.2, z), (side * 0.6, 0, 0), (0, 0.2, 0),
                  plain((0.8, 0.8, 0.75)), POLE)  # fmt: skip
    else:
        scene.billboard(x, height - 0.1, z, 0.5, 0.5, make_bark((0.9, 0.9, 0.85), 0.5), POLE)
    scene.shadow(x, z, (width, 0.0, 0.0), height)


def add_sign(scene: Scene, d: Draw, x: float, z: float) -> None:
    """Adds a post with a traffic sign, or two above each other."""
    if not scene.sees(x, z, 0.6, 2.5):
        return
    bottom = d.uniform(1.9, 2.6)
    size = d.uniform(0.65, 1.05)
    boards = 2 if d.chance(0.3) else 1
    top = bottom
    for _ in range(boards):
        shade, height = make_sign(d, size)
        # a hand's breadth in front of the post
        scene.add((x - 0.5 * size, top, z - 0.1), (size, 0, 0), (0, height, 0), shade, SIGN)
        top += height + 0.05
    post = make_bark((0.58, 0.59, 0.60), 0.11)
    scene.billboard(x, 0.0, z, 0.11, top, post, POLE)
    scene.shadow(x, z, (0.1, 0.0, 0.0), top)


def add_building(
    scene: Scene, d: Draw, corner: Vector, run: Vector, outward: Vector, height: float
) -> None:
    """Adds a box with a facade along ``run``; ``outward`` is the unit normal to the street."""
    length = math.hypot(run[0], run[2])
    along = (run[0] / length, 0.0, run[2] / length)
    style = scene.local(corner[2] + 0.5 * run[2])
    back = d.uniform(8.0, 12.0)
    inward = (-outward[0] * back, 0.0, -outward[2] * back)
    pitched = d.uniform(1.8, 3.2) if d.chance(style.pitched_roofs) else 0.0
    key = d.integer(1 << 30)
    front = make_wall(Draw(key), style, height)
    gable = make_wall(Draw(key), style, height, pitched, back)
    up = (0.0, height, 0.0)
    scene.add(corner, run, up, front, BUILDING, 0, outward)
    far = (corner[0] + run[0], 0.0, corner[2] + run[2])
    gable_up = (0.0, height + pitched, 0.0)
    scene.add(corner, inward, gable_up, gable, BUILDING, 0, (-along[0], 0.0, -along[2]))
    scene.add(far, inward, gable_up, gable, BUILDING, 0, along)
    if pitched:
        slope = (0.5 * inward[0], pitched, 0.5 * inward[2])
        norm = math.hypot(0.5 * back, pitched)
        normal = (outward[0] * pitched / norm, 0.5 * back / norm, outward[2] * pitched / norm)
        eaves = (corner[0], height, corner[2])
        scene.add(eaves, run, slope, make_roof(d, style), BUILDING, 0, normal)
    middle = (corner[0] + 0.5 * run[0], corner[2] + 0.5 * run[2])
    scene.shadow(middle[0], middle[1], run, height + 0.5 * pitched)
    scene.shadow(middle[0] + inward[0], middle[1] + inward[2], run, height + 0.5 * pitched)
