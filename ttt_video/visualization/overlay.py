"""Predictions drawn over frames, fast enough for every frame of a stream.

Plain lookups and blends instead of detectron2's ``Visualizer``, which takes a hundred times longer.
Images are (H, W, 3) uint8 RGB arrays; a palette is (K, 3) uint8, one RGB colour per class.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

BACKGROUND = (24, 24, 24)  # of captions, and between pictures


def to_rgb(image: Tensor, format: str = "RGB", size: tuple[int, int] | None = None) -> np.ndarray:
    """A network image or a reconstruction as a picture.

    Args:
        image: (3, H, W), 0..255; float values are rounded and clipped, NaN becomes 0.
        format: channel order of ``image``, "RGB" or "BGR".
        size: (height, width) to scale to, bilinearly; None keeps the size.

    Returns:
        (height, width, 3) uint8 RGB array.
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
    """(count, 3) uint8 colours that are easy to tell apart; the i-th does not depend on ``count``.

    Hues follow the golden ratio, so that neighbours in the list are far apart on the colour wheel.
    """
    golden = (math.sqrt(5) - 1) / 2
    colors = [
        colorsys.hsv_to_rgb(i * golden % 1, (0.9, 0.6, 0.75)[i % 3], (0.95, 0.75)[i % 2])
        for i in range(count)
    ]
    return np.rint(np.array(colors, dtype=np.float64).reshape(count, 3) * 255).astype(np.uint8)


def class_palette(metadata: Any, count: int, *, things: bool = False) -> np.ndarray:
    """(count, 3) uint8 colours of the classes.

    Args:
        metadata: detectron2 ``Metadata`` or any object with ``stuff_colors`` / ``thing_colors``
            (lists of RGB triples); where these have fewer than ``count`` colours,
            `distinct_colors` steps in.
        count: number of classes.
        things: look at ``thing_colors`` first, not at ``stuff_colors``.
    """
    names = ("thing_colors", "stuff_colors") if things else ("stuff_colors", "thing_colors")
    for name in names:
        colors = getattr(metadata, name, None)
        if colors is not None and len(colors) >= count:
            return np.asarray(colors, dtype=np.uint8)[:count].reshape(count, 3)
    return distinct_colors(count)


def colorize(sem_seg: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Colours a label map.

    Args:
        sem_seg: (H, W) integer class ids; ids without a colour (255 = ignore) become black.
        palette: (K, 3) uint8.

    Returns:
        (H, W, 3) uint8.
    """
    count = len(palette)
    table = np.concatenate([palette, np.zeros((1, 3), np.uint8)])
    known = (sem_seg >= 0) & (sem_seg < count)
    # An index type of its own: 256 does not fit into labels of uint8.
    return table.take(np.where(known, sem_seg, np.intp(count)), axis=0)


def blend(image: np.ndarray, color: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """(1 - alpha) * image + alpha * color, both (H, W, 3) uint8."""
    return np.asarray(Image.blend(Image.fromarray(image), Image.fromarray(color), alpha))


def overlay_prediction(
    image: np.ndarray,
    output: Mapping[str, Any],
    metadata: Any,
    *,
    alpha: float = 0.5,
    min_score: float = 0.5,
) -> np.ndarray:
    """Draws a model's output over its frame.

    The same as ``overlay_painter(output, ...)(image)``.

    Args:
        image: (h, w, 3) uint8 RGB, scaled to the size of the prediction where that differs.
        output, metadata, alpha, min_score: see `overlay_painter`.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    return overlay_painter(output, metadata, alpha=alpha, min_score=min_score)(image)


def overlay_painter(
    output: Mapping[str, Any], metadata: Any, *, alpha: float = 0.5, min_score: float = 0.5
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that draws a model's output over its frame, also later and in another thread.

    What needs the output is done here, on its device; what is kept of it is a map of the pixels.

    Of several predictions the first of these is drawn: ``panoptic_seg``, ``sem_seg``,
    ``instances``. Every instance has a shade of its class's colour that depends on nothing but its
    number, and an outline; pixels without a prediction keep the image.

    Args:
        output: detectron2's output of one frame, on any device: ``sem_seg`` (K, H, W) scores;
            ``panoptic_seg`` (id map (H, W), segments_info); or ``instances`` with ``pred_masks``
            (N, H, W), ``scores`` and ``pred_classes``.
        metadata: see `class_palette`.
        alpha: weight of the colours, 0..1.
        min_score: instances below this score are left out.

    Raises:
        ValueError: there is none of them.
    """
    if "panoptic_seg" in output:
        ids, segments = output["panoptic_seg"]
        colors = _panoptic_colors(segments, metadata)
        return partial(_overlay_segments, ids=ids.cpu().numpy(), colors=colors, alpha=alpha)
    if "sem_seg" in output:
        scores = output["sem_seg"]
        # On the CPU, max() is three times as fast as argmax() over a leading dimension.
        classes = scores.max(dim=0).indices.to(torch.int16).cpu().numpy()
        palette = class_palette(metadata, len(scores))
        return partial(_overlay_classes, classes=classes, palette=palette, alpha=alpha)
    if "instances" in output:
        ids, colors = _instance_ids(output["instances"], metadata, min_score)
        return partial(_overlay_segments, ids=ids, colors=colors, alpha=alpha)
    raise ValueError(
        f"no sem_seg, panoptic_seg or instances to draw in an output with keys {sorted(output)}"
    )


def _overlay_classes(
    image: np.ndarray, classes: np.ndarray, palette: np.ndarray, alpha: float
) -> np.ndarray:
    return blend(resize(image, classes.shape), colorize(classes, palette), alpha)


def _panoptic_colors(segments: Sequence[Mapping[str, Any]], metadata: Any) -> np.ndarray:
    """(largest id + 1, 3) uint8 colours by id."""
    colors = np.zeros((1 + max((s["id"] for s in segments), default=0), 3), np.uint8)
    count = 1 + max((s["category_id"] for s in segments), default=0)
    stuff = class_palette(metadata, count)
    things = class_palette(metadata, count, things=True)
    for segment in segments:
        category = segment["category_id"]
        colors[segment["id"]] = (
            _shade(things[category], segment["id"]) if segment["isthing"] else stuff[category]
        )
    return colors


def _instance_ids(
    instances: Instances, metadata: Any, min_score: float
) -> tuple[np.ndarray, np.ndarray]:
    """A map of the instances, best on top, 0 where there is none; and colours by its numbers."""
    scores = instances.scores.tolist()
    # The best are painted last and so lie on top.
    order = sorted(
        (i for i, score in enumerate(scores) if score >= min_score), key=scores.__getitem__
    )
    categories = instances.pred_classes.tolist()
    palette = class_palette(metadata, 1 + max(categories, default=0), things=True)
    colors = np.zeros((len(order) + 1, 3), np.uint8)
    # Painted where the masks are, so that one map leaves the device and not every mask.
    masks = instances.pred_masks
    ids = torch.zeros(instances.image_size, dtype=torch.int32, device=masks.device)
    for place, index in enumerate(order, start=1):
        ids.masked_fill_(masks[index] > 0, place)
        rank = len(order) - place  # 0 is the best: its shade does not depend on the others
        colors[place] = _shade(palette[categories[index]], rank)
    return ids.cpu().numpy(), colors


def _overlay_segments(
    image: np.ndarray, ids: np.ndarray, colors: np.ndarray, alpha: float
) -> np.ndarray:
    """Paints the segments of an id map: ``colors[id]``, outlined; id 0 keeps the image."""
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


def _shade(color: np.ndarray, number: int) -> np.ndarray:
    """A variation of a class's colour that depends on the instance's number alone."""
    offset = np.random.default_rng(number).integers(-48, 49, size=3)
    return np.clip(color + offset, 0, 255).astype(np.uint8)


def side_by_side(
    panels: Sequence[np.ndarray], titles: Sequence[str], *, columns: int | None = None
) -> np.ndarray:
    """Panels with captions above them as one image.

    Args:
        panels: (H, W, 3) uint8 RGB images; those that differ from the first in size are scaled.
        titles: one caption per panel.
        columns: panels per row; None chooses between one row and one column what comes nearer to
            the shape of a 16:9 screen, so wide frames are stacked.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    if len(panels) != len(titles) or not panels:
        raise ValueError(f"{len(panels)} panels need as many titles, not {len(titles)}")
    height, width = panels[0].shape[:2]
    if columns is None:

        def distance(columns: int) -> float:
            rows = len(panels) / columns
            return abs(math.log(columns * width / (rows * height) / (16 / 9)))

        columns = min((len(panels), 1), key=distance)
    cells = [
        np.concatenate([caption(title, width), resize(panel, (height, width))])
        for panel, title in zip(panels, titles, strict=True)
    ]
    blank = np.full_like(cells[0], BACKGROUND)
    cells += [blank] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


@lru_cache(maxsize=64)
def caption(title: str, width: int) -> np.ndarray:
    """A strip of the given width in pixels, with a line of text that grows with it. Read-only."""
    height = min(max(18, 10 + width // 40), 48)
    strip = Image.new("RGB", (width, height), BACKGROUND)
    font = ImageFont.load_default(size=0.65 * height)
    ImageDraw.Draw(strip).text(
        (height // 4, height // 2), title, fill=(235, 235, 235), font=font, anchor="lm"
    )
    return np.asarray(strip)
