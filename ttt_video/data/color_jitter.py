"""SSD's colour jitter of training images, in 8-bit steps as Mask2Former trains with it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform

from ..errors import require


class SSDColorJitter(Transform):
    """Brightness, contrast, saturation and hue, each with probability 1/2 (Liu et al., 2016).

    detectron2's project PointRend has the same as ``ColorAugSSDTransform``, but importing it
    registers its heads. Draws from Python's ``random`` when it is applied, in the same order.
    """

    def __init__(self, image_format: str) -> None:
        """``image_format``: "RGB" or "BGR", the order of the channels.

        Raises:
            UserError: OpenCV is missing, which does the colour spaces.
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
        img = self._saturation(img)
        img = self._hue(img)
        return img if contrast_first else self._contrast(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Leaves points where they are."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Leaves labels as they are."""
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

        name = conversion.format(self.image_format)
        return cv2.cvtColor(img, getattr(cv2, f"COLOR_{name}"))


def _coin() -> bool:
    return bool(random.randrange(2))


def _linear(values: np.ndarray, *, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
    """``factor * values + offset`` in float32, clipped to 0..255 and cut to uint8."""
    return np.clip(values.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)
