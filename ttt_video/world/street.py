"""Places things along the endless street at a time: layout, traffic and walkers.

A thing has a kind and an integer index along the street, and is drawn from ``(seed, kind, index)``.
So any frame can be made alone, and ids are stable over time.
"""

from __future__ import annotations

import math

from .objects import add_building, add_bush, add_hedge, add_person, add_pole, add_sign, add_tree
from .renderer import Camera
from .rng import Draw, wave
from .scene import BUILDING, VEGETATION, Scene
from .scenery import add_tunnel
from .style import Style, Vector
from .textures import make_treeline, make_wall
from .vehicles import add_car

AHEAD = 115.0  # metres of street that are built in front of the camera
BEHIND = 14.0
_SMALL_AHEAD = 75.0  # beyond it persons, posts and bushes are a pixel or two

# Kinds: the second key of every draw (1 is for the style).
_CROSSING, _BUILDING, _TREE, _HEDGE, _LAMP, _SIGN, _PARKED = 2, 3, 4, 5, 6, 7, 8
_ONCOMING, _OVERTAKING, _LEAD, _WALKER, _CROSSER, _WAITING = 9, 10, 11, 12, 13, 14

_IDS_PER_KIND = 2048


def instance_id(kind: int, variant: int, index: int) -> int:
    """Returns an id in [1, 65535] that is unique among the things in sight and stable in time."""
    return 1 + ((kind - _PARKED) * 4 + variant) * _IDS_PER_KIND + index % _IDS_PER_KIND


def ego_distance(style: Style, time: float) -> float:
    """Returns the metres that the camera has driven after ``time`` seconds.

    Its speed goes up and down linearly; some cameras almost stop, none drives backwards.
    """
    d = Draw(style.seed, 20)
    period, change = d.uniform(9.0, 18.0), d.uniform(0.35, 0.98)
    # The steepest slope of a wave is 8 per period.
    return style.speed * (time + change * period / 8.0 * wave(time / period + d.random()))


def crossings(style: Style, low: float, high: float) -> list[tuple[int, float]]:
    """Returns index and z of the middle of each side street between low and high."""
    found = []
    for index in range(math.floor(low / style.block) - 1, math.ceil(high / style.block) + 1):
        d = Draw(style.seed, _CROSSING, index)
        if d.chance(style.crossing_chance):
            z = (index + d.uniform(0.35, 0.65)) * style.block
            if low <= z <= high and not _in_tunnel(style, z, 15.0):
                found.append((index, z))
    return found


def build(style: Style, camera: Camera, half_view: float, time: float) -> Scene:
    """Builds all but ground and background, as a camera sees it at a time in seconds."""
    scene = Scene(style, camera, half_view)
    z = camera.position[2]
    cross = [middle for _, middle in crossings(style, z - 60.0, z + AHEAD + 60.0)]
    for side in (0, 1):
        _add_plots(scene, side, cross)
        _add_row(scene, side, cross)
    for start, end in style.route.tunnels(z - BEHIND, z + AHEAD):
        add_tunnel(scene, start, end)
    _add_traffic(scene, cross, time)
    _add_walkers(scene, time)
    _add_crossers(scene, time)
    return scene


def _indices(scene: Scene, spacing: float, ahead: float, offset: float = 0.0) -> range:
    """Returns the indices i for which i * spacing + offset is in sight."""
    z = scene.camera.position[2] - offset
    return range(math.floor((z - BEHIND) / spacing), math.ceil((z + ahead) / spacing) + 1)


def _near_crossing(style: Style, cross: list[float], z: float, margin: float) -> bool:
    return any(abs(z - middle) < style.cross_half_width + margin for middle in cross)


def _in_tunnel(style: Style, z: float, margin: float = 0.0) -> bool:
    return "tunnel" in (style.route.at(z - margin), style.route.at(z + margin))


def _add_plots(scene: Scene, side: int, cross: list[float]) -> None:
    """Adds buildings, and what is seen between them."""
    style = scene.style
    sign = 1.0 if side else -1.0
    kerb = style.half_road + style.sidewalk_width
    for index in _indices(scene, style.plot, AHEAD + style.plot):
        style = scene.local((index + 0.5) * style.plot)
        d = Draw(style.seed, _BUILDING, index, side)
        gap = 0.0 if style.attached else d.uniform(2.0, 6.0)
        z0, z1 = index * style.plot + 0.5 * gap, (index + 1) * style.plot - 0.5 * gap
        setback = d.uniform(0.0, 0.6) if style.attached else d.uniform(0.5, 4.5)
        height = d.uniform(*style.building_height)
        for middle in cross:  # plots end at a side street's sidewalk
            low = middle - style.cross_half_width - 2.5
            high = middle + style.cross_half_width + 2.5
            if low < z1 and high > z0:
                z0, z1 = (high, z1) if z1 - high > low - z0 else (z0, low)
        built = style.building_chance[side]
        if style.route.at(0.5 * (z0 + z1)) == "park":
            built = 0.0
        if z1 - z0 > 3.0 and d.chance(built):
            corner, run, outward = _frontage(style, sign, kerb + setback, z0, z1)
            add_building(scene, d, corner, run, outward, height)
            continue
        # Behind an open plot there are trees or the next row of houses.
        corner, run, outward = _frontage(
            style, sign, kerb + 16.0, index * style.plot - 1.0, (index + 1) * style.plot + 1.0
        )
        top = 0.5 * height + 4.0
        if d.chance(0.25 + 0.75 * (built < 0.5)):
            line = make_treeline(d.jitter(d.choice(style.leaves), 0.2), d.integer(1 << 30), top)
            scene.add(corner, run, (0.0, top, 0.0), line, VEGETATION, 0, outward)
        else:
            wall = make_wall(d, style, top)
            scene.add(corner, run, (0.0, top, 0.0), wall, BUILDING, 0, outward)
        for _ in range(3):
            z, lateral = d.uniform(z0, max(z1, z0 + 1.0)), kerb + d.uniform(1.5, 12.0)
            add = add_tree if d.chance(0.6) else add_bush
            if not _near_crossing(style, cross, z, 1.5):
                add(scene, d, style.center(z) + sign * lateral, z)


def _frontage(
    style: Style, sign: float, lateral: float, z0: float, z1: float
) -> tuple[Vector, Vector, Vector]:
    """Returns corner, run and normal towards the street of a front between z0 and z1."""
    x0, x1 = style.center(z0) + sign * lateral, style.center(z1) + sign * lateral
    length = math.hypot(x1 - x0, z1 - z0)
    outward = (-sign * (z1 - z0) / length, 0.0, sign * (x1 - x0) / length)
    return (x0, 0.0, z0), (x1 - x0, 0.0, z1 - z0), outward


def _add_row(scene: Scene, side: int, cross: list[float]) -> None:
    """Adds what is along one kerb: trees, hedges, lamps, signs, parked cars."""
    style = scene.style
    sign = 1.0 if side else -1.0
    road, kerb = style.half_road, style.half_road + style.sidewalk_width

    def spot(kind: int, index: int, spacing: float) -> tuple[Draw, float]:
        d = Draw(style.seed, kind, index, side)
        return d, (index + d.uniform(0.2, 0.8)) * spacing

    for index in _indices(scene, style.tree_spacing, AHEAD):
        d, z = spot(_TREE, index, style.tree_spacing)
        planted = 0.95 if style.route.at(z) == "park" else scene.local(z).tree_chance[side]
        if _in_tunnel(style, z, 2.0) or _near_crossing(style, cross, z, 2.0):
            continue
        if d.chance(planted):
            add_tree(scene, d, style.center(z) + sign * (road + 0.9), z)
    for index in _indices(scene, 8.0, _SMALL_AHEAD):
        d = Draw(style.seed, _HEDGE, index, side)
        z = index * 8.0
        if _near_crossing(style, cross, z + 4.0, 7.0) or _in_tunnel(style, z + 4.0, 5.0):
            continue
        if d.chance(scene.local(z).hedge_chance):
            add_hedge(scene, d, *_frontage(style, sign, kerb - 0.1, z, z + 8.0))
        elif d.chance(0.25):
            add_bush(scene, d, style.center(z) + sign * (kerb - 0.5), z + d.uniform(0.0, 8.0))
    for index in _indices(scene, style.lamp_spacing, AHEAD):
        d, z = spot(_LAMP, index, style.lamp_spacing)
        if _in_tunnel(style, z, 2.0):
            continue
        if style.lamp_sides[side] and not _near_crossing(style, cross, z, -1.0):
            add_pole(scene, d, style.center(z) + sign * (road + 0.35), z, sign)
    for index in _indices(scene, style.sign_spacing, _SMALL_AHEAD):
        d, z = spot(_SIGN, index, style.sign_spacing)
        if d.chance(0.8) and not _near_crossing(style, cross, z, -1.0):
            add_sign(scene, d, style.center(z) + sign * (road + d.uniform(0.45, 1.0)), z)
    if style.parking_width > 0:
        for index in _indices(scene, 6.4, AHEAD):
            d, z = Draw(style.seed, _PARKED, index, side), (index + 0.5) * 6.4
            if d.chance(style.parked_chance) and not _near_crossing(style, cross, z, 5.0):
                z += d.uniform(-0.5, 0.5)
                hx, hz = style.heading(z)
                turn = sign if d.chance(0.9) else -sign
                x = style.center(z) + sign * (road - 1.1 + d.uniform(-0.1, 0.1))
                add_car(scene, d, x, z, (turn * hx, turn * hz), instance_id(_PARKED, side, index))


def _add_traffic(scene: Scene, cross: list[float], time: float) -> None:
    style = scene.style
    ego = scene.camera.position[2]
    lanes = [(k + 0.5) * style.lane_width for k in range(style.lanes)]
    flows = [(_ONCOMING, k, -lane, -1.0) for k, lane in enumerate(lanes)]
    flows += [(_OVERTAKING, k, lane, 1.0) for k, lane in enumerate(lanes) if lane != style.ego_lane]
    for kind, lane, lateral, direction in flows:
        d = Draw(style.seed, kind, lane, 0)
        moved = direction * style.speed * d.uniform(0.7, 1.35) * time
        for index in _indices(scene, style.traffic_spacing, AHEAD, moved):
            d = Draw(style.seed, kind, lane, 1, index)
            if not d.chance(0.75):
                continue
            z = (index + d.uniform(0.0, 0.5)) * style.traffic_spacing + moved
            hx, hz = style.heading(z)
            x = style.center(z) + lateral + d.uniform(-0.3, 0.3)
            add_car(
                scene, d, x, z, (direction * hx, direction * hz), instance_id(kind, lane, index)
            )
    if style.lead_car:
        d = Draw(style.seed, _LEAD)
        gap = d.uniform(11.0, 22.0) + 3.5 * wave(time / d.uniform(9.0, 20.0) + d.random())
        z = ego + gap
        x = style.center(z) + style.ego_lane + 0.25 * wave(time / 7.0 + d.random())
        add_car(scene, d, x, z, style.heading(z), instance_id(_LEAD, 0, 0))
    for index, middle in crossings(style, ego - 5.0, ego + AHEAD):
        for side in (0, 1):  # a car waits in the side street
            d = Draw(style.seed, _WAITING, index, side)
            if d.chance(0.5):
                sign = 1.0 if side else -1.0
                lateral = sign * (style.half_road + style.sidewalk_width + d.uniform(0.0, 5.0) + 2)
                z = middle + sign * 0.4 * style.cross_half_width
                x = style.center(z) + lateral
                add_car(scene, d, x, z, (-sign, 0.0), instance_id(_WAITING, side, index))


def _add_walkers(scene: Scene, time: float) -> None:
    """Adds persons on the sidewalks."""
    style = scene.style
    for flow in range(4):  # left and right, either direction
        sign = 1.0 if flow % 2 else -1.0
        pace = (1.0 if flow < 2 else -1.0) * Draw(style.seed, _WALKER, flow).uniform(1.0, 1.5)
        spacing = style.person_spacing * 2.0
        for index in _indices(scene, spacing, _SMALL_AHEAD, pace * time):
            d = Draw(style.seed, _WALKER, flow, index)
            if not d.chance(0.65):
                continue
            z = (index + d.random()) * spacing + pace * time
            lateral = style.half_road + d.uniform(0.35, 0.9) * style.sidewalk_width
            for member in range(2 if d.chance(0.25) else 1):
                person = Draw(style.seed, _WALKER, flow, index, member)
                x = style.center(z) + sign * (lateral - 0.65 * member)
                number = instance_id(_WALKER, flow, 2 * index + member)
                add_person(scene, person, x, z + 0.2 * member, time, True, number)


def _add_crossers(scene: Scene, time: float) -> None:
    """Adds persons who cross the road before the camera comes."""
    style = scene.style
    spacing = 24.0
    for index in _indices(scene, spacing, _SMALL_AHEAD):
        d = Draw(style.seed, _CROSSER, index)
        if not d.chance(0.55):
            continue
        z = (index + d.random()) * spacing
        pace = d.uniform(1.1, 1.7)
        span = style.half_road + 0.5 * style.sidewalk_width
        arrived = z / style.speed - d.uniform(3.0, 5.0)
        walked = pace * (time - arrived) + span
        waiting = max(-span, min(walked, span))
        sign = 1.0 if d.chance(0.5) else -1.0
        add_person(scene, d, style.center(z) + sign * waiting, z, time, waiting == walked,
                   instance_id(_CROSSER, 0, index))  # fmt: skip
