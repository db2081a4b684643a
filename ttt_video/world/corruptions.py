"""Corruptions of frames: pure functions of image, severity, seed and frame.

Severities 1 to 5 of noise and contrast are those of ImageNet-C (Hendrycks and Dietterich, 2019,
the settings for full-size images), interpolated in between, so that a severity can ramp; so are
those that ``imagenet_c`` takes from a library. The others are camera and weather models of our own.
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError
from . import effects
from .imagenet_c import IMAGENET_C

MAX_SEVERITY = 5.0

# Random numbers hang on the position in this table: new names go to its end.
_CORRUPTIONS: dict[str, effects.Effect] = {
    "gaussian_noise": effects.gaussian_noise,
    "shot_noise": effects.shot_noise,
    "impulse_noise": effects.impulse_noise,
    "darkness": effects.darkness,
    "fog": effects.fog,
    "colour_shift": effects.colour_shift,
    "low_contrast": effects.low_contrast,
    "night": effects.night,
    "rain": effects.rain,
    "lens_dirt": effects.lens_dirt,
    "exposure_drift": effects.exposure_drift,
    "white_balance_drift": effects.white_balance_drift,
    **IMAGENET_C,
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
        frame_index: position in the video; noise and drifts hang on it too.
        depth: (H, W) float, metres, inf allowed; only fog, night and rain need it.

    Returns:
        (H, W, 3) uint8, a new array.

    Raises:
        UserError: an unknown name, a severity outside [0, 5], a depth that is missing, or a
            corruption of ImageNet-C without its library or on less than 32 x 32 pixels.
    """
    check_corruption(name, severity)
    if name == "none" or severity == 0:
        return image.copy()
    kind = CORRUPTIONS.index(name)
    pixels = image.astype(np.float32) / np.float32(255.0)
    frame = effects.FrameContext(
        noise=np.random.default_rng((kind, seed, frame_index)),
        constant=np.random.default_rng((kind, seed)),
        index=frame_index,
        depth=depth,
    )
    pixels = _CORRUPTIONS[name](pixels, severity, frame)
    return np.rint(np.clip(pixels, 0.0, 1.0) * 255.0).astype(np.uint8)
