"""SSD's colour jitter of training images, in 8-bit steps as Mask2Former applies it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform

from ..errors import require


class SSDColorJitter(Transform):
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    Liu et al., 2016. detectron2's project PointRend has the same as ``ColorAugSSDTransform``, but
    importing it registers its heads. Both draw from Python's ``random`` in the same order.
    """

    def __init__(self, image_format: str) -> None:
        """Checks that OpenCV, which converts colours, is there; ``image_format``: "RGB" or "BGR".

        Raises:
            UserError: it is missing.
        """
        super().__init__()
        require("cv2", "opencv-python-headless", "INPUT.COLOR_AUG_SSD")
        self.image_format = image_format

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Jitters an (H, W, 3) uint8 image; contrast comes before or after the other two."""
        img = _linear(img, offset=random.uniform(-32, 32)) if _coin() else img
        contrast_first = _coin()
        if contrast_first:
            img = self._contrast(img)
        img = self._hue(self._saturation(img))
        return img if contrast_first else self._contrast(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Returns the points unchanged."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Returns the labels unchanged."""
        return segmentation

    def _contrast(self, img: np.ndarray) -> np.ndarray:
        return _linear(img, factor=random.uniform(0.5, 1.5)) if _coin() else img

    def _saturation(self, img: np.ndarray) -> np.ndarray:
        if not _coin():
            return img
        hsv = self._converted(img, "{}2HSV")
        hsv[:, :, 1] = _linear(hsv[:, :, 1], factor=random.uniform(0.5, 1.5))
        return self._converted(hsv, "HSV2{}")

    def _hue(self, img: np.ndarray) -> np.ndarray:
        if not _coin():
            return img
        hsv = self._converted(img, "{}2HSV")
        # OpenCV's 8-bit hue counts the circle in 180 steps.
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + random.randint(-18, 18)) % 180
        return self._converted(hsv, "HSV2{}")

    def _converted(self, img: np.ndarray, conversion: str) -> Any:
        import cv2

        return cv2.cvtColor(img, getattr(cv2, f"COLOR_{conversion.format(self.image_format)}"))


def _coin() -> bool:
    return bool(random.randrange(2))


def _linear(values: np.ndarray, *, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """Returns ``factor * values + offset``, computed in float32, clipped and truncated to uint8."""
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
