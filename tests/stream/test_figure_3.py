"""examples/figure_3.py runs as it says, and what it prints follows the steps."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "figure_3.py"
SMALL = ["MODEL.DEVICE", "cpu", "TTT.BATCH_SIZE", "1", "TTT.STEPS_PER_FRAME", "3"]


@pytest.fixture
def said(monkeypatch, capsys, tmp_path):
    """``said(arguments...)`` runs the example in an own folder; gives each line's numbers."""

    def run(*arguments: str) -> list[list[float]]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments, *SMALL])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        *lines, last = capsys.readouterr().out.splitlines()
        assert last == "written: figure_3.png"
        return [[float(word) for word in line.split()] for line in lines]

    return run


def test_a_drawn_street(said, tmp_path):
    lines = said("INPUT.MIN_SIZE_TEST", "64")
    assert [line[0] for line in lines] == [0, 1, 2, 3]
    assert lines[-1][1] < lines[0][1]  # l_s of one mask
    assert all(0.2 < right < 1 for *_, right in lines)
    with Image.open(tmp_path / "figure_3.png") as picture:  # 3 columns of 400, 4 rows of 200 px
        assert picture.width == 3 * 404 + 4
        assert 4 * 204 < picture.height < 5 * 204


def test_steps_of_no_length_change_nothing(said, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    (tmp_path / "frames").mkdir()
    Image.fromarray(pixels).save(tmp_path / "frames" / "0.png")
    opts = ["INPUT.MIN_SIZE_TEST", "32", "TTT.OPTIMIZER.BASE_LR", "1e-30"]
    lines = said(str(tmp_path / "frames"), *opts)
    assert [line[0] for line in lines] == [0, 1, 2, 3]
    assert len({line[1] for line in lines}) == 1  # and without labels nothing else
    assert {len(line) for line in lines} == {2}
