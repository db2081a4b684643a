"""Corruptions of frames: pure functions of image, severity, seed and frame.

Severities 1 to 5 of noise, contrast and the corruptions in ``imagenet_c`` are those of ImageNet-C
(Hendrycks and Dietterich, 2019, for full-size images), interpolated in between, so that a severity
can ramp. The others are our own models of cameras and weather.
"""

from __future__ import annotations

import numpy as np

from ..errors import UserError, suggestion
from . import effects
from .imagenet_c import IMAGENET_C

MAX_SEVERITY = 5.0

# Random numbers depend on the position in this table: new names go to its end.
_CORRUPTIONS: dict[str, effects.Effect] = {
    **{effect.__name__: effect for effect in effects.EFFECTS},
    **IMAGENET_C,
    **{effect.__name__: effect for effect in effects.LATER_EFFECTS},
}

CORRUPTIONS: tuple[str, ...] = ("none", *_CORRUPTIONS)
"""Names that ``corrupt`` takes."""


def check_corruption(name: str, severity: float) -> None:
    """Raises UserError unless ``corrupt`` takes this name and severity."""
    if name not in CORRUPTIONS:
        raise UserError(f"unknown corruption {name!r}; {suggestion(name, CORRUPTIONS)}")
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
    """Corrupts one frame.

    Args:
        image: (H, W, 3) uint8, RGB.
        name: one of ``CORRUPTIONS``.
        severity: in [0, 5]; 0 returns the image bit for bit.
        seed: of the video, not negative; decides what stays the same within a video.
        frame_index: position in the video; noise and drifts depend on it, too.
        depth: (H, W) float, metres, inf allowed; only fog, night and rain need it.

    Returns:
        (H, W, 3) uint8, a new array.

    Raises:
        UserError: the name is unknown, the severity outside [0, 5], or the depth missing; the
            library of ImageNet-C is missing, or the image smaller than 32 x 32 pixels for it.
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
