"""examples/custom_dataset.py, run as a stranger would: outside the repository, own data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools import mask as rle

from ttt_video.config import load_config
from ttt_video.data.checking import DatasetCheck
from ttt_video.errors import UserError
from ttt_video.plugins import run_files

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "custom_dataset.py"
DOCS = ROOT / "docs" / "custom_dataset.md"

TINY = [
    "MODEL.DEVICE", "cpu",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2",
    "MODEL.SWIN.DEPTHS", "[1, 1, 1, 1]",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1",
    "MODEL.MASK_FORMER.DEC_LAYERS", "2",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "64",
    "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64",
    "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.MAX_ITER", "3",
]  # fmt: skip


@pytest.fixture
def data_set(tmp_path: Path) -> tuple[Path, Path]:
    """Five pictures of a box and a triangle; category ids with gaps, as COCO's have.

    Masks are polygons and, in every second picture, run lengths.
    """
    images = tmp_path / "pictures"
    images.mkdir()
    rng = np.random.default_rng(0)
    content: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "box"}, {"id": 7, "name": "triangle"}],
    }
    shapes = {3: [10, 10, 40, 10, 40, 50, 10, 50], 7: [50, 20, 90, 20, 70, 60]}
    for i in range(5):
        name = f"{i}.png"
        pixels = rng.integers(0, 256, (70, 100, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / name)
        content["images"].append({"id": i + 1, "file_name": name, "height": 70, "width": 100})
        for category, polygon in shapes.items():
            x, y = polygon[::2], polygon[1::2]
            box = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": i + 1,
                    "category_id": category,
                    "segmentation": run_lengths(polygon) if i % 2 else [polygon],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(content))
    return images, annotations


def run_lengths(polygon: list[int]) -> dict[str, Any]:
    """A polygon as the project's own layout of COCO has masks."""
    (shape,) = rle.frPyObjects([polygon], 70, 100)
    return {"size": shape["size"], "counts": shape["counts"].decode()}


def run(script: Path, data_set: tuple[Path, Path], cwd: Path, *opts: str) -> str:
    command = [sys.executable, script, *data_set, *TINY, *opts]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def copy_outside(text: str, tmp_path: Path) -> Path:
    script = tmp_path / "mine" / "train.py"
    script.parent.mkdir()
    script.write_text(text)
    return script


def losses(output: Path) -> set[str]:
    rows = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return {key for row in rows for key in row if key.startswith("loss_")}


def predictions(printed: str) -> list[tuple[str, str]]:
    return re.findall(r"^.*?(\d\.png): (box|triangle) [01]\.\d\d, \d+ px$", printed, re.M)


@pytest.mark.slow
def test_a_stranger_trains_and_predicts(data_set, tmp_path):
    script = copy_outside(EXAMPLE.read_text(), tmp_path)
    printed = run(script, data_set, script.parent, "OUTPUT_DIR", "run")
    assert [name for name, _ in predictions(printed)] == [f"{i}.png" for i in range(5)]
    output = script.parent / "run"
    assert losses(output) == {
        f"loss_{kind}" for kind in ("ce", "mask", "dice", "ce_0", "mask_0", "dice_0", "recon")
    }
    state = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert state["backbone.patch_embed.proj.weight"].shape[1] == 4
    assert state["sem_seg_head.predictor.class_embed.weight"].shape[0] == 2 + 1


@pytest.mark.slow
def test_the_published_training_as_the_page_says(data_set, tmp_path):
    """JointTrainer in DefaultTrainer's place, without the lines that only the latter needs."""
    text = EXAMPLE.read_text()
    swap = "from ttt_video.training.joint_training import JointTrainer as DefaultTrainer"
    assert f"```python\n{swap}\n```" in DOCS.read_text()
    line = "from ttt_video.config import load_config\n"
    text = text.replace(line, f"{line}{swap}\n")
    text, dropped = re.subn(r"^cfg\.(MODEL\.MASK_ON|SOLVER)\b.*\n", "", text, flags=re.M)
    assert dropped == 3
    script = copy_outside(text, tmp_path)
    printed = run(script, data_set, script.parent, "OUTPUT_DIR", "run", "INPUT.IMAGE_SIZE", "64")
    assert len(predictions(printed)) == 5
    assert "loss_recon" in losses(script.parent / "run")


# ---- what the page says


def test_the_page_shows_the_script_itself():
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    assert EXAMPLE.read_text() in blocks


def test_the_script_is_about_twenty_lines():
    code = EXAMPLE.read_text().split('"""', 2)[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 26


@pytest.mark.parametrize("kind", ["register_custom_video", "register_custom_coco_video"])
def test_the_calls_on_the_page_register(kind, data_set, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.M | re.S)
    (block,) = [block for block in blocks if f"import {kind}\n" in block]
    (tmp_path / "my_sets.py").write_text(block)
    images, annotations = data_set
    folder = tmp_path / ("alley" if kind == "register_custom_video" else "park")
    shutil.copytree(images, folder / "frames")
    shutil.copy(annotations, folder)
    (folder / "labels").mkdir()
    Image.fromarray(np.ones((70, 100), np.uint8)).save(folder / "labels" / "3.png")
    monkeypatch.chdir(tmp_path)
    run_files(["my_sets.py"])
    try:
        labelled = DatasetCheck(folder.name)
        assert labelled.problems == []
        expected = 1 if kind == "register_custom_video" else 5
        assert labelled.lines[0].startswith("5 frames in 1 video(s) of 5, ")
        assert len(labelled.labelled) == expected
    finally:
        DatasetCatalog.remove(folder.name)
        MetadataCatalog.remove(folder.name)
    with pytest.raises(UserError, match=r"nobody\.py: no such file"):
        run_files(["nobody.py"])


def test_config_keys_on_the_page_exist():
    keys = set(re.findall(r"\b(?:[A-Z][A-Z0-9_]*\.)+[A-Z][A-Z0-9_]*\b", DOCS.read_text()))
    assert len(keys) >= 5
    for key in keys:
        node = load_config("quick/joint_coco_instance.yaml")
        for part in key.split("."):
            assert part in node, key
            node = node[part]
