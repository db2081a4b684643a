"""examples/plain_stream.py runs as it says, on a drawn street and on a folder of frames."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_stream.py"
SMALL = ["MODEL.DEVICE", "cpu", "TTT.BATCH_SIZE", "1", "INPUT.MIN_SIZE_TEST", "32"]


@pytest.fixture
def said(monkeypatch, capsys):
    """``said(arguments...)`` runs the example; gives index, loss and pixels by class of a line."""

    def run(*arguments: str) -> list[tuple[int, float, dict[str, int]]]:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments, *SMALL])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        lines = [line.split(" ", 2) for line in capsys.readouterr().out.splitlines()]
        return [(int(i), float(loss), ast.literal_eval(seen)) for i, loss, seen in lines]

    return run


@pytest.mark.slow
def test_a_drawn_street(said):
    lines = said()
    assert [index for index, _, _ in lines] == [*range(5)]
    for _, loss, seen in lines:
        assert 0 < loss < 10
        assert sum(seen.values()) == 64 * 128
        assert {"road", "sky"} <= seen.keys()  # it was trained on such streets


def test_a_folder_of_frames(said, tmp_path):
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
    lines = said(str(tmp_path))
    assert [(index, sum(seen.values())) for index, _, seen in lines] == [(0, 2048), (1, 2048)]
