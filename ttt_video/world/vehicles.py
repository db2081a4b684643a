"""Cars as patches in space: two side views with strips between them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .renderer import Shaded, Shader
from .rng import Draw
from .scene import CAR, Scene
from .style import Color, Vector, scale
from .textures import plain, rgb

_CAR_COLORS: tuple[Color, ...] = (
    (0.85, 0.85, 0.86), (0.62, 0.63, 0.65), (0.12, 0.12, 0.13), (0.30, 0.31, 0.33),
    (0.62, 0.08, 0.09), (0.10, 0.18, 0.42), (0.14, 0.34, 0.58), (0.10, 0.30, 0.20),
    (0.78, 0.62, 0.20), (0.42, 0.30, 0.22), (0.80, 0.42, 0.12), (0.66, 0.74, 0.78),
)  # fmt: skip
# Side views: (part of the length, part of the height) from the rear bumper over the roof.
_PROFILES: dict[str, tuple[tuple[float, float], ...]] = {
    "sedan": (
        (0.0, 0.20), (0.01, 0.60), (0.17, 0.64), (0.29, 0.98), (0.58, 1.0), (0.74, 0.64),
        (0.97, 0.54), (1.0, 0.20),
    ),
    "hatchback": (
        (0.0, 0.20), (0.02, 0.60), (0.06, 0.66), (0.15, 0.97), (0.58, 1.0), (0.76, 0.62),
        (0.97, 0.52), (1.0, 0.20),
    ),
    "suv": (
        (0.0, 0.22), (0.01, 0.58), (0.03, 0.62), (0.09, 0.97), (0.60, 1.0), (0.74, 0.62),
        (0.98, 0.56), (1.0, 0.22),
    ),
    "van": (
        (0.0, 0.16), (0.005, 0.50), (0.01, 0.52), (0.03, 0.98), (0.74, 1.0), (0.88, 0.56),
        (0.98, 0.48), (1.0, 0.16),
    ),
}  # fmt: skip
_CAR_SIZES = {  # length, width, height
    "sedan": (4.5, 1.8, 1.45), "hatchback": (4.0, 1.75, 1.5),
    "suv": (4.6, 1.9, 1.75), "van": (5.1, 1.95, 2.1),
}  # fmt: skip


def add_car(
    scene: Scene, d: Draw, x: float, z: float, heading: tuple[float, float], instance: int
) -> None:
    """Adds a car with its middle at (x, z) that points along ``heading`` (x, z)."""
    if not scene.sees(x, z, 2.6, 1.6):
        return
    kind = d.choice(("sedan", "sedan", "hatchback", "hatchback", "suv", "van"))
    length, width, height = (s * d.uniform(0.93, 1.07) for s in _CAR_SIZES[kind])
    paint = rgb(d.jitter(d.choice(_CAR_COLORS), 0.12))
    profile = [(a * length, h * height) for a, h in _PROFILES[kind]]
    fx, fz = heading
    rx, rz = fz, -fx  # to the right of the driver

    def place(along: float, up: float, right: float) -> Vector:
        return (x + fx * along + rx * right, up, z + fz * along + rz * right)

    rear = -0.5 * length
    across = (rx * width, 0.0, rz * width)
    glass = rgb(scale(scene.style.zenith, 0.30, 0.10))
    side = _car_side(profile, length, height, paint, glass, kind == "van")
    for sign in (-1.0, 1.0):
        scene.add(
            place(rear, 0.0, sign * 0.5 * width), (fx * length, 0.0, fz * length),
            (0.0, height, 0.0), side, CAR, instance, (sign * rx, 0.0, sign * rz),
        )  # fmt: skip
    parts = ("rear", "body", "window", "body", "window", "body", "front")
    if kind == "van":
        parts = ("rear", "body", "rear_door", "body", "window", "body", "front")
    for (a0, h0), (a1, h1), part in zip(profile[:-1], profile[1:], parts, strict=True):
        da, dh = a1 - a0, h1 - h0
        norm = math.hypot(da, dh)
        normal = (-dh / norm * fx, da / norm, -dh / norm * fz)
        scene.add(
            place(rear + a0, h0, -0.5 * width), across, (fx * da, dh, fz * da),
            _car_strip(part, width, norm, paint, glass), CAR, instance, normal,
        )  # fmt: skip
    # Tyres are seen from the front or from behind.
    for end in (0.19, 0.80) if scene.distance(x, z) < 35.0 else ():
        for right in (-0.42, 0.42):
            scene.billboard(
                *place(rear + end * length, 0.0, right * width), 0.22, 0.34,
                plain((0.06, 0.06, 0.065)), CAR, instance,
            )  # fmt: skip
    scene.contact(x, z, (across[0] * 1.25, 0.0, across[2] * 1.25),
                  (fx * length * 1.12, 0.0, fz * length * 1.12), 0.45)  # fmt: skip
    scene.shadow(x, z, (fx * length, 0.0, fz * length), 0.75 * height)
    scene.shadow(x, z, across, 0.75 * height)


def _car_side(
    profile: Sequence[tuple[float, float]],
    length: float,
    height: float,
    paint: np.ndarray,
    glass: np.ndarray,
    panel_van: bool,
) -> Shader:
    stations = np.array([a for a, _ in profile])
    heights = np.array([h for _, h in profile])
    belt = 0.61 * height
    wheel = 0.215 * height

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        top = np.interp(x, stations, heights).astype(np.float32)
        keep = (y < top) & (y > 0.16 * height)
        tone = 0.72 + 0.33 * y / height
        color = paint * tone[:, None]
        window = (y > belt) & (y < top - 0.07) & (y < 0.93 * height)
        part = x / length
        if panel_van:
            window &= part > 0.62
        else:
            window &= (np.abs(part - 0.47) > 0.012) & (part > 0.14)
        color[window] = glass
        color[np.abs(y - 0.24 * height) < 0.05] *= 0.6
        for end in (0.19, 0.80):
            radius = (x - end * length) * (x - end * length) + (y - wheel) * (y - wheel)
            arch = radius < (1.2 * wheel) * (1.2 * wheel)
            color[arch & (y < 0.5 * height)] *= 0.35
            tyre = radius < wheel * wheel
            keep |= tyre
            color[tyre] = np.float32(0.07)
            color[radius < 0.3 * wheel * wheel] = np.float32(0.52)
        return color, keep

    return shade


def _car_strip(
    part: str, width: float, length: float, paint: np.ndarray, glass: np.ndarray
) -> Shader:
    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        across = np.abs(2.0 * x / width - 1.0)
        up = y / length
        color = np.empty((x.size, 3), dtype=np.float32)
        color[:] = paint
        if part in ("window", "rear_door"):
            pane = (across < 0.86) & (up > 0.10) & (up < 0.92)
            if part == "rear_door":
                pane &= (up > 0.4) & (across > 0.06)
            color[pane] = glass * (0.8 + 0.5 * up[pane])[:, None]
        elif part == "rear":
            color[up < 0.32] *= 0.5
            color[(across > 0.66) & (up > 0.55) & (up < 0.92)] = (0.62, 0.05, 0.05)
            color[(across < 0.28) & (up > 0.42) & (up < 0.66)] = (0.86, 0.86, 0.80)
        elif part == "front":
            color[up > 0.66] *= 0.45  # below the bumper; this strip runs downwards
            color[(across > 0.60) & (up > 0.06) & (up < 0.34)] = (0.93, 0.93, 0.88)
            color[(across < 0.52) & (up > 0.10) & (up < 0.42)] = (0.09, 0.09, 0.10)
            color[(across < 0.26) & (up > 0.50) & (up < 0.66)] = (0.86, 0.86, 0.80)
        return color, None

    return shade
