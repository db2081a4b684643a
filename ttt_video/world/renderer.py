"""A small software rasteriser for textured parallelograms, with a depth buffer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .style import Color, Vector, multiply

NEAR = 0.25  # metres; nothing nearer is drawn

# (metres along u, metres along v, depth) of N visible pixels -> colour, and which to keep or None
Shaded = tuple[np.ndarray | Color, np.ndarray | None]
Shader = Callable[[np.ndarray, np.ndarray, np.ndarray], Shaded]


@dataclass
class Patch:
    """The parallelogram ``origin + a * u + b * v`` with a, b in [0, 1].

    ``shade`` gets three float32 vectors for the N pixels that pass the depth test: metres along u,
    metres along v, and depth in metres. It returns a colour, (N, 3) or one for all, range [0, 1],
    and a boolean (N,) mask of the pixels to keep, or None.
    """

    origin: Vector
    u: Vector
    v: Vector
    shade: Shader
    label: int
    instance: int = 0
    light: Color = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera; angles in radians, yaw positive to the right, pitch positive upwards."""

    position: Vector
    yaw: float
    pitch: float
    roll: float
    focal: float  # pixels

    def axes(self) -> tuple[Vector, Vector, Vector]:
        """Returns the unit vectors right, up and forward in the world."""
        sy, cy = math.sin(self.yaw), math.cos(self.yaw)
        sp, cp = math.sin(self.pitch), math.cos(self.pitch)
        sr, cr = math.sin(self.roll), math.cos(self.roll)
        forward = (sy * cp, sp, cy * cp)
        right, up = (cy, 0.0, -sy), (-sy * sp, cp, -cy * sp)
        return _combine(cr, right, sr, up), _combine(cr, up, -sr, right), forward


class Canvas:
    """The frame that is drawn: colour, label, instance id and depth of every pixel.

    Attributes:
        color: (H, W, 3) float32, nominal range [0, 1].
        label: (H, W) uint8.
        instance: (H, W) int32, 0 = none.
        depth: (H, W) float32, metres along the optical axis, inf where nothing was drawn.
        rays: three (H, W) float32 arrays: world x, y, z of the ray with unit depth.
    """

    def __init__(self, camera: Camera, height: int, width: int, background: int) -> None:
        self.camera = camera
        self.height, self.width = height, width
        self.color = np.zeros((height, width, 3), dtype=np.float32)
        self.label = np.full((height, width), background, dtype=np.uint8)
        self.instance = np.zeros((height, width), dtype=np.int32)
        self.depth = np.full((height, width), np.inf, dtype=np.float32)
        # Rays are affine in the pixel: forward + columns * right + rows * up.
        self.columns = ((np.arange(width) + 0.5 - width / 2) / camera.focal).astype(np.float32)
        self.rows = ((height / 2 - np.arange(height) - 0.5) / camera.focal).astype(np.float32)
        right, up, forward = camera.axes()
        self._basis = np.array([forward, right, up])
        self.rays = tuple(
            (forward[k] + self.columns * right[k])[None, :] + (self.rows * up[k])[:, None]
            for k in range(3)
        )

    def draw(self, patches: list[Patch]) -> None:
        """Draws patches with a depth test; their order matters only for ties and speed."""
        with np.errstate(divide="ignore", invalid="ignore"):  # rays parallel to a patch miss it
            for item in self._visible(patches):
                self._draw_one(*item)

    def shadows(self, patches: list[Patch]) -> np.ndarray:
        """Returns the share of light that shadows leave on the ground, (H, W) float32 in [0, 1].

        Patches are in the plane y = 0, and ``light`` is the share that one leaves. Shaders get
        coordinates in [0, 1] here, and only their mask counts. Overlapping shadows do not add up:
        the darkest wins.
        """
        left = np.ones((self.height, self.width), dtype=np.float32)
        with np.errstate(divide="ignore", invalid="ignore"):
            for patch, rows, columns, coefficients in self._visible(patches):
                inside, across, depth = self._intersect(rows, columns, coefficients)
                # Things in front of the ground are not shaded.
                on_ground = np.abs(depth - self.depth[rows, columns]) < 2e-3 * depth
                index = np.nonzero(inside & on_ground)
                if not index[0].size:
                    continue
                a, b = across[0][index] + 0.5, across[1][index] + 0.5
                _, keep = patch.shade(a, b, depth[index])
                if keep is not None:
                    index = (index[0][keep], index[1][keep])
                view = left[rows, columns]
                view[index] = np.minimum(view[index], patch.light[0])
        return left

    def _visible(self, patches: list[Patch]) -> Iterator[tuple[Patch, slice, slice, np.ndarray]]:
        """Yields the patches in sight, nearest first: patch, rows, columns, coefficients.

        The coefficients, (3, 4), are the products of three vectors (the normal of the patch's
        plane, and the dual vectors for a and b) with the camera's forward, right and up and with
        the patch's origin.
        """
        if not patches:
            return
        c = np.array(self.camera.position)
        origin = np.array([p.origin for p in patches]) - c
        u = np.array([p.u for p in patches])
        v = np.array([p.v for p in patches])
        corners = np.stack([origin, origin + u, origin + u + v, origin + v], axis=1)
        # (P, 4 corners, [depth, right, up])
        view = (corners[:, :, None, :] * self._basis).sum(-1)
        depth = view[..., 0]
        normal = np.cross(u, v)
        # dual vectors: a = dual_u . (point - origin), b = dual_v . (point - origin)
        squared = np.maximum((normal * normal).sum(-1, keepdims=True), 1e-18)
        duals = np.cross(v, normal) / squared, np.cross(normal, u) / squared
        basis = self._basis[:, None, :]
        directions = [(basis * vectors).sum(-1) for vectors in (normal, *duals)]
        offsets = [(origin * vectors).sum(-1) for vectors in (normal, *duals)]
        coefficients = np.stack(
            [np.stack([*d, o], axis=1) for d, o in zip(directions, offsets, strict=True)], axis=1
        ).astype(np.float32)
        nearest = depth.min(1)
        boxes = self._boxes(view)
        for i in np.argsort(nearest, kind="stable").tolist():
            x0, x1, y0, y1 = boxes[i]
            if x0 >= x1 or y0 >= y1:
                continue
            rows, columns = slice(y0, y1), slice(x0, x1)
            if nearest[i] <= self.depth[rows, columns].max():
                yield patches[i], rows, columns, coefficients[i]

    def _boxes(self, view: np.ndarray) -> list[list[int]]:
        """Returns the pixels that each patch can touch, [x0, x1, y0, y1); empty if out of sight.

        ``view`` has the corners in the camera, (P, 4 corners, [depth, right, up]).
        """
        focal, size = self.camera.focal, np.array([self.width, self.height])
        plane = view[..., 1:] / np.maximum(view[..., :1], NEAR) * np.array([focal, -focal])
        low, high = plane.min(1), plane.max(1)
        ahead = view[..., 0] >= NEAR
        low[~ahead.any(1)] = np.inf
        for i in np.nonzero(ahead.any(1) & ~ahead.all(1))[0].tolist():
            points = np.array(_clip_near(view[i].tolist()))
            clipped = points[:, 1:] / points[:, :1] * np.array([focal, -focal])
            low[i], high[i] = clipped.min(0), clipped.max(0)
        first = np.clip(np.floor(low + 0.5 * size), 0, size).astype(np.int64)
        last = np.clip(np.ceil(high + 0.5 * size) + 1, 0, size).astype(np.int64)
        return np.stack([first[:, 0], last[:, 0], first[:, 1], last[:, 1]], axis=1).tolist()

    def _draw_one(
        self, patch: Patch, rows: slice, columns: slice, coefficients: np.ndarray
    ) -> None:
        inside, across, depth = self._intersect(rows, columns, coefficients)
        buffer = self.depth[rows, columns]
        index = np.nonzero(inside & (depth > NEAR) & (depth < buffer))
        if not index[0].size:
            return
        a, b = across[0][index] + 0.5, across[1][index] + 0.5
        depth = depth[index]
        color, keep = patch.shade(a * _length(patch.u), b * _length(patch.v), depth)
        if keep is not None:
            index = (index[0][keep], index[1][keep])
            depth = depth[keep]
            if isinstance(color, np.ndarray):
                color = color[keep]
        if isinstance(color, np.ndarray):
            lit = color * np.array(patch.light, dtype=np.float32)
        else:
            lit = np.array(multiply(color, patch.light), dtype=np.float32)
        buffer[index] = depth
        self.color[rows, columns][index] = lit
        self.label[rows, columns][index] = patch.label
        self.instance[rows, columns][index] = patch.instance

    def _intersect(
        self, rows: slice, columns: slice, coefficients: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Intersects the rays of h x w pixels with a patch's plane.

        Returns:
            (h, w) bool, inside the parallelogram; (2, h, w) float32, its coordinates a - 0.5 and
            b - 0.5; (h, w) float32, depth in metres, negative or huge if a ray misses.
        """
        k = coefficients[:, :, None]
        along = k[:, 0] + k[:, 1] * self.columns[columns]
        upright = k[:, 2] * self.rows[rows]
        planes = along[:, None, :] + upright[:, :, None]
        depth = coefficients[0, 3] / planes[0]
        across = planes[1:]
        across *= depth
        across -= k[1:, 3, None] + np.float32(0.5)
        within = np.abs(across) <= 0.5
        return within[0] & within[1], across, depth


def _combine(p: float, a: Vector, q: float, b: Vector) -> Vector:
    return (p * a[0] + q * b[0], p * a[1] + q * b[1], p * a[2] + q * b[2])


def _length(vector: Vector) -> float:
    return math.sqrt(sum(c * c for c in vector))


def _clip_near(points: list[list[float]]) -> list[list[float]]:
    """Clips a polygon at depth = NEAR (Sutherland-Hodgman); points are (depth, right, up)."""
    kept = []
    for current, following in zip(points, points[1:] + points[:1], strict=True):
        if current[0] >= NEAR:
            kept.append(current)
        if (current[0] >= NEAR) != (following[0] >= NEAR):
            part = (NEAR - current[0]) / (following[0] - current[0])
            kept.append([p + part * (q - p) for p, q in zip(current, following, strict=True)])
    return kept
