"""Shifts of the input: pure functions of image, severity, seed and frame.

Severities 1 to 5 of noise and contrast are those of ImageNet-C (Hendrycks and Dietterich, 2019,
the settings for full-size images), interpolated in between, so that a severity can ramp. Darkness,
fog and colour shift are camera models of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ttt_video.errors import UserError

MAX_SEVERITY = 5.0
_FOG_ENDS = 400.0  # metres


def _level(severity: float, levels: Sequence[float]) -> float:
    """The magnitude at a severity; ``levels`` holds those of severities 0, 1, ..., 5."""
    return float(np.interp(severity, range(len(levels)), levels))


@dataclass(frozen=True)
class _Frame:
    """What a corruption draws on besides the pixels."""

    noise: np.random.Generator  # new in every frame
    constant: np.random.Generator  # the same in all frames of a video
    depth: np.ndarray | None  # (H, W), metres


# Each takes pixels, (H, W, 3) float32 in [0, 1], and a severity in (0, 5], and returns pixels.


def _gaussian_noise(pixels: np.ndarray, severity: float, frame: _Frame) -> np.ndarray:
    sigma = _level(severity, (0.0, 0.08, 0.12, 0.18, 0.26, 0.38))
    return pixels + sigma * frame.noise.standard_normal(pixels.shape, dtype=np.float32)


def _shot_noise(pixels: np.ndarray, severity: float, frame: _Frame) -> np.ndarray:
    # at the start of a ramp there are as many photons as the generator can count
    photons = 1.0 / max(_level(severity, (0.0, 1 / 60, 1 / 25, 1 / 12, 1 / 5, 1 / 3)), 1e-9)
    return frame.noise.poisson(pixels * photons).astype(np.float32) / photons


def _impulse_noise(pixels: np.ndarray, severity: float, frame: _Frame) -> np.ndarray:
    amount = _level(severity, (0.0, 0.03, 0.06, 0.09, 0.17, 0.27))
    draw = frame.noise.random(pixels.shape, dtype=np.float32)
    pixels = np.where(draw < 0.5 * amount, np.float32(0.0), pixels)
    return np.where(draw > 1.0 - 0.5 * amount, np.float32(1.0), pixels)


def _darkness(pixels: np.ndarray, severity: float, frame: _Frame) -> np.ndarray:
    """Less light on a sensor: the signal falls, photon and read noise stay behind."""
    light = _level(severity, (1.0, 0.6, 0.4, 0.26, 0.17, 0.10))
    noise = _level(severity, (0.0, 0.004, 0.008, 0.012, 0.018, 0.026))
    dark = light * pixels
    sigma = noise * np.sqrt(1.0 + 6.0 * dark)
    return dark + sigma * frame.noise.standard_normal(pixels.shape, dtype=np.float32)


def _fog(pixels: np.ndarray, severity: float, frame: _Frame) -> np.ndarray:
    """Koschmieder's law: what the air lets through of the scene, and its own light."""
    if frame.depth is None:
        raise UserError("fog needs the depth of every pixel; choose another corruption")
    extinction = _level(severity, (0.0, 0.010, 0.020, 0.035, 0.060, 0.100))  # 1/m
    airlight = frame.constant.uniform(0.68, 0.88) + frame.constant.uniform(-0.03, 0.03, size=3)
    # fog ends somewhere: an infinitely far sky would be gone at the first trace of it
    depth = np.minimum(frame.depth.astype(np.float32), _FOG_ENDS)
    clear = np.exp(-extinction * depth)[..., None]
    return pixels * clear + airlight.astype(np.float32) * (1.0 - clear)


def _colour_shift(pixels: np.ndarray, severity: float, frame: _Frame) -> np.ndarray:
    """A wrong white balance: gains per channel in a direction that the video's seed chooses."""
    direction = frame.constant.standard_normal(3)
    direction -= direction.mean()
    direction /= np.abs(direction).max()
    strength = _level(severity, (0.0, 0.12, 0.25, 0.4, 0.55, 0.75))
    return pixels * np.exp(strength * direction).astype(np.float32)


def _low_contrast(pixels: np.ndarray, severity: float, frame: _Frame) -> np.ndarray:
    contrast = _level(severity, (1.0, 0.4, 0.3, 0.2, 0.1, 0.05))
    mean = pixels.mean(axis=(0, 1), keepdims=True, dtype=np.float64).astype(np.float32)
    return (pixels - mean) * contrast + mean


_CORRUPTIONS: dict[str, Callable[[np.ndarray, float, _Frame], np.ndarray]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "darkness": _darkness,
    "fog": _fog,
    "colour_shift": _colour_shift,
    "low_contrast": _low_contrast,
}

CORRUPTIONS: tuple[str, ...] = ("none", *_CORRUPTIONS)
"""Names that ``corrupt`` takes."""


def check_corruption(name: str, severity: float) -> None:
    """Raise UserError unless ``corrupt`` takes this name and severity."""
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}; choose one of: {', '.join(CORRUPTIONS)}")
    if not 0 <= severity <= MAX_SEVERITY:
        raise UserError(f"severity is {severity}; it must lie between 0 and {MAX_SEVERITY:g}")


def corrupt(
    image: np.ndarray,
    name: str,
    severity: float,
    seed: int,
    frame_index: int,
    depth: np.ndarray | None = None,
) -> np.ndarray:
    """Corrupt one frame.

    Args:
        image: (H, W, 3) uint8, RGB.
        name: one of ``CORRUPTIONS``.
        severity: in [0, 5]; 0 returns the image bit for bit.
        seed: of the video, not negative; what stays the same within a video hangs on it alone.
        frame_index: position in the video; noise hangs on it too.
        depth: (H, W) float, metres, inf allowed; only fog needs it.

    Returns:
        (H, W, 3) uint8, a new array.

    Raises:
        UserError: an unknown name, a severity outside [0, 5], or fog without depth.
    """
    check_corruption(name, severity)
    if name == "none" or severity == 0:
        return image.copy()
    kind = CORRUPTIONS.index(name)
    pixels = image.astype(np.float32) / np.float32(255.0)
    frame = _Frame(
        noise=np.random.default_rng((kind, seed, frame_index)),
        constant=np.random.default_rng((kind, seed)),
        depth=depth,
    )
    pixels = _CORRUPTIONS[name](pixels, severity, frame)
    return np.rint(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)


def severity_at(severity: float, frame_index: int, num_frames: int, ramp: bool) -> float:
    """The severity of one frame: constant, or with ``ramp`` from 0 up to ``severity``.

    A video of one frame has the full severity either way.
    """
    if not ramp or num_frames < 2:
        return severity
    return severity * frame_index / (num_frames - 1)
