"""examples/new_model.py under the contract of models, and in streams from the command line."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from model_contract import AdaptableModelContract
from PIL import Image

from ttt_video.config import load_config

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "new_model.py"
OPTIONS = ["MODEL.META_ARCHITECTURE", "SmallNetwork", "MODEL.DEVICE", "cpu"]


@pytest.fixture
def _forgotten():
    yield
    META_ARCH_REGISTRY._obj_map.pop("SmallNetwork", None)


@pytest.mark.usefixtures("_forgotten")
class TestSmallNetwork(AdaptableModelContract):
    @pytest.fixture
    def model(self):
        runpy.run_path(str(EXAMPLE))
        torch.manual_seed(0)
        return build_model(load_config("joint_cityscapes.yaml", opts=OPTIONS)).eval()


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("stream_eval", ROOT / "tools/stream_eval.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """The file that the first command of the docstring writes."""
    file = tmp_path_factory.mktemp("weights") / "small.pth"
    done = subprocess.run([sys.executable, EXAMPLE, file], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(file)


def command(text: str) -> list[str]:
    """The arguments of the second command of the docstring."""
    (found,) = re.findall(r"^python tools/stream_eval.py (.*)\\\n +(.*)$", text, re.MULTILINE)
    return " ".join(found).split()


@pytest.mark.slow
@pytest.mark.usefixtures("_forgotten")
@pytest.mark.parametrize(
    ("method", "record", "moved"),
    [
        ("online_ttt_mae", "loss_recon", True),
        ("tent", "loss_entropy", True),
        ("ln_adapt", "norm_shift", True),
        ("none", None, False),
    ],
)
def test_methods_run_on_it(tool, weights, tmp_path, capsys, method, record, moved):
    frames = tmp_path / "frames"
    frames.mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(frames / f"{index}.png")
    given = command(EXAMPLE.read_text())
    places = {"VIDEO": str(frames), "small.pth": weights, "online_ttt_mae": method}
    given = [places.get(word, word) for word in given]
    given[given.index("--video")] = "--video-dir"
    given[given.index("examples/new_model.py")] = str(EXAMPLE)
    flags = ["--no-video", "--compare", "--output", str(tmp_path / "run")]
    pairs = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "0", "TTT.OPTIMIZER.BASE_LR", "0.1"]
    tool.main([*flags, *given, *pairs, "TTT.BATCH_SIZE", "2", "TTT.MASK_KIND", "block"])
    lines = (tmp_path / "run" / "frames.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 3
    assert record is None or all(np.isfinite(row[record]) for row in rows)
    entropies = [
        [numbers["metrics"]["prediction_entropy"] for numbers in (row, row["frozen"])]
        for row in rows
    ]
    # Not in every frame: a step after which the loss grows is undone.
    assert any(ours != frozen for ours, frozen in entropies) == moved
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["jointly_trained"]
    assert summary["architecture"] == "SmallNetwork"
