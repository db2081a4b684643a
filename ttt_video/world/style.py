"""The constants of one video: the street's measures, its looks, and the light."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UserError
from .rng import Draw, wave

Color = tuple[float, float, float]
Vector = tuple[float, float, float]


def scale(color: Color, gain: float, offset: float = 0.0) -> Color:
    """Returns ``offset + gain * color``."""
    r, g, b = color
    return (offset + gain * r, offset + gain * g, offset + gain * b)


def multiply(color: Color, light: Color) -> Color:
    """Returns the product per channel."""
    return (color[0] * light[0], color[1] * light[1], color[2] * light[2])


def dot(a: Vector, b: Vector) -> float:
    """Returns the scalar product."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


# (zenith, horizon, sun light, ambient light, sun elevation in degrees, cloud cover, lit windows)
_LIGHTS: dict[str, tuple[Color, Color, Color, Color, tuple[float, float], float, float]] = {
    "noon": (
        (0.27, 0.47, 0.80), (0.70, 0.82, 0.93), (0.62, 0.60, 0.55), (0.58, 0.60, 0.64),
        (50.0, 70.0), 0.35, 0.0,
    ),
    "afternoon": (
        (0.33, 0.52, 0.80), (0.82, 0.86, 0.88), (0.66, 0.60, 0.48), (0.50, 0.53, 0.58),
        (28.0, 48.0), 0.45, 0.0,
    ),
    "golden": (
        (0.42, 0.50, 0.68), (0.97, 0.80, 0.58), (0.72, 0.52, 0.30), (0.42, 0.41, 0.45),
        (12.0, 24.0), 0.40, 0.05,
    ),
    "overcast": (
        (0.60, 0.63, 0.67), (0.76, 0.77, 0.79), (0.04, 0.04, 0.04), (0.95, 0.96, 0.98),
        (40.0, 60.0), 0.9, 0.02,
    ),
    "dusk": (
        (0.20, 0.25, 0.42), (0.72, 0.52, 0.46), (0.16, 0.11, 0.09), (0.56, 0.54, 0.62),
        (8.0, 14.0), 0.5, 0.35,
    ),
}  # fmt: skip
_TIMES_OF_DAY = ("noon", "noon", "afternoon", "afternoon", "golden", "overcast", "overcast", "dusk")

WALL_COLORS: tuple[Color, ...] = (
    (0.58, 0.29, 0.23), (0.66, 0.42, 0.31), (0.79, 0.70, 0.54), (0.88, 0.84, 0.74),
    (0.62, 0.62, 0.60), (0.45, 0.46, 0.48), (0.50, 0.40, 0.32), (0.83, 0.62, 0.44),
    (0.55, 0.64, 0.70), (0.72, 0.78, 0.68), (0.86, 0.72, 0.70), (0.38, 0.33, 0.31),
    (0.90, 0.89, 0.87), (0.70, 0.55, 0.60), (0.40, 0.47, 0.55), (0.80, 0.76, 0.40),
)  # fmt: skip
LEAF_COLORS: tuple[Color, ...] = (
    (0.22, 0.42, 0.14), (0.31, 0.48, 0.16), (0.16, 0.33, 0.16), (0.38, 0.45, 0.18),
    (0.24, 0.38, 0.22), (0.45, 0.50, 0.20), (0.62, 0.44, 0.14), (0.58, 0.30, 0.13),
)  # fmt: skip


SCENES = ("street", "park", "tunnel")


@dataclass(frozen=True)
class Route:
    """The scenes that a street leads through, over and over; each is ``stretch`` metres long.

    Raises:
        UserError: a scene is unknown, there is none, or a tunnel follows a tunnel.
    """

    scenes: tuple[str, ...] = ("street",)
    start: float = 0.0  # where the first one begins
    stretch: float = 1.0

    def __post_init__(self) -> None:
        if not self.scenes or not set(self.scenes) <= set(SCENES):
            given = ", ".join(self.scenes) or "none"
            raise UserError(f"scenes are {given}; choose some of: {', '.join(SCENES)}")
        following = self.scenes[1:] + self.scenes[:1]
        if ("tunnel", "tunnel") in zip(self.scenes, following, strict=True):
            raise UserError("scenes go round, and no tunnel may follow a tunnel; put one between")

    def at(self, z: float) -> str:
        """Returns the scene at z."""
        if len(self.scenes) == 1:
            return self.scenes[0]
        return self.scenes[math.floor((z - self.start) / self.stretch) % len(self.scenes)]

    def tunnels(self, low: float, high: float) -> list[tuple[float, float]]:
        """Returns start and end of the tunnels that reach into [low, high]."""
        if "tunnel" not in self.scenes:
            return []
        first = math.floor((low - self.start) / self.stretch)
        last = math.floor((high - self.start) / self.stretch)
        found = [k for k in range(first, last + 1) if self.scenes[k % len(self.scenes)] == "tunnel"]
        return [(self.start + k * self.stretch, self.start + (k + 1) * self.stretch) for k in found]

    def index(self, z: float) -> int:
        """Returns the number of the place at z; all of a place has one style."""
        return 0

    def stretches(self, low: float, high: float) -> list[tuple[float, float]]:
        """Returns start and end of the places that reach into [low, high]."""
        return [(-math.inf, math.inf)]

    def local(self, style: Style, z: float) -> Style:
        """Returns the style with the materials of the place at z."""
        return style

    def moment(self, style: Style, time: float) -> Style:
        """Returns the style with the light, the weather and the camera's state at a time."""
        return style


@dataclass(frozen=True)
class Style:
    """Constants of one video, drawn from its seed; lengths in metres, colours in [0, 1].

    The street runs along +z; its centre line is ``x = bend * wave(z / bend_length + phase)``.
    """

    seed: int
    # light
    time_of_day: str
    zenith: Color
    horizon: Color
    sun: Color
    ambient: Color
    to_sun: Vector
    clouds: float
    lit_windows: float
    haze: float  # extinction of clean air, 1/m
    exposure: float
    # cross section
    lane_width: float
    lanes: int  # per direction
    parking_width: float  # 0 without parked cars
    sidewalk_width: float
    # along the street
    bend: float
    bend_length: float
    bend_phase: float
    plot: float  # length of a building plot
    block: float  # distance between possible crossings
    crossing_chance: float
    cross_half_width: float
    # contents
    building_chance: tuple[float, float]  # left, right
    attached: bool  # buildings without gaps
    pitched_roofs: float
    building_height: tuple[float, float]
    palette: tuple[Color, ...]
    leaves: tuple[Color, ...]
    conifers: float
    tree_spacing: float
    tree_chance: tuple[float, float]
    hedge_chance: float
    lamp_spacing: float
    lamp_color: Color
    lamp_sides: tuple[bool, bool]
    sign_spacing: float
    parked_chance: float
    traffic_spacing: float
    lead_car: bool
    person_spacing: float
    # surfaces
    asphalt: Color
    paving: Color
    paving_tile: float
    marking: Color
    center_line: Color
    center_solid: bool
    edge_lines: bool
    # camera and ego-motion
    focal: float  # in image widths
    camera_height: float
    pitch: float
    speed: float  # m/s
    ego_lane: float  # lateral position
    mirrored: bool  # traffic on the left
    route: Route = Route()
    # of districts alone (``districts.py``)
    setts: float = 0.0  # size of the road's stones, 0 = asphalt
    ribs: float = 0.0  # distance of a facade's ribs, 0 = none
    cover_color: Color = (1.0, 1.0, 1.0)
    cover: float = 0.0  # share of ground and roofs below snow, sand or leaves
    wet: float = 0.0
    tunnel_lamps: Color | None = None
    blots: float = 0.0  # number on the lens
    veil: float = 0.0  # share of stray light
    glare: Color = (0.0, 0.0, 0.0)  # light that dirt on the lens throws into it, as exposed

    @property
    def half_road(self) -> float:
        """Returns half the width of the carriageway, with parking."""
        return self.lanes * self.lane_width + self.parking_width

    def center(self, z: float) -> float:
        """Returns x of the centre line at z."""
        return self.bend * wave(z / self.bend_length + self.bend_phase)

    def heading(self, z: float) -> tuple[float, float]:
        """Returns the unit direction (x, z) of the centre line at z."""
        slope = self.center(z + 0.5) - self.center(z - 0.5)
        norm = math.sqrt(1.0 + slope * slope)
        return slope / norm, 1.0 / norm

    def light(self, normal: Vector) -> Color:
        """Returns the light on a surface with this unit normal: Lambert's law and ambient light."""
        facing = max(dot(normal, self.to_sun), 0.0)
        # The sky lights surfaces that look up more than those that look down.
        open_sky = 0.85 + 0.15 * normal[1]
        ambient, sun = scale(self.ambient, open_sky), scale(self.sun, facing)
        return (ambient[0] + sun[0], ambient[1] + sun[1], ambient[2] + sun[2])


def meter(sun: Color, ambient: Color, to_sun: Vector) -> float:
    """Returns the automatic exposure, which brings the street close to a middle brightness."""
    street = sum(ambient) / 3.0 + (0.3 + 0.7 * to_sun[1]) * sum(sun) / 3.0
    return math.sqrt(1.25 / street)


def draw_style(seed: int) -> Style:
    """Draws the style of video ``seed``."""
    d = Draw(seed, 1)
    time_of_day = d.choice(_TIMES_OF_DAY)
    zenith, horizon, sun, ambient, elevations, clouds, lit = _LIGHTS[time_of_day]
    elevation = math.radians(d.uniform(*elevations))
    azimuth = d.uniform(-math.pi, math.pi)
    cos = math.cos(elevation)
    to_sun = (cos * math.sin(azimuth), math.sin(elevation), cos * math.cos(azimuth))

    lanes = 1 if d.chance(0.55) else 2
    lane_width = d.uniform(3.0, 3.7)
    grey = d.uniform(0.30, 0.56)
    warm = d.uniform(-0.03, 0.03)
    kind = d.choice(("downtown", "downtown", "residential", "residential", "boulevard", "park"))
    park_side = d.integer(2)
    buildings = {"downtown": 0.97, "residential": 0.85, "boulevard": 0.92, "park": 0.9}[kind]
    building_chance = [buildings, buildings]
    trees = {"downtown": 0.25, "residential": 0.55, "boulevard": 0.85, "park": 0.6}[kind]
    tree_chance = [trees * d.uniform(0.5, 1.2), trees * d.uniform(0.5, 1.2)]
    if kind == "park":
        building_chance[park_side] = 0.1
        tree_chance[park_side] = 0.95
    low, high = {
        "downtown": (9.0, 30.0), "residential": (4.0, 9.0),
        "boulevard": (8.0, 20.0), "park": (6.0, 18.0),
    }[kind]  # fmt: skip
    ego_lane = (d.integer(lanes) + 0.5) * lane_width
    marking = d.choice(((0.86, 0.86, 0.84), (0.78, 0.78, 0.76), (0.93, 0.93, 0.93)))
    return Style(
        seed=seed,
        time_of_day=time_of_day,
        zenith=d.jitter(zenith, 0.12),
        horizon=d.jitter(horizon, 0.08),
        sun=sun,
        ambient=d.jitter(ambient, 0.10),
        to_sun=to_sun,
        clouds=min(clouds * d.uniform(0.4, 1.5), 0.95),
        lit_windows=lit,
        haze=d.uniform(0.0005, 0.0035),
        exposure=d.uniform(0.9, 1.15) * meter(sun, ambient, to_sun),
        lane_width=lane_width,
        lanes=lanes,
        parking_width=2.3 if d.chance(0.6) else 0.0,
        sidewalk_width=d.uniform(2.2, 5.0),
        bend=0.0 if d.chance(0.3) else d.uniform(2.0, 12.0),
        bend_length=d.uniform(260.0, 420.0),
        bend_phase=d.random(),
        plot=d.uniform(10.0, 20.0),
        block=d.uniform(80.0, 150.0),
        crossing_chance=d.uniform(0.4, 0.9),
        cross_half_width=d.uniform(3.2, 6.0),
        building_chance=(building_chance[0], building_chance[1]),
        attached=kind != "residential",
        pitched_roofs=0.85 if kind == "residential" else 0.15,
        building_height=(low, high),
        palette=tuple(d.choice(WALL_COLORS) for _ in range(6)),
        leaves=tuple(d.choice(LEAF_COLORS[:6] if d.chance(0.8) else LEAF_COLORS) for _ in range(3)),
        conifers=d.choice((0.0, 0.1, 0.6)),
        tree_spacing=d.uniform(6.0, 12.0),
        tree_chance=(tree_chance[0], tree_chance[1]),
        hedge_chance=d.uniform(0.0, 0.7) if kind != "downtown" else 0.1,
        lamp_spacing=d.uniform(14.0, 26.0),
        lamp_color=d.choice(
            ((0.35, 0.36, 0.37), (0.55, 0.56, 0.57), (0.16, 0.20, 0.18), (0.42, 0.33, 0.24))
        ),
        lamp_sides=d.choice(((True, True), (True, True), (False, True), (True, False))),
        sign_spacing=d.uniform(11.0, 24.0),
        parked_chance=d.uniform(0.3, 0.9),
        traffic_spacing=d.uniform(16.0, 45.0),
        lead_car=d.chance(0.5),
        person_spacing=d.uniform(3.5, 12.0),
        asphalt=(grey + warm, grey, grey - warm + d.uniform(-0.01, 0.03)),
        paving=d.jitter(
            d.choice(
                ((0.62, 0.61, 0.58), (0.50, 0.49, 0.48), (0.64, 0.52, 0.45), (0.72, 0.70, 0.64))
            ),
            0.15,
        ),
        paving_tile=d.uniform(0.5, 1.6),
        marking=marking,
        center_line=(0.85, 0.68, 0.18) if d.chance(0.3) else marking,
        center_solid=d.chance(0.3),
        edge_lines=d.chance(0.5),
        focal=d.uniform(0.56, 0.82),
        camera_height=d.uniform(1.25, 1.85),
        pitch=d.uniform(-0.05, 0.03),
        speed=d.uniform(4.0, 11.0),
        ego_lane=ego_lane,
        mirrored=d.chance(0.3),
    )
