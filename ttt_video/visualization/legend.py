"""Words on pictures: the legend of classes, and names on segments.

Images are (H, W, 3) uint8 RGB arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import find_objects

BACKGROUND = (24, 24, 24)  # of captions and legends, and between pictures
TEXT = (235, 235, 235)
_ABSENT = 0.6  # brightness of what is not in the frame
_LINES = 3  # of a legend, at most


class LegendEntry(NamedTuple):
    """A class in a legend: its RGB colour, and whether the frame has it."""

    name: str
    color: tuple[int, int, int]
    seen: bool


@lru_cache(maxsize=64)
def font_of(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Returns the font that comes with Pillow, at a size in pixels."""
    return ImageFont.load_default(size=size)


def caption_height(width: int) -> int:
    """Returns the height of a caption over a picture, which grows with its width."""
    return min(max(18, 10 + width // 40), 48)


@lru_cache(maxsize=8)  # frames in a row often have the same classes
def legend(entries: tuple[LegendEntry, ...], width: int) -> np.ndarray:
    """Returns a read-only strip, ``width`` px wide, with a colour and a name for each class.

    If all classes fit, each has its place, and those that the frame has not are dimmed. Otherwise
    only those of the frame are listed, with the number of those that found no place. The height
    depends on the names and the width alone, so that it is that of all frames.
    """
    line = max(14, round(0.72 * caption_height(width)))
    everything = _places(entries, width, line)
    lines = 1 + max((row for row, _ in everything), default=0)
    listed, places = entries, everything
    if lines > _LINES:
        listed = tuple(entry for entry in entries if entry.seen)
        places = _places(listed, width, line)
    strip = Image.new("RGB", (width, min(lines, _LINES) * line), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    font = font_of(0.72 * line)
    hidden = sum(row >= _LINES for row, _ in places)
    for entry, (row, left) in zip(listed, places, strict=True):
        if row >= _LINES:
            continue
        shade = 1.0 if entry.seen else _ABSENT
        top, side = row * line + line // 5, 3 * line // 5
        color = tuple(round(shade * value) for value in entry.color)
        outline = tuple(round(shade * value) for value in TEXT)
        draw.rectangle((left, top, left + side, top + side), fill=color, outline=outline)
        draw.text((left + line, (row + 0.5) * line), entry.name, outline, font, anchor="lm")
    if hidden:
        place = (width - line // 4, (_LINES - 0.5) * line)
        draw.text(place, f"+{hidden}", TEXT, font, "rm", stroke_width=3, stroke_fill=BACKGROUND)
    return np.asarray(strip)


def _places(entries: Sequence[LegendEntry], width: int, line: int) -> list[tuple[int, int]]:
    """Returns row and left edge of each entry, set one after the other as words are."""
    font, places, row, left = font_of(0.72 * line), [], 0, line // 4
    for entry in entries:
        length = round(1.6 * line + font.getlength(entry.name))
        if left + length > width and left > line // 4:
            row, left = row + 1, line // 4
        places.append((row, left))
        left += length
    return places


def write_names(image: np.ndarray, ids: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """Returns the image with names on segments of an (H, W) id map, white with a black outline.

    A name stands on the pixel of its segment that is nearest to the middle of the segment's box. A
    segment that is lower than the letters, or narrower than half the name, has none; nor has one
    whose name would cover that of a larger segment.
    """
    if not names:
        return image
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    size = min(max(10, min(ids.shape) // 32), 40)
    font = font_of(size)
    boxes = find_objects(ids, max_label=max(names))
    areas = np.bincount(ids.ravel(), minlength=max(names) + 1)
    taken: list[tuple[float, ...]] = []
    for number in sorted(names, key=lambda number: (-areas[number], number)):
        name, box = names[number], boxes[number - 1]
        if box is None:
            continue
        inside = ids[box] == number
        if inside.shape[0] < size or inside.shape[1] < font.getlength(name) / 2:
            continue
        own = np.argwhere(inside)
        middle = (np.array(inside.shape) - 1) / 2
        nearest = own[((own - middle) ** 2).sum(1).argmin()]
        y, x = nearest + [side.start for side in box]
        place = draw.textbbox((x, y), name, font, "mm", stroke_width=2)
        if any(_overlap(place, other) for other in taken):
            continue
        taken.append(place)
        draw.text((x, y), name, (255, 255, 255), font, "mm", stroke_width=2, stroke_fill=(0, 0, 0))
    return np.asarray(canvas)


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Tells whether two boxes (left, top, right, bottom) share a pixel."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
