"""Picture grids, read back with Pillow."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ttt_video.visualization.grid import picture_grid
from ttt_video.visualization.overlay import BACKGROUND, caption


def flat(value: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def test_grid_places_every_picture(tmp_path):
    rows = [
        {"input": flat(60, 50, 100), "adapted": flat(200, 25, 50)},
        {"input": flat(90, 20, 40), "labels": flat(120, 100, 100)},
    ]
    picture_grid(rows, tmp_path / "grid.png", column_width=100)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    titles = len(caption("input", 100))
    # 3 columns of 100, rows of 50 and 100 pixels; 4 pixels between and around.
    assert grid.shape == (4 + titles + 4 + 50 + 4 + 100 + 4, 4 + 3 * 104, 3)
    first, second = 8 + titles, 12 + titles + 50
    assert (grid[first : first + 50, 4:104] == 60).all()
    assert (grid[first : first + 50, 108:208] == 200).all()
    assert (grid[first : first + 50, 212:] == BACKGROUND).all()  # no labels in the first row
    assert (grid[second : second + 50, 4:104] == 90).all()
    assert (grid[second + 50 : second + 100, 4:104] == BACKGROUND).all()
    assert (grid[second : second + 100, 212:312] == 120).all()
    for column, title in enumerate(("input", "adapted", "labels")):
        left = 4 + column * 104
        np.testing.assert_array_equal(grid[4 : 4 + titles, left : left + 100], caption(title, 100))


def test_grid_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one picture"):
        picture_grid([{}], tmp_path / "grid.png")


def test_grid_into_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        picture_grid([{"a": flat(0, 4, 4)}], tmp_path / "nowhere" / "grid.png")
