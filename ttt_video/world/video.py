"""A procedural street with exact labels, as videos and as stills: pure functions of a seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .districts import dirty, districts_of, paint_ground, paint_water
from .renderer import Camera, Canvas
from .rng import Draw, cell_hash, noise, wave, wave_array
from .scene import BUILDING, ROAD, SIDEWALK, SKY, VEGETATION
from .scenery import EXPOSURE_LAG, daylight, exposure, lamplight
from .street import AHEAD, BEHIND, build, crossings, ego_distance
from .style import Route, Style, draw_style, scale
from .textures import rgb

WORLD_VERSION = 1
"""Raised when a seed gives other bytes than before; part of the names of cache folders."""

FRAMES_PER_SECOND = 10
SCENE_SECONDS = 8.0
WORLD_CLASS_IDS = (0, 1, 2, 5, 7, 8, 10, 11, 13)
"""The Cityscapes train ids that occur; ``scene`` names them."""

SPLIT_SEEDS = {"train": range(1000), "val": range(1000, 2000), "test": range(2000, 3000)}
"""Worlds by split; nobody has looked at those from 9000 on."""

_SKYLINE_DEPTH = 400.0  # metres; the ground ends there
_STILL_SPAN = 600  # stills are taken from the first minute of a video


@dataclass(frozen=True)
class WorldFrame:
    """One frame with its exact labels.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        sem_seg: (H, W) uint8, Cityscapes train ids, all of them in ``WORLD_CLASS_IDS``.
        instances: (H, W) int32; 0, or the id in [1, 65535] of a car or a person, which is the same
            in every frame of a video.
        depth: (H, W) float32, metres along the optical axis, inf in the sky.
    """

    image: np.ndarray
    sem_seg: np.ndarray
    instances: np.ndarray
    depth: np.ndarray


class WorldVideo:
    """A drive along a street: a sequence whose frames can be read in any order.

    Args:
        seed: chooses the world; see ``SPLIT_SEEDS``.
        num_frames: length at ``FRAMES_PER_SECOND``; frame t does not depend on it.
        height, width: pixels, at least 16.
        scenes: "street", "park" or "tunnel"; the street leads through them over and over, about
            ``SCENE_SECONDS`` each.
        districts: whether the street leads through districts, with changing weather, in place of
            scenes; the seed's split decides which (``districts.split_of``).
        zoom: how many times as long the camera's lens is, at least 1; what is drawn ends where it
            does without, 115 m ahead, cars and houses in full size.

    Raises:
        ValueError: seed or number of frames is negative, a size is below 16, or zoom below 1.
        UserError: a scene is unknown, a tunnel follows a tunnel, or there are both scenes and
            districts.
    """

    def __init__(
        self,
        seed: int,
        num_frames: int,
        height: int = 128,
        width: int = 256,
        scenes: Sequence[str] = ("street",),
        *,
        districts: bool = False,
        zoom: float = 1.0,
    ) -> None:
        if seed < 0 or num_frames < 0:
            raise ValueError(f"seed and num_frames must not be negative, got {seed}, {num_frames}")
        if height < 16 or width < 16:
            raise ValueError(f"height and width must be at least 16, got {height} x {width}")
        if not 1.0 <= zoom < math.inf:
            raise ValueError(f"zoom must be at least 1, got {zoom}")
        self.seed, self.num_frames = seed, num_frames
        self.height, self.width = height, width
        if districts and tuple(scenes) != ("street",):
            raise UserError(f"scenes are {', '.join(scenes)}; districts go with the street alone")
        style = draw_style(seed)
        start = ego_distance(style, 0.0)
        route = Route(tuple(scenes), start, style.speed * SCENE_SECONDS)
        if districts:
            route = districts_of(style, start)
        self._style = dataclasses.replace(style, route=route, focal=zoom * style.focal)

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> WorldFrame:
        """Renders frame ``index``; raises IndexError outside [-len, len)."""
        if not -self.num_frames <= index < self.num_frames:
            raise IndexError(f"frame {index} of a video of {self.num_frames} frames")
        time = (index % self.num_frames) / FRAMES_PER_SECOND
        return _render(self._style, time, self.height, self.width)


def render_still(
    seed: int,
    height: int,
    width: int,
    index: int = 0,
    *,
    districts: bool = False,
    zoom: float = 1.0,
) -> WorldFrame:
    """Renders still ``index`` of video ``seed``, at a time that seed and index choose."""
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    frame = Draw(seed, 30, index).integer(_STILL_SPAN)
    video = WorldVideo(seed, _STILL_SPAN, height, width, districts=districts, zoom=zoom)
    return video[frame]


class WorldStills:
    """A sequence of stills: all worlds of a split once, then again at another time.

    Args:
        split: a key of ``SPLIT_SEEDS``.
        num_stills: length; a still does not depend on it.
        height, width: pixels, at least 16.
        districts, zoom: see ``WorldVideo``.
    """

    def __init__(
        self,
        split: str,
        num_stills: int,
        height: int = 128,
        width: int = 256,
        *,
        districts: bool = False,
        zoom: float = 1.0,
    ) -> None:
        self.seeds = SPLIT_SEEDS[split]
        self.num_stills, self.height, self.width = num_stills, height, width
        self.districts, self.zoom = districts, zoom

    def __len__(self) -> int:
        return self.num_stills

    def __getitem__(self, index: int) -> WorldFrame:
        """Renders still ``index``; raises IndexError outside [0, len)."""
        if not 0 <= index < self.num_stills:
            raise IndexError(f"still {index} of {self.num_stills}")
        seed, number = self.origin(index)
        size = self.height, self.width
        return render_still(seed, *size, number, districts=self.districts, zoom=self.zoom)

    def origin(self, index: int) -> tuple[int, int]:
        """Returns the seed of the world in still ``index``, and the still's number in it."""
        number, world = divmod(index, len(self.seeds))
        return self.seeds[world], number


def _camera(style: Style, time: float, width: int) -> Camera:
    d = Draw(style.seed, 21)
    z = ego_distance(style, time)
    sway = 0.35 * wave(time / d.uniform(8.0, 15.0) + d.random())
    bounce = 0.02 * wave(time * d.uniform(0.9, 1.6) + d.random())
    hx, hz = style.heading(z + 4.0)  # drivers look ahead
    yaw = hx / hz + 0.05 * wave(time / d.uniform(10.0, 25.0) + d.random())
    pitch = style.pitch + 0.006 * wave(time * d.uniform(0.6, 1.2) + d.random())
    roll = 0.012 * wave(time / d.uniform(3.0, 7.0) + d.random())
    position = (style.center(z) + style.ego_lane + sway, style.camera_height + bounce, z)
    return Camera(position, yaw, pitch, roll, style.focal * width)


def _render(style: Style, time: float, height: int, width: int) -> WorldFrame:
    style = style.route.moment(style, time)
    camera = _camera(style, time, width)
    canvas = Canvas(camera, height, width, background=SKY)
    z = camera.position[2]
    scene = build(style, camera, 0.5 / style.focal, time)
    canvas.draw(scene.patches)
    ground = np.zeros(canvas.depth.shape, dtype=bool)
    for start, end in style.route.stretches(z - BEHIND, z + 2.0 * _SKYLINE_DEPTH):
        ground |= _draw_ground(canvas, scene.local(max(start, z - BEHIND)), start, end)
    left = canvas.shadows(scene.shadows)
    canvas.color[ground] *= left[ground][:, None]
    tunnels = style.route.tunnels(z - 2.0 * BEHIND, z + 2.0 * AHEAD)
    if tunnels:
        drawn = np.isfinite(canvas.depth)
        along = z + canvas.depth[drawn] * canvas.rays[2][drawn]
        if style.tunnel_lamps is None:
            canvas.color[drawn] *= daylight(tunnels, along)[:, None]
        else:
            canvas.color[drawn] *= lamplight(tunnels, along, style.tunnel_lamps)
        before = ego_distance(style, time - EXPOSURE_LAG)
        style = dataclasses.replace(style, exposure=style.exposure * exposure(tunnels, before))
    _draw_background(canvas, scene.local(z + AHEAD))
    arrays = [_develop(canvas, style), canvas.label, canvas.instance, canvas.depth]
    if style.mirrored:
        arrays = [np.ascontiguousarray(array[:, ::-1]) for array in arrays]
    return WorldFrame(*arrays)


def _draw_ground(canvas: Canvas, style: Style, start: float, end: float) -> np.ndarray:
    """Draws road and sidewalk between two places along the street where nothing is in front.

    Returns:
        These pixels, (H, W) bool.
    """
    cx, cy, cz = canvas.camera.position
    ray_x, ray_y, ray_z = canvas.rays
    mask = (ray_y * -_SKYLINE_DEPTH > cy) & np.isinf(canvas.depth)
    depth = -cy / ray_y[mask]
    if math.isfinite(start):
        along = cz + depth * ray_z[mask]
        here = (along >= start) & (along < end)
        mask[mask] = here
        depth = depth[here]
    x = cx + depth * ray_x[mask]
    z = cz + depth * ray_z[mask]
    lateral = x - style.bend * wave_array(z / style.bend_length + style.bend_phase)
    away = np.abs(lateral)
    fade = np.minimum(14.0 / depth, 1.0)  # detail smaller than a pixel would alias
    salt = Draw(style.seed, 22).integer(1 << 30)

    road = away < style.half_road
    lines = np.zeros(road.shape, dtype=bool)
    centre = (away < 0.09) & (style.center_solid | (z / 7.0 - np.floor(z / 7.0) < 0.45))
    for lane in range(1, style.lanes):
        dashed = z / 9.0 - np.floor(z / 9.0) < 0.35
        lines |= (np.abs(away - lane * style.lane_width) < 0.07) & dashed
    if style.edge_lines or style.parking_width > 0:
        lines |= np.abs(away - style.lanes * style.lane_width + 0.1) < 0.06
    for _, middle in crossings(style, cz - 30.0, cz + 200.0):
        offset = np.abs(z - middle)
        edge = style.cross_half_width
        side = offset < edge
        road |= side & (away < 70.0)
        clear = (offset < edge + 5.0) & (away < style.half_road)
        lines &= ~clear
        centre &= ~clear
        zebra = (offset > edge + 0.8) & (offset < edge + 3.6) & (away < style.half_road)
        lines |= zebra & (lateral - np.floor(lateral) < 0.5)
        stop = (z < middle) & (np.abs(offset - edge - 4.4) < 0.2)
        lines |= stop & (lateral > 0) & (away < style.half_road)
        lines |= side & (np.abs(z - middle) < 0.08) & (away > style.half_road) & (away < 70.0)

    grain = noise(x, z, 30.0, salt) - 0.5
    coarse = noise(x, z, 4.0, salt + 5) - 0.5
    patched = cell_hash(np.floor(lateral / 2.5), np.floor(z / 6.0), salt) > 0.93
    tone = 1.0 + 0.25 * coarse + 0.30 * fade * grain - 0.16 * patched
    worn = ((away - 0.5 * style.lane_width) / style.lane_width) % 1.0
    tone += 0.05 * np.abs(worn - 0.5)
    color = rgb(style.asphalt) * tone[:, None]
    paint = 0.86 + 0.5 * fade * grain
    color[lines] = rgb(style.marking) * paint[lines][:, None]
    centre &= ~lines
    color[centre] = rgb(style.center_line) * paint[centre][:, None]

    walk = ~road
    tile = style.paving_tile
    u, v = lateral[walk] / tile, z[walk] / tile
    column, row = np.floor(u), np.floor(v)
    joint = (u - column < 0.09) | (v - row < 0.09)
    tone = 1.0 + 0.14 * (cell_hash(column, row, salt) - 0.5) + 0.18 * coarse[walk]
    tone += fade[walk] * (0.20 * grain[walk] - 0.22 * joint)
    tone[np.abs(away[walk] - style.half_road - 0.12) < 0.12] *= 1.18  # kerb stones
    color[walk] = rgb(style.paving) * tone[:, None]

    paint_ground(color, style, road, lateral, z, depth, salt)
    color = color * rgb(style.light((0.0, 1.0, 0.0)))
    paint_water(color, style, road, depth)
    canvas.color[mask] = color
    canvas.label[mask] = np.where(road, ROAD, SIDEWALK).astype(np.uint8)
    canvas.depth[mask] = depth
    return mask


def _draw_background(canvas: Canvas, style: Style) -> None:
    """Draws the sky with clouds, and before it the skyline, which does not move."""
    mask = np.isinf(canvas.depth)
    ray_x, ray_y, ray_z = (ray[mask] for ray in canvas.rays)
    flat = np.maximum(np.abs(ray_z), 0.2)
    azimuth, elevation = ray_x / flat, ray_y / flat
    salt = Draw(style.seed, 23).integer(1 << 30)

    up = np.minimum(np.maximum(elevation, 0.0) * 1.6, 1.0)[:, None]
    color = rgb(style.horizon) * (1.0 - up) + rgb(style.zenith) * up
    # Clouds are on a plane, and so smaller towards the horizon.
    plane = 1.0 / np.maximum(elevation + 0.12, 0.05)
    cover = noise(azimuth * plane, plane, 9.0, salt) * 0.7
    cover += noise(azimuth * plane, plane, 30.0, salt + 3) * 0.3
    cover = np.minimum(np.maximum((cover - 1.0 + style.clouds) * 3.5, 0.0), 1.0)[:, None]
    white = rgb(scale(style.horizon, 0.62, 0.35))
    color += (white - color) * (0.85 * cover)
    sun = sum(style.sun) / 3.0
    if sun > 0.1 and style.to_sun[2] > 0.1:
        sx, sy = style.to_sun[0] / style.to_sun[2], style.to_sun[1] / style.to_sun[2]
        near = (azimuth - sx) * (azimuth - sx) + (elevation - sy) * (elevation - sy)
        color += (sun * 0.06 / (near + 0.06))[:, None]

    cell = np.floor(azimuth * 22.0)
    kind = cell_hash(np.floor(cell * 0.2), 0.0 * cell, salt)
    wood = kind < 0.5
    houses = 0.02 + 0.09 * cell_hash(cell, 0.0 * cell, salt + 1)
    trees = 0.02 + 0.05 * noise(azimuth, 0.0 * azimuth, 400.0, salt)
    hill = elevation < np.where(wood, trees, houses)
    leaf = rgb(style.leaves[0]) * 0.8
    skyline = np.where(wood[:, None], leaf, rgb(style.palette[0]) * 0.8)
    skyline = skyline * (0.75 + 0.5 * noise(azimuth, elevation, 700.0, salt))[:, None]
    light = rgb(style.light((0.0, 0.3, -0.9)))
    color[hill] = (skyline * light * 0.6 + rgb(style.horizon) * 0.4)[hill]

    canvas.color[mask] = color
    canvas.label[mask] = np.where(hill, np.where(wood, VEGETATION, BUILDING), SKY).astype(np.uint8)
    canvas.depth[mask] = np.where(hill, np.float32(_SKYLINE_DEPTH), np.float32(np.inf))


def _develop(canvas: Canvas, style: Style) -> np.ndarray:
    """Applies haze, lens and exposure to the canvas; returns an (H, W, 3) uint8 image."""
    finite = np.where(np.isinf(canvas.depth), np.float32(0.0), canvas.depth)
    thickness = finite * style.haze
    clear = 1.0 / (1.0 + thickness + 0.5 * thickness * thickness)  # close to exp, but exact
    color = canvas.color * clear[..., None] + rgb(style.horizon) * (1.0 - clear)[..., None]
    aspect = canvas.camera.focal / canvas.width
    vignette = 1.0 - 0.10 * aspect * aspect * (
        (canvas.columns * canvas.columns)[None, :] + (canvas.rows * canvas.rows)[:, None]
    )
    color *= (style.exposure * vignette)[..., None]
    color = dirty(color, style)
    bright = np.maximum(color - 0.75, 0.0)  # a soft shoulder, as of film, not a hard limit
    color = np.minimum(color, 0.75) + bright * 0.25 / (bright + 0.25)
    image = np.minimum(np.maximum(color * 255.0, 0.0), 255.0)
    # The lens blurs by (1, 4, 1) / 6 in both directions.
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (padded[:-2] + 4.0 * padded[1:-1] + padded[2:]) * (1.0 / 6.0)
    image = (rows[:, :-2] + 4.0 * rows[:, 1:-1] + rows[:, 2:]) * (1.0 / 6.0)
    return (image + 0.5).astype(np.uint8)
