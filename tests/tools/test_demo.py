"""The demo, on two frames."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

TOOLS = Path(__file__).parents[2] / "tools"
FILES = {"frames.jsonl", "grid.png", "loss_recon.png", "miou.png", "overlay.mp4", "summary.json"}


@pytest.fixture
def demo(tmp_path, monkeypatch, capsys):
    """``demo(KEY, VALUE...)``; gives what it printed."""
    monkeypatch.syspath_prepend(str(TOOLS))
    main = runpy.run_path(str(TOOLS / "demo.py"))["main"]

    def run(*opts: str) -> str:
        if "demo_world" in DatasetCatalog.list():  # of a run before, in this process
            DatasetCatalog.remove("demo_world")
            MetadataCatalog.remove("demo_world")
        main(["--frames", "2", "--output", str(tmp_path), "MODEL.DEVICE", "cpu", *opts])
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_other_settings_run_beside_and_the_same_are_found_again(demo, tmp_path):
    said = demo("TTT.BATCH_SIZE", "1")
    (first,) = tmp_path.glob("*/run*")
    assert str(first) in said
    assert {file.name for file in first.iterdir()} >= FILES
    rows = (first / "frames.jsonl").read_text()
    demo("TTT.BATCH_SIZE", "2")
    (second,) = set(tmp_path.glob("*/run*")) - {first}
    assert json.loads((second / "summary.json").read_text())["settings"]["BATCH_SIZE"] == 2
    demo("TTT.BATCH_SIZE", "1")
    assert len(list(tmp_path.glob("*/run*"))) == 2
    assert (first / "frames.jsonl").read_text() == rows
