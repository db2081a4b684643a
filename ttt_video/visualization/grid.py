"""Still pictures of a run: a grid of images with titles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from .overlay import BACKGROUND, caption, resize

_GAP = 4  # pixels between pictures


def picture_grid(
    rows: Sequence[Mapping[str, np.ndarray]],
    path: str | os.PathLike[str],
    *,
    column_width: int = 400,
) -> None:
    """Writes one picture with a column per title and a row per frame.

    Args:
        rows: per row its pictures by column title, (H, W, 3) uint8 RGB of any size; a row without
            a picture for some column has a blank there. Columns are in the order in which the
            titles first appear.
        path: where to write; the suffix (``.png``) gives the file type.
        column_width: pixels that every picture is scaled to, keeping its shape.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    if not titles:
        raise ValueError("a picture grid needs at least one picture")
    lines = [[caption(title, column_width) for title in titles]]
    for row in rows:
        cells = {
            title: resize(picture, (_scaled_height(picture, column_width), column_width))
            for title, picture in row.items()
        }
        height = max((len(cell) for cell in cells.values()), default=1)
        lines.append([_pad(cells.get(title), height, column_width) for title in titles])
    width = len(titles) * (column_width + _GAP) + _GAP
    canvas = np.full((sum(len(line[0]) + _GAP for line in lines) + _GAP, width, 3), BACKGROUND)
    top = _GAP
    for line in lines:
        for column, cell in enumerate(line):
            left = _GAP + column * (column_width + _GAP)
            canvas[top : top + len(cell), left : left + column_width] = cell
        top += len(line[0]) + _GAP
    Image.fromarray(canvas.astype(np.uint8)).save(path)


def _scaled_height(picture: np.ndarray, width: int) -> int:
    return max(1, round(picture.shape[0] * width / picture.shape[1]))


def _pad(picture: np.ndarray | None, height: int, width: int) -> np.ndarray:
    cell = np.full((height, width, 3), BACKGROUND, np.uint8)
    if picture is not None:
        cell[: len(picture)] = picture
    return cell
