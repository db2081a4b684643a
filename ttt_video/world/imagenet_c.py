"""ImageNet-C's corruptions as effects, by the library ``imagecorruptions-imaug``.

The library knows the severities 1 to 5. In between, the pictures of the severities below and above
are blended (severity 0 is the clean one), so that a severity can ramp.

Whether a corruption is drawn anew in every frame or once for a video is our choice: what sticks to
the lens or is the medium stays, what falls or shakes does not.

Source: Hendrycks and Dietterich, 2019, and Michaelis et al., 2019, for pictures of any size.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np

from ..errors import UserError
from .effects import Effect, FrameContext

_MIN_SIDE = 32  # pixels; the library takes no smaller picture

# Our name: the library's, and whether it stays the same throughout a video.
_LIBRARY: dict[str, tuple[str, bool]] = {
    "defocus_blur": ("defocus_blur", True),
    "glass_blur": ("glass_blur", True),
    "motion_blur": ("motion_blur", False),
    "zoom_blur": ("zoom_blur", True),
    "snow": ("snow", False),
    "frost": ("frost", True),
    "plasma_fog": ("fog", True),
    "brightness": ("brightness", True),
    "elastic_transform": ("elastic_transform", True),
    "pixelate": ("pixelate", True),
    "jpeg_compression": ("jpeg_compression", True),
    "speckle_noise": ("speckle_noise", False),
    "gaussian_blur": ("gaussian_blur", True),
    "spatter": ("spatter", True),
    "saturate": ("saturate", True),
}

_global_generator = threading.Lock()


def _library(name: str) -> ModuleType:
    try:
        import imagecorruptions  # type: ignore[import-untyped,import-not-found,unused-ignore]
    except ImportError as error:
        raise UserError(
            f"the corruption {name} needs imagecorruptions-imaug ({error}): "
            "pip install 'ttt_video[corruptions]', then "
            "pip install --no-deps imagecorruptions-imaug==1.1.5"
        ) from error
    return imagecorruptions


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which the library draws from, and put it back after."""
    with _global_generator:
        state = np.random.get_state()  # noqa: NPY002
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(state)  # noqa: NPY002


def _apply(name: str, pixels: np.ndarray, severity: float, frame: FrameContext) -> np.ndarray:
    library = _library(name)
    if min(pixels.shape[:2]) < _MIN_SIDE:
        height, width = pixels.shape[:2]
        raise UserError(
            f"the corruption {name} needs pictures of at least {_MIN_SIDE} x {_MIN_SIDE} pixels, "
            f"not {height} x {width}"
        )
    library_name, stays = _LIBRARY[name]
    seed = int((frame.constant if stays else frame.noise).integers(1 << 32))
    image = np.rint(pixels * 255.0).astype(np.uint8)
    # Inside compiled code the global generator is another one; this one takes its seed itself.
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


IMAGENET_C: dict[str, Effect] = {name: functools.partial(_apply, name) for name in _LIBRARY}
"""Effects by name: 11 of ImageNet-C's 15 families and the four extra ones for validation. Noise
and contrast, the other four, are effects of our own with the same definition; ``plasma_fog`` is
the family ``fog``, where ours hangs on depth."""
