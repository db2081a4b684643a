"""Shaders of flat surfaces, from metres on a surface to colour and mask (see ``renderer.Patch``).

Each ``make_*`` draws a surface's looks once and returns its ``Shader``.
"""

from __future__ import annotations

import numpy as np

from .renderer import Shaded, Shader
from .rng import Draw, cell_hash, noise
from .style import Color, Style, scale

_FRAMES: tuple[Color, ...] = ((0.92, 0.92, 0.90), (0.25, 0.22, 0.20), (0.45, 0.32, 0.22))
_SHOP_COLORS: tuple[Color, ...] = (
    (0.70, 0.15, 0.13), (0.12, 0.30, 0.55), (0.12, 0.42, 0.25), (0.85, 0.65, 0.15),
    (0.20, 0.20, 0.22), (0.88, 0.88, 0.86), (0.55, 0.20, 0.45), (0.90, 0.45, 0.12),
)  # fmt: skip


def rgb(color: Color) -> np.ndarray:
    """Returns a colour as float32, so that numpy 1 and 2 agree on the type of its products."""
    return np.array(color, dtype=np.float32)


def plain(color: Color) -> Shader:
    """Returns a shader of one colour."""
    return lambda x, y, depth: (color, None)


def make_wall(
    d: Draw, style: Style, height: float, pitched: float = 0.0, width: float = 0.0
) -> Shader:
    """Makes a facade ``height`` metres high, with a gable of height ``pitched`` and this width."""
    base = rgb(d.jitter(d.choice(style.palette), 0.12))
    salt = d.integer(1 << 30)
    floor = d.uniform(2.7, 3.8)
    spacing = d.uniform(1.6, 4.2)
    window_width = d.uniform(0.32, 0.62)
    window_height = d.uniform(0.38, 0.62)
    if d.chance(0.2):  # ribbons or a curtain wall
        window_width, window_height = d.uniform(0.85, 1.1), d.uniform(0.5, 0.85)
    frame = rgb(d.choice(_FRAMES))
    glass = rgb(scale(style.zenith, d.uniform(0.1, 0.4), 0.12))
    brick = d.chance(0.45)
    bands = d.chance(0.4)
    blank = d.chance(0.06)
    shop = rgb(d.jitter(d.choice(_SHOP_COLORS), 0.15)) if d.chance(0.5) and height > 5 else None
    shop_pane = d.uniform(1.8, 4.0)
    contrast = d.uniform(0.12, 0.35)
    lit = style.lit_windows
    warm = rgb((1.35, 1.12, 0.70))

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        tone = (1.0 - 0.5 * contrast) + contrast * noise(x, y, 9.0, salt)
        if brick:
            course = np.floor(y * 4.0)
            shift = 0.5 * (course - 2.0 * np.floor(course * 0.5))
            stone = cell_hash(np.floor(x * 2.0 + shift), course, salt)
            fade = np.minimum(12.0 / depth, 1.0)  # bricks smaller than a pixel would alias
            joint = (y * 4.0 - course) < 0.2
            tone = tone * (1.0 + fade * (0.25 * (stone - 0.5) - 0.18 * joint))
        if bands:
            tone = np.where(y - np.floor(y / floor) * floor < 0.3, tone * 1.14, tone)
        if style.ribs > 0:
            rib = x / style.ribs - np.floor(x / style.ribs)
            tone = tone * (1.0 + np.minimum(10.0 / depth, 1.0) * (0.5 * np.abs(rib - 0.5) - 0.2))
        color = base * tone[:, None]
        column, storey = np.floor(x / spacing), np.floor(y / floor)
        across = np.abs(x / spacing - column - 0.5)
        up = np.abs(y / floor - storey - 0.55)
        inside = (y < height - 0.6) & ((storey > 0) | (shop is None)) & (not blank)
        border = inside & (across < 0.5 * window_width + 0.05) & (up < 0.5 * window_height + 0.05)
        pane = inside & (across < 0.5 * window_width) & (up < 0.5 * window_height)
        color[border] = frame
        if pane.any():
            what = cell_hash(column[pane], storey[pane], salt + 1)
            level = 0.6 + 0.8 * what + 0.35 * up[pane] / window_height
            window = glass * level[:, None]
            curtain = (what > 0.7) & (across[pane] > 0.12)
            window[curtain] = frame * 0.75
            window[what < lit] = warm
            color[pane] = window
        if shop is not None:
            ground = y < floor
            offset = np.abs(x / shop_pane - np.floor(x / shop_pane) - 0.5)
            color[ground] = shop * 0.8
            color[ground & (offset < 0.42) & (y > 0.4) & (y < floor - 1.0)] = glass * 1.1
            color[ground & (y > floor - 0.75)] = shop
        color[y > height - 0.35] *= 1.12
        if pitched <= 0:
            return color, None
        rise = 1.0 - np.abs(2.0 * x / width - 1.0)
        return color, y < height + pitched * rise

    return shade


def make_roof(d: Draw, style: Style) -> Shader:
    """Makes rows of tiles, below what covers the place."""
    base = rgb(
        d.jitter(d.choice(((0.50, 0.24, 0.17), (0.33, 0.31, 0.31), (0.42, 0.33, 0.27))), 0.2)
    )
    salt = d.integer(1 << 30)
    if style.cover > 0:
        base = base + (rgb(style.cover_color) - base) * np.float32(min(style.cover, 1.0))

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        row = np.floor(y * 2.5)
        tone = (
            0.82 + 0.16 * (y * 2.5 - row) + 0.22 * (cell_hash(np.floor(x * 3.0), row, salt) - 0.5)
        )
        return base * tone[:, None], None

    return shade


def make_leaves(color: Color, salt: int, scale: float = 24.0) -> Shader:
    """Makes a hedge's leaves with a ragged top edge at y = 1."""
    base = rgb(color)

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        tone = 0.45 + 0.6 * noise(x, y, scale, salt) + 0.5 * noise(x, y, 8.0 * scale, salt + 77)
        keep = y < 0.8 + 0.35 * noise(x, 0.0 * x, 2.0 * scale, salt)
        return base * tone[:, None], keep

    return shade


def make_treeline(color: Color, salt: int, height: float) -> Shader:
    """Makes trees far behind the street, as one ragged wall."""
    base = rgb(color)

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        tone = 0.45 + 0.4 * noise(x, y, 14.0, salt) + 0.25 * noise(x, y, 60.0, salt + 9)
        keep = y < height * (0.55 + 0.45 * noise(x, 0.0 * x, 7.0, salt))
        return base * tone[:, None], keep

    return shade


def make_crown(color: Color, salt: int, width: float, height: float, conifer: bool) -> Shader:
    """Makes the crown of a tree or a bush on a billboard of this size; noise cuts its outline."""
    base = rgb(color)

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        across, up = 2.0 * x / width - 1.0, y / height
        lumps = noise(x, y, 22.0, salt)
        fine = noise(x, y, 110.0, salt + 1234)
        if conifer:
            layer = up * 5.0 - np.floor(up * 5.0)
            radius = np.abs(across) / np.maximum(1.04 - up + 0.12 * (0.5 - layer), 1e-3)
            keep = radius + 0.5 * (fine - 0.5) < 0.95
            tone = 0.55 + 0.65 * fine + 0.30 * (1.0 - layer)
        else:
            radius = across * across + (2.0 * up - 1.0) * (2.0 * up - 1.0)
            keep = radius + 0.9 * (lumps - 0.5) + 0.5 * (fine - 0.5) < 0.78
            keep &= fine + 0.25 * radius < 1.0  # holes, more of them at the rim
            grain = noise(x, y, 330.0, salt + 99)
            tone = 0.35 + 0.50 * lumps + 0.35 * fine + 0.35 * grain + 0.30 * (up - 0.5)
        return base * tone[:, None], keep

    return shade


def make_bark(color: Color, width: float) -> Shader:
    """Makes a round trunk or post, which is darker at the edges."""
    base = rgb(color)

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        across = 2.0 * x / width - 1.0
        tone = 1.1 - 0.45 * across * across
        return base * tone[:, None], None

    return shade


def make_sign(d: Draw, size: float) -> tuple[Shader, float]:
    """Makes a traffic sign of ``size`` metres; returns its shader and the height of its board."""
    red, white, blue = rgb((0.78, 0.10, 0.12)), rgb((0.93, 0.93, 0.92)), rgb((0.10, 0.28, 0.68))
    yellow, black, green = rgb((0.95, 0.76, 0.10)), rgb((0.10, 0.10, 0.10)), rgb((0.05, 0.42, 0.25))
    kind = d.choice(("limit", "order", "warning", "priority", "stop", "plate", "plate", "no_entry"))
    plate = d.choice((blue, green, white, blue))
    height = size * d.uniform(0.5, 1.3) if kind == "plate" else size
    salt = d.integer(1 << 30)

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        across, up = 2.0 * x / size - 1.0, 2.0 * y / height - 1.0
        radius = across * across + up * up
        glyph = cell_hash(np.floor(across * 3.5), np.floor(up * 2.5), salt) > 0.5
        centre = (np.abs(across) < 0.45) & (np.abs(up) < 0.4)
        color = np.empty((x.size, 3), dtype=np.float32)
        if kind == "plate":
            color[:] = plate
            ink = black if plate is white else white
            color[(np.abs(across) < 0.8) & (np.abs(up) < 0.7) & glyph] = ink
            color[(np.abs(across) > 0.92) | (np.abs(up) > 0.9)] = ink
            return color, None
        if kind == "warning":
            edge = 1.0 - np.abs(across) - 0.5 * (up + 1.0)
            color[:] = white
            color[edge < 0.22] = red
            color[up < -0.72] = red
            color[centre & glyph & (edge > 0.3)] = black
            return color, edge > 0
        if kind == "priority":
            edge = 1.0 - np.abs(across) - np.abs(up)
            color[:] = yellow
            color[edge < 0.2] = white
            return color, edge > 0
        if kind == "stop":
            keep = (np.abs(across) + np.abs(up) < 1.35) & (radius < 1.3)
            color[:] = red
            color[(np.abs(up) < 0.25) & (np.abs(across) < 0.75)] = white
            return color, keep
        if kind == "no_entry":
            color[:] = red
            color[(np.abs(up) < 0.2) & (np.abs(across) < 0.7)] = white
        elif kind == "order":
            color[:] = blue
            color[centre & glyph] = white
        else:
            color[:] = white
            color[radius > 0.58] = red
            color[centre & glyph] = black
        return color, radius < 1.0

    return shade, height


def make_blob(strength: float = 1.0) -> Shader:
    """Makes a shadow in patch coordinates [0, 1]^2: an ellipse with a ragged rim."""

    def shade(x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> Shaded:
        across, along = 2.0 * x - 1.0, 2.0 * y - 1.0
        rim = strength * (noise(x, y, 160.0) - 0.5)
        return (0.0, 0.0, 0.0), across * across + along * along + rim < 1.0

    return shade
