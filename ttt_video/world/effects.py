"""Effects of corruptions on pixels: noise, light, colour, weather and dirt.

Every effect is a function ``effect(pixels, severity, frame)`` of pixels, (H, W, 3) float32 in
[0, 1], a severity in (0, 5] and a ``FrameContext``. It returns new pixels, which may be out of
range, and approaches the identity as the severity approaches 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError

_FOG_ENDS = 400.0  # metres


@dataclass(frozen=True)
class FrameContext:
    """The inputs of an effect besides pixels and severity.

    Attributes:
        noise: a generator that is new in every frame.
        constant: a generator that is the same in all frames of a video.
        index: position in the video.
        depth: (H, W) float, metres, inf allowed; or None.
    """

    noise: np.random.Generator
    constant: np.random.Generator
    index: int
    depth: np.ndarray | None

    def known_depth(self, effect: str) -> np.ndarray:
        """Returns the depth, (H, W) float32; raises UserError if there is none."""
        if self.depth is None:
            raise UserError(f"{effect} needs the depth of every pixel; choose another corruption")
        return self.depth.astype(np.float32)


Effect = Callable[[np.ndarray, float, FrameContext], np.ndarray]


def level(severity: float, levels: Sequence[float]) -> float:
    """Interpolates ``levels``, the magnitudes at severities 0, 1, ..., 5."""
    return float(np.interp(severity, range(len(levels)), levels))


def gaussian_noise(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Adds noise of one strength everywhere, like an amplifier."""
    sigma = level(severity, (0.0, 0.08, 0.12, 0.18, 0.26, 0.38))
    return pixels + sigma * frame.noise.standard_normal(pixels.shape, dtype=np.float32)


def shot_noise(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Counts photons."""
    # The limit at the start of a ramp is what the generator can count.
    photons = 1.0 / max(level(severity, (0.0, 1 / 60, 1 / 25, 1 / 12, 1 / 5, 1 / 3)), 1e-9)
    return frame.noise.poisson(pixels * photons).astype(np.float32) / photons


def impulse_noise(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Adds salt and pepper to each channel by itself."""
    amount = level(severity, (0.0, 0.03, 0.06, 0.09, 0.17, 0.27))
    draw = frame.noise.random(pixels.shape, dtype=np.float32)
    pixels = np.where(draw < 0.5 * amount, np.float32(0.0), pixels)
    return np.where(draw > 1.0 - 0.5 * amount, np.float32(1.0), pixels)


def darkness(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Takes light from a sensor: the signal falls, but photon and read noise stay."""
    light = level(severity, (1.0, 0.6, 0.4, 0.26, 0.17, 0.10))
    noise = level(severity, (0.0, 0.004, 0.008, 0.012, 0.018, 0.026))
    dark = light * pixels
    sigma = noise * np.sqrt(1.0 + 6.0 * dark)
    return dark + sigma * frame.noise.standard_normal(pixels.shape, dtype=np.float32)


def fog(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Mixes scene and airlight by depth (Koschmieder's law)."""
    extinction = level(severity, (0.0, 0.010, 0.020, 0.035, 0.060, 0.100))  # 1/m
    airlight = frame.constant.uniform(0.68, 0.88) + frame.constant.uniform(-0.03, 0.03, size=3)
    # Without an end of the fog, the infinitely far sky would vanish at the first trace of it.
    depth = np.minimum(frame.known_depth("fog"), _FOG_ENDS)
    clear = np.exp(-extinction * depth)[..., None]
    return pixels * clear + airlight.astype(np.float32) * (1.0 - clear)


def colour_shift(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Shifts the white balance in a direction that the video's seed chooses."""
    direction = frame.constant.standard_normal(3)
    return _cast_colour(pixels, severity, direction - direction.mean())


def _cast_colour(pixels: np.ndarray, severity: float, direction: np.ndarray) -> np.ndarray:
    """Scales the channels by gains along a direction of log gains, (3,)."""
    strength = level(severity, (0.0, 0.12, 0.25, 0.4, 0.55, 0.75))
    gains = np.exp(strength * (direction / np.abs(direction).max()))
    return pixels * gains.astype(np.float32)


def low_contrast(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Moves every colour towards the picture's mean."""
    contrast = level(severity, (1.0, 0.4, 0.3, 0.2, 0.1, 0.05))
    mean = pixels.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    return (pixels - mean) * contrast + mean


def exposure_drift(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Moves the exposure up and down by up to 2 EV in 6 to 15 seconds."""
    stops = level(severity, (0.0, 0.4, 0.8, 1.2, 1.6, 2.0))
    return pixels * np.float32(2.0 ** (stops * math.sin(_turn(frame))))


def white_balance_drift(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Casts a colour as strong as ``colour_shift``, whose hue goes round in 6 to 15 seconds."""
    angle = _turn(frame)
    first = np.array([1.0, -0.5, -0.5])
    second = np.array([0.0, 1.0, -1.0]) * math.sqrt(0.75)
    return _cast_colour(pixels, severity, math.cos(angle) * first + math.sin(angle) * second)


def _turn(frame: FrameContext) -> float:
    """Returns an angle that grows with time; the video's seed decides start and speed."""
    period, phase = frame.constant.uniform(60.0, 150.0), frame.constant.random()
    return 2.0 * math.pi * (frame.index / period + phase)


def night(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Leaves little bluish light, with warm headlights that fade with distance and sensor noise."""
    depth = frame.known_depth("night")
    ambient = level(severity, (1.0, 0.5, 0.32, 0.2, 0.12, 0.07))
    night_tint = level(severity, (0.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    blue = 1.0 + night_tint * (np.array([0.8, 0.95, 1.25], dtype=np.float32) - 1.0)
    height, width = depth.shape
    x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :]
    y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None]
    cone = np.exp(-(x * x) / 0.5) / (1.0 + np.exp(-(y + 0.05) / 0.08))  # below the horizon
    reach = np.where(np.isfinite(depth), 1.0 / (1.0 + (depth / 14.0) ** 2), 0.0)
    headlights = (1.4 * (1.0 - ambient) * cone * reach)[..., None]
    warm = np.array([1.0, 0.9, 0.72], dtype=np.float32)
    dark = pixels * (ambient * blue + headlights * warm)
    sigma = level(severity, (0.0, 0.006, 0.010, 0.015, 0.022, 0.030))
    return dark + sigma * frame.noise.standard_normal(pixels.shape, dtype=np.float32)


def rain(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Draws streaks that the wind of the video slants, and a grey veil that grows with depth."""
    depth = frame.known_depth("rain")
    height, width = depth.shape
    density = level(severity, (0.0, 12.0, 24.0, 40.0, 60.0, 90.0))  # drops per 100 x 100 pixels
    slant = frame.constant.uniform(-0.35, 0.35)
    # As many numbers as the heaviest rain needs, so that more rain only adds drops.
    near, x, y = frame.noise.random((3, round(90.0e-4 * height * width)), dtype=np.float32)
    drops = int(density * 1e-4 * height * width)
    near, x, y = near[:drops], x[:drops] * width, (1.15 * y[:drops] - 0.15) * height
    length = (0.03 + 0.10 * near * near) * height
    streaks = np.zeros((height, width), dtype=np.float32)
    for step in range(math.ceil(0.13 * height)):
        columns, rows = (x + slant * step).astype(int), (y + step).astype(int)
        seen = (step < length) & (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        opacity = 0.2 + 0.35 * near[seen]
        np.maximum.at(streaks, (rows[seen], columns[seen]), opacity)
    thickness = level(severity, (0.0, 0.002, 0.004, 0.007, 0.011, 0.016))  # 1/m
    clear = np.exp(-thickness * np.minimum(depth, _FOG_ENDS))[..., None]
    wet = (pixels * clear + np.float32(0.62) * (1.0 - clear)) * np.float32(1.0 - 0.05 * severity)
    return wet + (np.float32(0.85) - wet) * streaks[..., None]


def lens_dirt(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Puts blots of mud on the lens, out of focus and fixed; their number grows with severity."""
    height, width = pixels.shape[:2]
    count = level(severity, (0.0, 6.0, 12.0, 20.0, 30.0, 42.0))
    x = (np.arange(width, dtype=np.float32) + 0.5)[None, :]
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None]
    draws = frame.constant.random((42, 4))
    mud = np.array([0.30, 0.25, 0.19], dtype=np.float32) * np.float32(0.6 + frame.constant.random())
    left = np.ones((height, width), dtype=np.float32)
    for blot in range(math.ceil(count)):
        along, down, size, strength = draws[blot].tolist()
        radius = (0.03 + 0.11 * size * size) * height * 2.0
        distance = np.hypot(x - along * width, y - down * height) / radius
        soft = np.clip(1.6 - 1.6 * distance, 0.0, 1.0)
        left *= 1.0 - min(count - blot, 1.0) * (0.6 + 0.38 * strength) * soft * soft * (
            3 - 2 * soft
        )
    return pixels * left[..., None] + mud * (1.0 - left[..., None])


def veiling_glare(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Spreads light of a low sun over the picture, most from the side that the seed chooses."""
    strength = level(severity, (0.0, 0.30, 0.45, 0.60, 0.72, 0.82))
    height, width = pixels.shape[:2]
    angle = frame.constant.uniform(0.15, 0.85) * math.pi
    x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :]
    y = np.linspace(1.0, -1.0, height, dtype=np.float32)[:, None]
    along = 0.5 + 0.5 * (math.cos(angle) * x + math.sin(angle) * y) / math.sqrt(2.0)
    veil = (np.float32(strength) * (0.4 + 0.6 * along))[..., None]
    return pixels * (1.0 - veil) + veil * np.array([1.0, 0.97, 0.90], dtype=np.float32)


def colour_matrix(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Mixes the channels, as another camera's colour filters do; the video's seed decides how."""
    strength = level(severity, (0.0, 0.10, 0.18, 0.28, 0.40, 0.55))
    mixing = frame.constant.standard_normal((3, 3))
    mixing *= strength / np.abs(mixing).sum(1, keepdims=True)
    return pixels @ (np.eye(3) + mixing).T.astype(np.float32)


def sensor_lines(pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    """Adds an offset to each column, which stays, and to each row, which is new in every frame."""
    sigma = level(severity, (0.0, 0.03, 0.05, 0.08, 0.12, 0.17))
    height, width = pixels.shape[:2]
    columns = frame.constant.standard_normal((1, width, 1), dtype=np.float32)
    rows = frame.noise.standard_normal((height, 1, 1), dtype=np.float32)
    return pixels + np.float32(sigma / math.sqrt(2.0)) * (columns + rows)


EFFECTS: tuple[Effect, ...] = (
    gaussian_noise, shot_noise, impulse_noise, darkness, fog, colour_shift, low_contrast, night,
    rain, lens_dirt, exposure_drift, white_balance_drift,
)  # fmt: skip

LATER_EFFECTS: tuple[Effect, ...] = (veiling_glare, colour_matrix, sensor_lines)
"""Effects that came after those of the library."""
