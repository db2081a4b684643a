"""Collects the surfaces and shadows of one frame."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .renderer import Camera, Patch, Shader
from .style import Style, Vector, dot
from .textures import make_blob, plain

# Cityscapes train ids of the world's classes.
ROAD, SIDEWALK, BUILDING, POLE, SIGN = 0, 1, 2, 5, 7
VEGETATION, SKY, PERSON, CAR = 8, 10, 11, 13


@dataclass
class Scene:
    """The surfaces of one frame, and the shadows on the ground."""

    style: Style
    camera: Camera
    half_view: float  # tangent of half the horizontal angle of view
    patches: list[Patch] = field(default_factory=list)
    shadows: list[Patch] = field(default_factory=list)
    _places: dict[int, Style] = field(default_factory=dict)

    def __post_init__(self) -> None:
        style = self.style
        self._light = style.light((0.0, 0.35, -0.6))
        self._sunny = sum(style.sun) / (sum(style.sun) + sum(style.ambient))
        self._shadow_length = min(1.0 / style.to_sun[1], 4.0) if self._sunny > 0.15 else 0.0
        self._view = math.sin(self.camera.yaw), math.cos(self.camera.yaw)

    def local(self, z: float) -> Style:
        """Returns the style of the place at z."""
        index = self.style.route.index(z)
        if index not in self._places:
            self._places[index] = self.style.route.local(self.style, z)
        return self._places[index]

    def sees(self, x: float, z: float, radius: float, height: float = 0.0) -> bool:
        """Whether a thing of this radius, or its shadow if it is ``height`` high, may be seen."""
        dx, dz = x - self.camera.position[0], z - self.camera.position[2]
        depth = dx * self._view[0] + dz * self._view[1]
        right = dx * self._view[1] - dz * self._view[0]
        margin = radius + self._shadow_length * height
        return depth > -margin and abs(right) < depth * self.half_view + 1.6 * margin

    def distance(self, x: float, z: float) -> float:
        """Returns the distance from the camera on the ground, in metres."""
        return math.hypot(x - self.camera.position[0], z - self.camera.position[2])

    def add(
        self,
        origin: Vector,
        u: Vector,
        v: Vector,
        shade: Shader,
        label: int,
        instance: int = 0,
        normal: Vector | None = None,
    ) -> None:
        """Adds a surface, lit by its normal, unless the normal points away from the camera."""
        light = self._light
        if normal is not None:
            (cx, cy, cz), (ox, oy, oz) = self.camera.position, origin
            if dot(normal, (cx - ox, cy - oy, cz - oz)) <= 0:
                return
            light = self.style.light(normal)
        self.patches.append(Patch(origin, u, v, shade, label, instance, light))

    def billboard(
        self, x: float, y: float, z: float, width: float, height: float, shade: Shader, label: int,
        instance: int = 0,
    ) -> None:  # fmt: skip
        """Adds an upright rectangle that faces the camera and stands at (x, y, z)."""
        dx, dz = x - self.camera.position[0], z - self.camera.position[2]
        distance = math.hypot(dx, dz) + 1e-6
        u = (dz / distance * width, 0.0, -dx / distance * width)
        origin = (x - 0.5 * u[0], y, z - 0.5 * u[2])
        self.add(origin, u, (0.0, height, 0.0), shade, label, instance)

    def shadow(self, x: float, z: float, u: Vector, height: float, ragged: bool = False) -> None:
        """Adds the shadow of an upright thing that stands along ``u`` and is ``height`` high."""
        if self._shadow_length > 0 and self.distance(x, z) < 60.0:
            sx, _, sz = self.style.to_sun
            reach = self._shadow_length * height
            along = (-sx * reach, 0.0, -sz * reach)
            origin = (x - 0.5 * u[0], 0.0, z - 0.5 * u[2])
            shade = _BLOB if ragged else _WHOLE
            left = 1.0 - 0.7 * self._sunny
            self.shadows.append(Patch(origin, u, along, shade, ROAD, 0, (left, left, left)))

    def contact(self, x: float, z: float, u: Vector, v: Vector, left: float = 0.5) -> None:
        """Darkens the ground below a thing that spans u and v around (x, z)."""
        if self.distance(x, z) > 40.0:
            return
        origin = (x - 0.5 * (u[0] + v[0]), 0.0, z - 0.5 * (u[2] + v[2]))
        self.shadows.append(Patch(origin, u, v, _CONTACT, ROAD, 0, (left, left, left)))


_BLOB = make_blob(1.0)
_CONTACT = make_blob(0.0)
_WHOLE = plain((0.0, 0.0, 0.0))
