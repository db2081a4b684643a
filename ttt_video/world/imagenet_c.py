"""ImageNet-C's corruptions as effects, computed by the library ``imagecorruptions-imaug``.

The library knows the severities 1 to 5. In between, the pictures of the severities below and above
are blended (severity 0 is the clean one), so that a severity can ramp.

Source: Hendrycks and Dietterich, 2019, and Michaelis et al., 2019, for pictures of any size.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from ..errors import UserError, require
from .effects import Effect, FrameContext

_MIN_SIDE = 32  # pixels; the library takes no smaller picture

_NAMES = (
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost", "plasma_fog",
    "brightness", "elastic_transform", "pixelate", "jpeg_compression", "speckle_noise",
    "gaussian_blur", "spatter", "saturate",
)  # fmt: skip
_NEW_IN_EVERY_FRAME = ("motion_blur", "snow", "speckle_noise")  # our choice: they fall or shake

_global_generator = threading.Lock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds numpy's global generator, which the library draws from, and restores it."""
    with _global_generator:
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _apply(name: str, pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    package = "'ttt_video[corruptions]', then pip install --no-deps imagecorruptions-imaug==1.1.5"
    library = require("imagecorruptions", package, f"the corruption {name}")
    if min(pixels.shape[:2]) < _MIN_SIDE:
        height, width = pixels.shape[:2]
        raise UserError(
            f"the corruption {name} needs pictures of at least {_MIN_SIDE} x {_MIN_SIDE} pixels, "
            f"not {height} x {width}"
        )
    library_name = "fog" if name == "plasma_fog" else name
    generator = frame.noise if name in _NEW_IN_EVERY_FRAME else frame.constant
    seed = int(generator.integers(1 << 32))
    image = np.rint(pixels * 255.0).astype(np.uint8)
    # glass_blur is compiled code with a global generator of its own, and takes the seed itself.
    keys = {"seed": seed} if library_name == "glass_blur" else {}

    def at(whole: int) -> np.ndarray:
        if whole == 0:
            return pixels
        with _seeded(seed):
            corrupted = library.corrupt(image, whole, library_name, **keys)
        return corrupted.astype(np.float32) / np.float32(255.0)

    below = math.floor(severity)
    if below == severity:
        return at(below)
    share = np.float32(severity - below)
    return (1 - share) * at(below) + share * at(below + 1)


IMAGENET_C: dict[str, Effect] = {name: functools.partial(_apply, name) for name in _NAMES}
"""Effects by name: 11 of ImageNet-C's 15 families and its four extra ones for validation. The other
four, noise and contrast, are our own effects with the same definition. ``plasma_fog`` is the
library's ``fog``, because our ``fog`` depends on depth."""
