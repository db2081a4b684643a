"""Draws over frames with lookups and blends, a hundred times faster than detectron2's Visualizer.

Images are (H, W, 3) uint8 RGB arrays; a palette is (K, 3) uint8, one RGB colour per class.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .legend import BACKGROUND, TEXT, LegendEntry, caption_height, font_of, legend, write_names


def to_rgb(image: Tensor, format: str = "RGB", size: tuple[int, int] | None = None) -> np.ndarray:
    """Converts a network's image or reconstruction to a picture.

    Args:
        image: (3, H, W), 0..255; float values are rounded and clipped, NaN becomes 0.
        format: channel order of ``image``, "RGB" or "BGR".
        size: (height, width) to scale to, bilinearly; None keeps the size.
    """
    if image.is_floating_point():
        image = image.detach().nan_to_num(0.0, 255.0, 0.0).clamp(0, 255).round().to(torch.uint8)
    pixels = image.permute(1, 2, 0).cpu().numpy()
    if format == "BGR":
        pixels = pixels[:, :, ::-1]
    pixels = np.ascontiguousarray(pixels)
    return resize(pixels, size) if size else pixels


def resize(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Scales an image bilinearly to (height, width); returns it unchanged if that is its size."""
    height, width = size[:2]
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def distinct_colors(count: int) -> np.ndarray:
    """Returns a palette of colours that are easy to tell apart.

    Hues follow the golden ratio, so that neighbours in the list are far apart on the colour wheel.
    The i-th colour does not depend on ``count``.
    """
    golden = (math.sqrt(5) - 1) / 2
    colors = [
        colorsys.hsv_to_rgb(i * golden % 1, (0.9, 0.6, 0.75)[i % 3], (0.95, 0.75)[i % 2])
        for i in range(count)
    ]
    return np.rint(np.array(colors, dtype=np.float64).reshape(count, 3) * 255).astype(np.uint8)


def class_palette(metadata: Any, count: int, *, things: bool = False) -> np.ndarray:
    """Returns the palette of a data set's classes.

    Args:
        metadata: detectron2 ``Metadata`` or any object with ``stuff_colors`` / ``thing_colors``
            (lists of RGB triples). If both have fewer than ``count`` colours, `distinct_colors`
            are taken.
        count: number of classes.
        things: prefer ``thing_colors`` to ``stuff_colors``.
    """
    names = ("thing_colors", "stuff_colors") if things else ("stuff_colors", "thing_colors")
    for name in names:
        colors = getattr(metadata, name, None)
        if colors is not None and len(colors) >= count:
            return np.asarray(colors, dtype=np.uint8)[:count].reshape(count, 3)
    return distinct_colors(count)


def colorize(sem_seg: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colours an (H, W) map of class ids; ids without a colour (255 = ignore) become black."""
    count = len(palette)
    table = np.concatenate([palette, np.zeros((1, 3), np.uint8)])
    known = (sem_seg >= 0) & (sem_seg < count)
    # intp, because a count of 256 does not fit into labels of uint8.
    return table.take(np.where(known, sem_seg, np.intp(count)), axis=0)


def blend(image: np.ndarray, color: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """Returns (1 - alpha) * image + alpha * color, both (H, W, 3) uint8."""
    return np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(color), alpha))


def paint_classes(
    image: np.ndarray, classes: np.ndarray, palette: np.ndarray, alpha: float = 0.5
) -> np.ndarray:
    """Colours every pixel of an (H, W) class map; the image is scaled to its size."""
    return blend(resize(image, classes.shape), colorize(classes, palette), alpha)


def paint_segments(
    image: np.ndarray, ids: np.ndarray, colors: np.ndarray, alpha: float = 0.5
) -> np.ndarray:
    """Colours segments of an (H, W) id map by ``colors[id]``, outlined; id 0 keeps the image."""
    image = resize(image, ids.shape)
    color = colorize(ids, colors)
    painted = np.where((ids > 0)[:, :, None], blend(image, color, alpha), image)
    edge = np.zeros(ids.shape, bool)
    down, right = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    edge &= ids > 0
    painted[edge] = color[edge]
    return painted


def shade(color: np.ndarray, number: int) -> np.ndarray:
    """Varies a class's colour by the instance's number, the same for the same number."""
    offset = np.random.default_rng(number).integers(-48, 49, size=3)
    return np.clip(color + offset, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class ClassPainter:
    """Colours every pixel of a frame by its class.

    Attributes:
        classes: (H, W) class ids.
        palette: (K, 3) uint8.
        names: of the K classes, for the legend; empty if they are unknown.
    """

    classes: np.ndarray
    palette: np.ndarray
    names: Sequence[str] = ()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return paint_classes(image, self.classes, self.palette)

    def legend(self) -> tuple[LegendEntry, ...]:
        """Returns all classes in the order of their ids."""
        if not self.names:
            return ()
        found = np.bincount(self.classes.ravel() + 1, minlength=len(self.names) + 1)[1:] > 0
        return legend_entries(self.names, self.palette, set(np.flatnonzero(found).tolist()))


@dataclass(frozen=True)
class SegmentPainter:
    """Colours segments of a frame, outlined and with their names.

    Attributes:
        ids: (H, W) ids of segments; 0 keeps the frame.
        colors: (ids, 3) uint8, by id.
        names: what is written on segments, by id.
        entries: the legend.
    """

    ids: np.ndarray
    colors: np.ndarray
    names: Mapping[int, str] = field(default_factory=dict)
    entries: tuple[LegendEntry, ...] = ()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return write_names(paint_segments(image, self.ids, self.colors), self.ids, self.names)

    def legend(self) -> tuple[LegendEntry, ...]:
        """Returns all classes in the order of their ids."""
        return self.entries


def legend_entries(
    names: Sequence[str], palette: np.ndarray, seen: set[int]
) -> tuple[LegendEntry, ...]:
    """Returns the legend of classes by name, with those that are ``seen`` in the frame."""
    colors = [(int(r), int(g), int(b)) for r, g, b in palette]
    return tuple(
        LegendEntry(name, color, k in seen)
        for k, (name, color) in enumerate(zip(names, colors, strict=True))
    )


def split_picture(left: np.ndarray, right: np.ndarray, bar: float) -> np.ndarray:
    """Joins two pictures of one size at a white bar, a share of the width from the left."""
    width = left.shape[1]
    place, thickness = round(bar * width), 1 + width // 250
    joined = np.concatenate([left[:, :place], right[:, place:]], axis=1)
    joined[:, max(place - thickness, 0) : place + thickness] = 255
    return joined


def grid_columns(count: int, height: float, width: float) -> int:
    """Returns how many pictures stand in a row: four are 2 x 2, others one row or one column.

    Whichever is closer to a 16:9 screen is taken.
    """

    def distance(columns: int) -> float:
        return abs(math.log(columns * width / (count / columns * height) / (16 / 9)))

    return 2 if count == 4 else min((count, 1), key=distance)


def side_by_side(
    panels: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    legends: Sequence[tuple[LegendEntry, ...]] = (),
    note: str = "",
    sides: tuple[int, int] | None = None,
) -> np.ndarray:
    """Joins images to one, each with a caption above it.

    Args:
        panels: images, which are scaled to the size of the first.
        titles: one caption per panel.
        columns: panels per row; None chooses by :func:`grid_columns`.
        legends: one per panel, below it. One without classes has a blank there if others have
            some, so that all parts of the picture are of one size.
        note: stands at the right end of the first caption.
        sides: px; panels that are narrower than the first are enlarged by a whole factor, and where
            a side of the result would be longer than the second they are made smaller. None keeps
            the size of the first panel.
    """
    if len(panels) != len(titles) or not panels:
        raise ValueError(f"{len(panels)} panels need as many titles, not {len(titles)}")
    height, width = panels[0].shape[:2]
    columns = columns or grid_columns(len(panels), height, width)
    lines = -(-len(panels) // columns)
    if sides is not None:
        factor = -(-sides[0] // width) if width < sides[0] else 1
        longest = max(columns * width, lines * height) * factor
        fit = factor * min(1.0, sides[1] / longest)
        height, width = max(1, round(fit * height)), max(1, round(fit * width))
    cells = []
    for i, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        strips = [caption(title, width), resize(panel, (height, width))]
        if note and i == 0:
            strips[0] = _noted(strips[0], note)
        if any(legends):
            strips.append(_legend_below(legends, i, width))
        cells.append(np.concatenate(strips))
    blank = np.full_like(cells[-1], BACKGROUND)
    cells += [blank] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def _legend_below(
    legends: Sequence[tuple[LegendEntry, ...]], number: int, width: int
) -> np.ndarray:
    """Returns the legend of a panel; one that has no classes gets a blank of the same height."""
    if legends[number]:
        return legend(legends[number], width)
    return np.full_like(legend(next(filter(None, legends)), width), BACKGROUND)


@lru_cache(maxsize=64)
def caption(title: str, width: int) -> np.ndarray:
    """Returns a read-only strip, ``width`` px wide, with a line of text that grows with it."""
    height = caption_height(width)
    strip = Image.new("RGB", (width, height), BACKGROUND)
    place = (height // 4, height // 2)
    ImageDraw.Draw(strip).text(place, title, fill=TEXT, font=font_of(0.65 * height), anchor="lm")
    return np.asarray(strip)


def _noted(strip: np.ndarray, note: str) -> np.ndarray:
    """Returns a caption with a note at its right end."""
    height, width = strip.shape[:2]
    picture = Image.fromarray(strip)
    place, font = (width - height // 4, height // 2), font_of(0.55 * height)
    ImageDraw.Draw(picture).text(place, note, fill=TEXT, font=font, anchor="rm")
    return np.asarray(picture)
