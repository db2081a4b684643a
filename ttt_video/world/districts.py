"""A street through districts: its materials, weather and light change and rarely come back.

A kind of district, and a weather, belongs to one split and occurs in no other, so that a model that
was trained on the worlds of one split has not seen what those of another show.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .materials import DISTRICTS, TUNNEL_LAMPS, WEATHERS, Materials, Weather
from .rng import Draw, noise, wave
from .style import Route, Style, meter, multiply, scale

DISTRICTS_VERSION = 1
"""Raised when a seed gives other bytes than before; part of the names of cache folders."""

_DISTRICT_SECONDS = (9.0, 17.0)  # of the drive at its mean speed
_TUNNEL_SECONDS = (4.0, 7.0)
_TUNNEL_CHANCE = 0.3
_WEATHER_SECONDS = (10.0, 18.0)
_HOLD = 0.5  # share of the time that a weather stays; in the rest it turns into the next one
_METER_SECONDS = (1.0, 3.0)  # that automatic exposure is late
_BLOTS = 48
_BLOTS_PER_SECOND = (0.08, 0.3)
_VEIL_PER_SECOND = 0.0012


def split_of(seed: int) -> str:
    """Returns the split whose districts a world has: "train", "val" or "test" (from 2000 on)."""
    return "train" if seed < 1000 else "val" if seed < 2000 else "test"


@dataclass(frozen=True)
class Districts(Route):
    """Districts of ``stretch`` metres each from ``start`` on; some begin with a tunnel.

    All kinds of the split come once in an order that the seed shuffles, then again in another one.
    A kind that comes back has other shades of its materials.

    Attributes:
        seed: of the world.
        tunnel: metres of a tunnel.
    """

    seed: int = 0
    tunnel: float = 0.0

    def index(self, z: float) -> int:
        """Returns the number of the district at z."""
        return math.floor((z - self.start) / self.stretch)

    def kind(self, index: int) -> str:
        """Returns the name of a district's kind, a key of ``DISTRICTS`` of the world's split."""
        return _dealt(tuple(DISTRICTS[split_of(self.seed)]), index, self.seed, 50)

    def at(self, z: float) -> str:
        """Returns "tunnel" or "street"."""
        return "tunnel" if any(a <= z < b for a, b in self.tunnels(z, z)) else "street"

    def tunnels(self, low: float, high: float) -> list[tuple[float, float]]:
        """Returns start and end of the tunnels that reach into [low, high]."""
        found = []
        for k in range(self.index(low), self.index(high) + 1):
            if Draw(self.seed, 52, k).chance(_TUNNEL_CHANCE):
                z = self.start + k * self.stretch
                found.append((z, z + self.tunnel))
        return [(a, b) for a, b in found if b >= low]

    def stretches(self, low: float, high: float) -> list[tuple[float, float]]:
        """Returns start and end of the districts that reach into [low, high]."""
        return [
            (self.start + k * self.stretch, self.start + (k + 1) * self.stretch)
            for k in range(self.index(low), self.index(high) + 1)
        ]

    def local(self, style: Style, z: float) -> Style:
        """Returns the style with the materials of the district at z."""
        index = self.index(z)
        return dataclasses.replace(style, **_materials(self.seed, index, self.kind(index)))

    def moment(self, style: Style, time: float) -> Style:
        """Returns the style with the light, the weather and the camera's state at a time."""
        d = Draw(self.seed, 53)
        late = d.uniform(*_METER_SECONDS)
        gain = d.uniform(0.9, 1.15) * (1.0 + 0.04 * wave(time / d.uniform(5.0, 12.0)))
        rate = d.uniform(*_BLOTS_PER_SECOND)
        now, before = self._weather(time), self._weather(time - late)
        light = _light(now, d.uniform(-math.pi, math.pi))
        seen = _light(before, 0.0)
        exposure = gain * meter(seen["sun"], seen["ambient"], seen["to_sun"])
        return dataclasses.replace(
            style,
            **light,
            exposure=exposure,
            blots=rate * time,
            veil=_VEIL_PER_SECOND * time,
            glare=scale(now.ambient, 0.5 * exposure),
            tunnel_lamps=_dealt(TUNNEL_LAMPS[split_of(self.seed)], 0, self.seed, 54),
        )

    def _weather(self, time: float) -> Weather:
        """Returns the weather at a time: it stays for a while, then turns into the next one."""
        d = Draw(self.seed, 55)
        span = d.uniform(*_WEATHER_SECONDS)
        position = time / span + d.random()
        index = math.floor(position)
        part = max(position - index - _HOLD, 0.0) / (1.0 - _HOLD)
        kinds = tuple(WEATHERS[split_of(self.seed)].items())
        a, b = (_dealt(kinds, index + k, self.seed, 56)[1] for k in (0, 1))
        return Weather(*(_between(x, y, part) for x, y in zip(_values(a), _values(b), strict=True)))


def districts_of(style: Style, start: float) -> Districts:
    """Returns the districts of a world whose camera starts at ``start`` metres."""
    d = Draw(style.seed, 57)
    stretch = style.speed * d.uniform(*_DISTRICT_SECONDS)
    tunnel = style.speed * d.uniform(*_TUNNEL_SECONDS)
    return Districts(
        start=start - stretch * d.random(), stretch=stretch, seed=style.seed, tunnel=tunnel
    )


def _dealt(cards: tuple[Any, ...], index: int, seed: int, key: int) -> Any:
    """Returns card ``index`` of decks that are shuffled one after another.

    The last card of a deck is not the first of the next.
    """
    deck, place = divmod(index, len(cards))
    return cards[_shuffled(len(cards), deck, seed, key)[place]]


@functools.lru_cache(maxsize=256)
def _shuffled(count: int, deck: int, seed: int, key: int) -> tuple[int, ...]:
    d = Draw(seed, key, deck)
    order = sorted(range(count), key=lambda _: d.random())
    before = Draw(seed, key, deck - 1)
    last = sorted(range(count), key=lambda _: before.random())[-1]
    if order[0] == last and count > 1:
        order[0], order[1] = order[1], order[0]
    return tuple(order)


@functools.lru_cache(maxsize=64)
def _materials(seed: int, index: int, kind: str) -> dict[str, Any]:
    """Returns the fields of ``Style`` that a district sets; each district has its own shades."""
    m: Materials = DISTRICTS[split_of(seed)][kind]
    d = Draw(seed, 51, index)
    trees = m.trees * d.uniform(0.7, 1.2)
    cover_color, cover = m.cover
    return {
        "palette": tuple(d.jitter(color, 0.1) for color in m.walls),
        "leaves": tuple(d.jitter(color, 0.1) for color in m.leaves),
        "asphalt": d.jitter(m.road, 0.1),
        "paving": d.jitter(m.paving, 0.1),
        "paving_tile": m.tile * d.uniform(0.8, 1.25),
        "marking": d.jitter(m.marking, 0.05),
        "center_line": d.jitter(m.marking, 0.05),
        "setts": m.setts * d.uniform(0.8, 1.25),
        "ribs": m.ribs * d.uniform(0.8, 1.25),
        "cover_color": d.jitter(cover_color, 0.05),
        "cover": cover * d.uniform(0.85, 1.1),
        "building_height": m.height,
        "building_chance": (m.built, m.built),
        "attached": m.attached,
        "pitched_roofs": m.pitched,
        "conifers": m.conifers,
        "tree_chance": (trees, trees),
        "hedge_chance": m.hedges,
        "lamp_color": d.jitter(m.posts, 0.15),
    }


def _light(weather: Weather, azimuth: float) -> dict[str, Any]:
    """Returns the fields of ``Style`` that a weather sets."""
    elevation = math.radians(weather.elevation)
    flat = math.cos(elevation)
    to_sun = (flat * math.sin(azimuth), math.sin(elevation), flat * math.cos(azimuth))
    return {
        "zenith": weather.zenith,
        "horizon": weather.horizon,
        "sun": weather.sun,
        "ambient": weather.ambient,
        "to_sun": to_sun,
        "clouds": weather.clouds,
        "lit_windows": weather.lit,
        "haze": weather.haze,
        "wet": weather.wet,
    }


def _values(weather: Weather) -> tuple[Any, ...]:
    return tuple(getattr(weather, field.name) for field in dataclasses.fields(weather))


def _between(a: Any, b: Any, part: float) -> Any:
    """Returns a number or colour between two, ``part`` of the way from a to b."""
    if isinstance(a, tuple):
        return tuple((1.0 - part) * x + part * y for x, y in zip(a, b, strict=True))
    return (1.0 - part) * a + part * b


def paint_ground(
    color: np.ndarray, style: Style, road: np.ndarray, x: np.ndarray, z: np.ndarray,
    depth: np.ndarray, salt: int,
) -> None:  # fmt: skip
    """Adds what a district has on its ground: setts instead of asphalt, sand, snow or leaves.

    Args:
        color: (N, 3) float32, changed in place.
        style: of the district.
        road: (N,) bool, else sidewalk.
        x: (N,) float32, metres from the middle of the road.
        z, depth: (N,) float32, metres along the street and from the camera.
        salt: of the world's noise.
    """
    if style.setts > 0:
        row = np.floor(z / style.setts)
        shift = 0.5 * (row - 2.0 * np.floor(0.5 * row))
        column = x / style.setts + shift
        joint = (column - np.floor(column) < 0.16) | (z / style.setts - row < 0.16)
        stone = noise(np.floor(column), row, 37.0, salt + 11) - 0.5
        tone = 1.0 + np.minimum(9.0 / depth, 1.0) * (0.5 * stone - 0.35 * joint)
        color[road] *= tone[road][:, None]
    if style.cover > 0:
        lumps = 0.7 * noise(x, z, 5.0, salt + 21) + 0.3 * noise(x, z, 40.0, salt + 23)
        track = np.abs(np.abs(np.abs(x) - style.ego_lane) - 0.8) < 0.28
        share = np.minimum(np.maximum((lumps - 1.0 + style.cover) * 5.0, 0.0), 1.0)
        share *= np.where(track & road, np.float32(0.35), np.float32(0.92))
        lies = np.array(style.cover_color, dtype=np.float32) * (0.85 + 0.3 * lumps)[:, None]
        color += (lies - color) * share[:, None]


def paint_water(color: np.ndarray, style: Style, road: np.ndarray, depth: np.ndarray) -> None:
    """Wets the lit ground: it is darker, and the road mirrors the horizon in the distance."""
    if style.wet > 0:
        mirror = np.where(road, np.float32(0.5), np.float32(0.2)) * (style.wet * depth)
        mirror = (mirror / (depth + 14.0))[:, None]
        color *= np.float32(1.0 - 0.4 * style.wet)
        color += (np.array(style.horizon, dtype=np.float32) * 0.8 - color) * mirror


def dirty(color: np.ndarray, style: Style) -> np.ndarray:
    """Returns the picture, (H, W, 3) float32, through a lens with ``blots`` and a ``veil``."""
    if style.blots <= 0:
        return color
    height, width = color.shape[:2]
    whole = min(math.floor(style.blots), _BLOTS)
    left = _clear_lens(style.seed, height, width, whole)
    if whole < _BLOTS:
        coming = _clear_lens(style.seed, height, width, whole + 1)
        left = left + (coming - left) * np.float32(style.blots - whole)
    veil = min(style.veil, 0.25)
    stray = np.array(style.glare, dtype=np.float32)
    mud = np.array(multiply(style.glare, (0.75, 0.62, 0.48)), dtype=np.float32)
    color = color * np.float32(1.0 - veil) + stray * np.float32(veil)
    return color * left[..., None] + mud * (1.0 - left)[..., None]


@functools.lru_cache(maxsize=8)
def _clear_lens(seed: int, height: int, width: int, blots: int) -> np.ndarray:
    """Returns the share of light that the first ``blots`` let through, (H, W) float32."""
    if blots == 0:
        return np.ones((height, width), dtype=np.float32)
    left = _clear_lens(seed, height, width, blots - 1).copy()
    d = Draw(seed, 58, blots)
    x, y = d.random() * width, d.random() * height
    radius = (0.02 + 0.07 * d.random() * d.random()) * width
    strength = d.uniform(0.3, 0.85)
    across = ((np.arange(width) + 0.5 - x) / radius).astype(np.float32)
    down = ((np.arange(height) + 0.5 - y) / radius).astype(np.float32)
    inside = 1.0 - (across * across)[None, :] - (down * down)[:, None]
    soft = np.minimum(np.maximum(1.6 * inside, 0.0), 1.0)
    left *= 1.0 - np.float32(strength) * soft
    left.setflags(write=False)
    return left
