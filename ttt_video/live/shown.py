"""A frame as a page gets it: its numbers, and its pictures as JPEG."""

from __future__ import annotations

import io
import json
import math
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from ..stream.overlay import Pictures
from ..tasks import Painter

WIDEST = 960
"""Pixels; wider frames are made smaller for the page."""

QUALITY = 85


class Shown:
    """Numbers and pictures of a frame.

    Attributes:
        numbers: JSON values, of which those that are not finite become null.
    """

    def __init__(
        self, numbers: dict[str, Any], shown: Pictures, painters: dict[str, Painter]
    ) -> None:
        """
        Args:
            numbers: see above.
            shown, painters: of :meth:`ttt_video.stream.OverlayVideos.pictures`.
        """
        self.numbers = {key: _finite(value) for key, value in numbers.items()}
        self._shown, self._painters = shown, painters

    @cached_property
    def message(self) -> bytes:
        """The frame as one message; drawn and encoded when it is first asked for.

        Its first four bytes are the length of a JSON text (little-endian), which follows:
        ``numbers``; ``pictures``, their titles and lengths; and ``legend``, rows of name, (r, g, b)
        and whether the frame has the class. Then come the JPEGs: the frame, the frozen and the
        adapted prediction.
        """
        image = next(iter(self._shown.values()))()
        pictures = {next(iter(self._shown)): image}
        pictures |= {title: paint(image) for title, paint in self._painters.items()}
        files = {title: jpeg(picture) for title, picture in pictures.items()}
        painter: Any = list(self._painters.values())[-1]
        legend = [[e.name, e.color, e.seen] for e in getattr(painter, "legend", tuple)()]
        head = json.dumps(
            {
                "numbers": self.numbers,
                "pictures": [[title, len(data)] for title, data in files.items()],
                "legend": legend,
            }
        ).encode()
        return b"".join([len(head).to_bytes(4, "little"), head, *files.values()])


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def jpeg(pixels: np.ndarray) -> bytes:
    """Encodes (H, W, 3) uint8 RGB pixels, at most :data:`WIDEST` wide."""
    image = Image.fromarray(pixels)
    if image.width > WIDEST:
        size = (WIDEST, max(1, round(image.height * WIDEST / image.width)))
        image = image.resize(size, Image.Resampling.BILINEAR)
    with io.BytesIO() as file:
        image.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()
