"""Tunnels: their surfaces, their light, and the camera's exposure in them."""

from __future__ import annotations

import math

import numpy as np

from .renderer import Shaded
from .rng import Draw, noise
from .scene import BUILDING, Scene
from .style import Color, Vector, scale
from .textures import rgb

_HEIGHT = 5.6  # metres to the ceiling
_PORTAL = (34.0, 11.0)  # metres, half the width and the height of the wall around an entrance
_PIECE = 10.0  # metres; a tunnel in a bend is made of straight pieces
_DARKEST = 0.16  # share of the daylight deep inside
_DAYLIGHT_REACHES = 7.0  # metres
EXPOSURE_LAG = 0.8  # seconds until the camera reacts to the light


def add_tunnel(scene: Scene, start: float, end: float) -> None:
    """Adds a tunnel between two distances along the street, with a portal at its start."""
    style = scene.style
    half = style.half_road + style.sidewalk_width - 0.25  # keeps facades behind the walls
    d = Draw(style.seed, 40, round(start))
    grey, salt = d.uniform(0.42, 0.62), d.integer(1 << 30)
    concrete = rgb((grey, grey * 0.98, grey * 0.93))
    lamp = rgb(d.choice(((4.0, 3.2, 1.9), (3.8, 3.9, 4.0))))
    if style.tunnel_lamps is not None:
        lamp = rgb(scale(style.tunnel_lamps, 3.0))

    def wall(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        tone = 0.8 + 0.4 * noise(x, y, 6.0, salt)
        tone = tone * np.where(y < 1.1, np.float32(0.7), np.float32(1.0))
        return concrete * tone[:, None], None

    def ceiling(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        color = concrete * (0.7 + 0.4 * noise(x, y, 6.0, salt))[:, None]
        bright = (np.abs(y - 0.5 * _PIECE) < 0.9) & (np.abs(x - half) < 0.35)
        color[bright] = lamp
        return color, None

    def portal(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        color, _ = wall(x, y + 2.0, depth)
        return color, (np.abs(x - _PORTAL[0]) > half) | (y > _HEIGHT)

    x = style.center(start) - _PORTAL[0]
    across: Vector = (2.0 * _PORTAL[0], 0.0, 0.0)
    top: Vector = (0.0, _PORTAL[1], 0.0)
    scene.add((x, 0.0, start), across, top, portal, BUILDING, 0, (0.0, 0.0, -1.0))
    pieces = math.ceil((end - start) / _PIECE)
    for piece in range(pieces):
        z0 = start + piece * _PIECE
        z1 = min(z0 + _PIECE, end)
        x0, x1 = style.center(z0), style.center(z1)
        run: Vector = (x1 - x0, 0.0, z1 - z0)
        for sign in (-1.0, 1.0):
            inward = (-sign, 0.0, 0.0)
            scene.add((x0 + sign * half, 0.0, z0), run, (0.0, _HEIGHT, 0.0), wall, BUILDING, 0,
                      inward)  # fmt: skip
        across = (2.0 * half, 0.0, 0.0)
        scene.add((x0 - half, _HEIGHT, z0), across, run, ceiling, BUILDING, 0, (0.0, -1.0, 0.0))


def daylight(tunnels: list[tuple[float, float]], z: np.ndarray) -> np.ndarray:
    """Returns the share of daylight at places z along the street, float32 in (0, 1]."""
    left = np.ones_like(z)
    for start, end in tunnels:
        inside = np.minimum(z - start, end - z)
        dark = _DARKEST + (1.0 - _DARKEST) * np.exp(-np.maximum(inside, 0.0) / _DAYLIGHT_REACHES)
        left = np.where(inside > 0, dark, left)
    return left


def lamplight(tunnels: list[tuple[float, float]], z: np.ndarray, lamps: Color) -> np.ndarray:
    """Returns the share of light per channel under coloured lamps, (N, 3) float32."""
    deep = ((1.0 - daylight(tunnels, z)) * (1.0 / (1.0 - _DARKEST)))[:, None]
    return 1.0 + deep * (rgb(scale(lamps, 1.6 * _DARKEST)) - np.float32(1.0))


def exposure(tunnels: list[tuple[float, float]], z: float) -> float:
    """Returns the gain of automatic exposure for the light at z, where the camera just was."""
    return float(daylight(tunnels, np.array([z]))[0]) ** -0.75
