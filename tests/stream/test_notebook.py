"""examples/notebook.ipynb: its cells run in order, and it keeps no outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def test_the_cells_run_in_order(capsys):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    names: dict[str, Any] = {}
    shown = []
    for cell in code:
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "notebook", "exec"), names)
        if last is not None:  # Jupyter shows it
            shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), names))
    picture, losses, shares, confidence, segments = shown
    assert picture.size == confidence.size == (128, 64)
    assert len(losses) == 6
    assert {"road", "sky"} <= shares.keys()  # it was trained on such streets
    assert sum(pixels for _, pixels in segments) <= 64 * 128
    assert np.asarray(confidence).max() > 200
    said = capsys.readouterr().out.split()
    assert len(said) == 2  # the loss of the first frame does not know how long the video is
