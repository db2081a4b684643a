"""Draws a grid of pictures with titles."""

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
        rows: the pictures of each row by column title, (H, W, 3) uint8 RGB of any size. A missing
            picture is left blank. Columns are in the order in which the titles first appear.
        path: the file; its suffix (``.png``) gives the type.
        column_width: px; all pictures are scaled to it and keep their aspect ratio.
    """
    titles = list(dict.fromkeys(title for row in rows for title in row))
    if not titles:
        raise ValueError("a picture grid needs at least one picture")
    lines = [[caption(title, column_width) for title in titles]]
    for row in rows:
        cells = {title: _to_width(picture, column_width) for title, picture in row.items()}
        height = max((len(cell) for cell in cells.values()), default=1)
        line = [np.full((height, column_width, 3), BACKGROUND, np.uint8) for _ in titles]
        for title, cell in cells.items():
            line[titles.index(title)][: len(cell)] = cell
        lines.append(line)
    width = len(titles) * (column_width + _GAP) + _GAP
    canvas = np.full((sum(len(line[0]) + _GAP for line in lines) + _GAP, width, 3), BACKGROUND)
    top = _GAP
    for line in lines:
        for column, cell in enumerate(line):
            left = _GAP + column * (column_width + _GAP)
            canvas[top : top + len(cell), left : left + column_width] = cell
        top += len(line[0]) + _GAP
    Image.fromarray(canvas.astype(np.uint8)).save(path)


def _to_width(picture: np.ndarray, width: int) -> np.ndarray:
    return resize(picture, (max(1, round(picture.shape[0] * width / picture.shape[1])), width))
