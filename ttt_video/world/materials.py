"""The kinds of districts and weathers by split: their colours, surfaces and light."""

from __future__ import annotations

from dataclasses import dataclass

from .style import Color


@dataclass(frozen=True)
class Materials:
    """What a kind of district is made of; lengths in metres, colours and shares in [0, 1]."""

    walls: tuple[Color, ...]
    leaves: tuple[Color, ...]
    road: Color
    paving: Color
    marking: Color = (0.85, 0.85, 0.83)
    posts: Color = (0.40, 0.41, 0.42)
    tile: float = 0.9  # of the sidewalk
    setts: float = 0.0  # size of the road's stones; 0 = asphalt
    ribs: float = 0.0  # distance of a facade's ribs; 0 = none
    cover: tuple[Color, float] = ((1.0, 1.0, 1.0), 0.0)  # what lies on ground and roofs, how much
    height: tuple[float, float] = (7.0, 18.0)  # of buildings
    built: float = 0.9
    attached: bool = True
    pitched: float = 0.2
    conifers: float = 0.0
    trees: float = 0.5
    hedges: float = 0.15


@dataclass(frozen=True)
class Weather:
    """Light and air; all fields are numbers or colours, so that one can turn into another."""

    zenith: Color
    horizon: Color
    sun: Color
    ambient: Color
    elevation: float  # of the sun, degrees
    clouds: float
    haze: float  # extinction, 1/m
    lit: float = 0.0  # share of windows
    wet: float = 0.0


_GREENS: tuple[Color, ...] = ((0.22, 0.42, 0.14), (0.31, 0.48, 0.16), (0.18, 0.35, 0.16))

DISTRICTS: dict[str, dict[str, Materials]] = {
    "train": {
        "brick": Materials(
            walls=((0.58, 0.29, 0.23), (0.66, 0.42, 0.31), (0.50, 0.30, 0.24)),
            leaves=_GREENS, road=(0.40, 0.40, 0.41), paving=(0.56, 0.55, 0.53),
        ),
        "suburb": Materials(
            walls=((0.88, 0.84, 0.74), (0.86, 0.72, 0.70), (0.72, 0.78, 0.68), (0.90, 0.89, 0.87)),
            leaves=(*_GREENS, (0.38, 0.45, 0.18)), road=(0.46, 0.45, 0.44),
            paving=(0.64, 0.62, 0.58), height=(4.0, 8.0), attached=False, pitched=0.9, trees=0.6,
            hedges=0.6, conifers=0.2,
        ),
        "offices": Materials(
            walls=((0.50, 0.54, 0.58), (0.62, 0.62, 0.60), (0.40, 0.47, 0.55)), leaves=_GREENS[:2],
            road=(0.33, 0.34, 0.36), paving=(0.60, 0.60, 0.60), tile=1.4, height=(14.0, 32.0),
            pitched=0.0, trees=0.25, hedges=0.05,
        ),
        "boulevard": Materials(
            walls=((0.79, 0.72, 0.58), (0.84, 0.78, 0.66), (0.74, 0.68, 0.56)), leaves=_GREENS,
            road=(0.43, 0.42, 0.42), paving=(0.66, 0.62, 0.55), height=(10.0, 20.0), trees=0.95,
        ),
        "estate": Materials(
            walls=((0.66, 0.66, 0.64), (0.58, 0.60, 0.62), (0.70, 0.66, 0.60)), leaves=_GREENS,
            road=(0.50, 0.49, 0.48), paving=(0.52, 0.51, 0.50), height=(9.0, 24.0), attached=False,
            pitched=0.0, ribs=1.2, trees=0.5, hedges=0.3,
        ),
        "village": Materials(
            walls=((0.76, 0.70, 0.60), (0.62, 0.50, 0.40), (0.82, 0.80, 0.76)),
            leaves=(*_GREENS, (0.45, 0.50, 0.20)), road=(0.44, 0.43, 0.42),
            paving=(0.55, 0.53, 0.50), setts=0.35, height=(4.0, 7.5), attached=False, pitched=0.95,
            trees=0.5, hedges=0.5,
        ),
    },
    "val": {
        "adobe": Materials(
            walls=((0.80, 0.62, 0.40), (0.74, 0.54, 0.34), (0.86, 0.72, 0.52)),
            leaves=((0.46, 0.46, 0.26), (0.54, 0.50, 0.30)), road=(0.66, 0.55, 0.40),
            paving=(0.76, 0.64, 0.46), marking=(0.80, 0.72, 0.58), posts=(0.45, 0.33, 0.22),
            cover=((0.80, 0.66, 0.46), 0.55), height=(3.5, 8.0), pitched=0.0, trees=0.25,
            hedges=0.05,
        ),
        "snow": Materials(
            walls=((0.46, 0.18, 0.15), (0.34, 0.28, 0.25), (0.70, 0.68, 0.66)),
            leaves=((0.62, 0.68, 0.68), (0.36, 0.44, 0.42), (0.78, 0.82, 0.84)),
            road=(0.42, 0.43, 0.46), paving=(0.62, 0.63, 0.66), cover=((0.93, 0.95, 0.99), 0.75),
            height=(4.0, 10.0), attached=False, pitched=0.95, conifers=0.7, trees=0.6, hedges=0.3,
        ),
        "harbour": Materials(
            walls=((0.52, 0.24, 0.16), (0.14, 0.40, 0.44), (0.16, 0.24, 0.42), (0.60, 0.44, 0.14)),
            leaves=((0.36, 0.40, 0.28),), road=(0.62, 0.64, 0.66), paving=(0.42, 0.45, 0.48),
            marking=(0.90, 0.74, 0.14), posts=(0.70, 0.62, 0.16), tile=2.6, ribs=0.5,
            height=(6.0, 14.0), attached=False, pitched=0.3, trees=0.08, hedges=0.0,
        ),
        "blossom": Materials(
            walls=((0.94, 0.92, 0.90), (0.90, 0.86, 0.88), (0.80, 0.84, 0.90)),
            leaves=((0.90, 0.62, 0.72), (0.95, 0.82, 0.86), (0.84, 0.50, 0.64)),
            road=(0.55, 0.33, 0.27), paving=(0.70, 0.44, 0.36), posts=(0.85, 0.85, 0.86),
            tile=0.4, setts=0.25, height=(5.0, 12.0), pitched=0.5, trees=0.95, hedges=0.5,
        ),
        "slate": Materials(
            walls=((0.20, 0.21, 0.24), (0.27, 0.27, 0.28), (0.17, 0.20, 0.22)),
            leaves=((0.16, 0.24, 0.20), (0.24, 0.30, 0.16)), road=(0.22, 0.23, 0.25),
            paving=(0.28, 0.30, 0.30), marking=(0.62, 0.62, 0.60), setts=0.5, height=(6.0, 16.0),
            pitched=0.6, trees=0.4, hedges=0.3,
        ),
    },
    "test": {
        "clay": Materials(
            walls=((0.93, 0.91, 0.85), (0.90, 0.86, 0.78), (0.64, 0.72, 0.80)),
            leaves=((0.52, 0.60, 0.14), (0.44, 0.54, 0.12)), road=(0.62, 0.30, 0.18),
            paving=(0.70, 0.38, 0.24), marking=(0.80, 0.60, 0.48), posts=(0.62, 0.60, 0.56),
            cover=((0.66, 0.33, 0.20), 0.4), height=(3.5, 7.0), attached=False, pitched=0.6,
            trees=0.45, hedges=0.3,
        ),
        "autumn": Materials(
            walls=((0.56, 0.52, 0.44), (0.70, 0.64, 0.50), (0.42, 0.40, 0.38)),
            leaves=((0.80, 0.40, 0.08), (0.72, 0.20, 0.10), (0.86, 0.66, 0.12)),
            road=(0.36, 0.33, 0.30), paving=(0.48, 0.42, 0.34), cover=((0.74, 0.42, 0.12), 0.5),
            height=(5.0, 12.0), pitched=0.7, trees=0.95, hedges=0.5,
        ),
        "painted": Materials(
            walls=((0.10, 0.62, 0.62), (0.84, 0.22, 0.46), (0.94, 0.76, 0.14), (0.40, 0.26, 0.66)),
            leaves=((0.12, 0.46, 0.28), (0.20, 0.54, 0.34)), road=(0.48, 0.52, 0.44),
            paving=(0.40, 0.52, 0.54), marking=(0.95, 0.95, 0.95), tile=0.35, ribs=0.8,
            height=(5.0, 15.0), pitched=0.1, trees=0.3,
        ),
        "chalk": Materials(
            walls=((0.95, 0.94, 0.90), (0.88, 0.87, 0.84), (0.96, 0.92, 0.84)),
            leaves=((0.58, 0.62, 0.54), (0.68, 0.70, 0.60)), road=(0.80, 0.78, 0.74),
            paving=(0.90, 0.88, 0.84), marking=(0.60, 0.64, 0.70), posts=(0.90, 0.90, 0.88),
            tile=1.2, setts=0.8, height=(4.0, 11.0), pitched=0.2, trees=0.4, hedges=0.2,
        ),
        "ash": Materials(
            walls=((0.36, 0.34, 0.33), (0.48, 0.44, 0.42), (0.30, 0.27, 0.27)),
            leaves=((0.34, 0.28, 0.22), (0.40, 0.34, 0.28)), road=(0.24, 0.23, 0.23),
            paving=(0.38, 0.37, 0.37), cover=((0.56, 0.54, 0.53), 0.65), ribs=0.3,
            height=(4.0, 13.0), attached=False, pitched=0.4, trees=0.4, hedges=0.1,
        ),
    },
}  # fmt: skip
"""Kinds of districts by split and name."""

WEATHERS: dict[str, dict[str, Weather]] = {
    "train": {
        "noon": Weather(
            (0.27, 0.47, 0.80), (0.70, 0.82, 0.93), (0.62, 0.60, 0.55), (0.58, 0.60, 0.64),
            60.0, 0.35, 0.0012,
        ),
        "afternoon": Weather(
            (0.33, 0.52, 0.80), (0.82, 0.86, 0.88), (0.66, 0.60, 0.48), (0.50, 0.53, 0.58),
            36.0, 0.5, 0.002,
        ),
        "overcast": Weather(
            (0.60, 0.63, 0.67), (0.76, 0.77, 0.79), (0.04, 0.04, 0.04), (0.95, 0.96, 0.98),
            50.0, 0.9, 0.003, 0.02,
        ),
        "golden": Weather(
            (0.42, 0.50, 0.68), (0.97, 0.80, 0.58), (0.72, 0.52, 0.30), (0.42, 0.41, 0.45),
            18.0, 0.4, 0.003, 0.05,
        ),
    },
    "val": {
        "fog": Weather(
            (0.72, 0.74, 0.76), (0.78, 0.79, 0.80), (0.03, 0.03, 0.03), (0.90, 0.91, 0.93),
            40.0, 0.9, 0.035, 0.1,
        ),
        "dust": Weather(
            (0.66, 0.52, 0.34), (0.82, 0.64, 0.40), (0.28, 0.20, 0.10), (0.62, 0.48, 0.32),
            45.0, 0.6, 0.018,
        ),
        "rain": Weather(
            (0.40, 0.44, 0.49), (0.52, 0.56, 0.60), (0.02, 0.02, 0.02), (0.50, 0.53, 0.57),
            40.0, 0.95, 0.009, 0.3, 1.0,
        ),
        "blue_hour": Weather(
            (0.06, 0.10, 0.28), (0.22, 0.26, 0.46), (0.02, 0.02, 0.03), (0.16, 0.19, 0.34),
            10.0, 0.3, 0.004, 0.6,
        ),
    },
    "test": {
        "smog": Weather(
            (0.60, 0.58, 0.42), (0.70, 0.66, 0.46), (0.20, 0.18, 0.10), (0.60, 0.57, 0.42),
            50.0, 0.7, 0.026, 0.1,
        ),
        "sunset": Weather(
            (0.36, 0.22, 0.40), (0.95, 0.42, 0.22), (0.60, 0.22, 0.08), (0.36, 0.24, 0.30),
            9.0, 0.5, 0.005, 0.3,
        ),
        "storm": Weather(
            (0.20, 0.27, 0.26), (0.34, 0.43, 0.38), (0.02, 0.02, 0.02), (0.28, 0.35, 0.32),
            40.0, 0.95, 0.012, 0.4, 0.8,
        ),
        "moon": Weather(
            (0.03, 0.04, 0.06), (0.10, 0.11, 0.13), (0.05, 0.06, 0.08), (0.10, 0.11, 0.13),
            35.0, 0.2, 0.003, 0.5,
        ),
    },
}  # fmt: skip
"""Weathers by split and name."""

TUNNEL_LAMPS: dict[str, tuple[Color, ...]] = {
    "train": ((1.2, 1.15, 1.0),),
    "val": ((1.7, 0.95, 0.22),),  # low-pressure sodium
    "test": ((0.8, 1.35, 1.05), (1.75, 0.8, 0.3)),  # mercury, high-pressure sodium
}
"""Light of a tunnel's lamps relative to daylight of the same brightness."""
