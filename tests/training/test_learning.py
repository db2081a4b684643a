"""Joint training learns on small sets in exactly the layouts of Cityscapes and COCO."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import python_path

from ttt_video.world.layouts import write_cityscapes, write_coco
from ttt_video.world.video import WorldFrame

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
QUICK = [
    "MODEL.SWIN.EMBED_DIM", "16",
    "MODEL.SWIN.DEPTHS", "[1, 1, 1, 1]",
    "MODEL.SWIN.NUM_HEADS", "[1, 2, 4, 8]",
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "1",
    "MODEL.MASK_FORMER.DEC_LAYERS", "3",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", "512",
    "SOLVER.IMS_PER_BATCH", "4",
    "SOLVER.WARMUP_ITERS", "5",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "1.0",
    "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip
COCO = ["INPUT.MIN_SCALE", "1.0", "INPUT.MAX_SCALE", "1.0", "INPUT.IMAGE_SIZE", "64"]
CITYSCAPES = ["INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.CROP.SIZE", "[64, 64]"]
SKY, ROAD, PERSON, CAR = 10, 0, 11, 13


def still(seed: int) -> WorldFrame:
    """A red car and a green person, large, at random places of a road below the sky."""
    rng = np.random.default_rng(seed)
    sem_seg = np.full((64, 64), SKY, np.uint8)
    sem_seg[rng.integers(24, 32) :] = ROAD
    instances = np.zeros((64, 64), np.int32)
    x, y = rng.integers(0, 14), rng.integers(20, 40)
    sem_seg[y : y + 20, x : x + 28], instances[y : y + 20, x : x + 28] = CAR, 1
    x, y = rng.integers(44, 50), rng.integers(10, 30)
    sem_seg[y : y + 30, x : x + 14], instances[y : y + 30, x : x + 14] = PERSON, 2
    colors = np.zeros((256, 3), np.uint8)
    colors[[SKY, ROAD, PERSON, CAR]] = (90, 140, 220), (90, 90, 90), (40, 200, 60), (210, 40, 40)
    image = colors[sem_seg] + rng.integers(0, 20, (64, 64, 3)).astype(np.uint8)
    return WorldFrame(image, sem_seg, instances, np.ones((64, 64), np.float32))


@pytest.fixture(scope="module")
def datasets_root(tmp_path_factory):
    """Eight stills each; validation is a part of training, as learning is what is asked about."""
    root = tmp_path_factory.mktemp("datasets")
    for split, number in (("train", 8), ("val", 4)):
        stills = [still(seed) for seed in range(number)]
        write_cityscapes(root / "cityscapes", split, "town", stills)
        write_coco(root / "coco", split, stills)
    return root


def command(config: str, out: Path, *args: object) -> list[str]:
    tool = [sys.executable, str(ROOT / "tools/train_net.py"), "--config", f"quick/{config}.yaml"]
    flags = [str(a) for a in args if str(a).startswith("--")]
    opts = [str(a) for a in args if not str(a).startswith("--")]
    return [*tool, *flags, "OUTPUT_DIR", str(out), *QUICK, *opts]


def environment(root: Path) -> dict[str, str]:
    paths = {"DETECTRON2_DATASETS": str(root), "PYTHONPATH": python_path()}
    return {**os.environ, **paths, "OMP_NUM_THREADS": "1"}


def run(root: Path, *args: object) -> None:
    done = subprocess.run(command(*args), env=environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize(
    ("config", "opts", "metric"),
    [
        ("joint_cityscapes", CITYSCAPES, "sem_seg/mIoU"),
        ("joint_coco_instance", COCO, "segm/AP"),
        ("joint_coco_panoptic", COCO, "panoptic_seg/PQ"),
    ],
)
def test_losses_fall_and_evaluation_improves(datasets_root, tmp_path, config, opts, metric):
    steps = 120
    run(
        datasets_root, config, tmp_path, *opts, "SOLVER.MAX_ITER", steps,
        "SOLVER.BASE_LR", "0.003", "TEST.EVAL_PERIOD", steps // 8,
    )  # fmt: skip
    rows = rows_of(tmp_path)

    for name, ratio in (("total_loss", 0.8), ("loss_dice", 0.8), ("loss_recon", 0.75)):
        values = [row[name] for row in rows if name in row]  # medians of twenty steps
        assert values[-1] < ratio * values[0], (name, values)
    scores = [row[metric] for row in rows if metric in row]
    assert len(scores) >= 4
    assert scores[-1] > scores[0]
    best = json.loads((tmp_path / "model_best.json").read_text())
    assert best["metric"] == metric
    assert best["value"] >= max(scores)  # not every evaluation is in a row of metrics.json


def test_killed_again_and_again_it_ends_where_an_uninterrupted_run_does(datasets_root, tmp_path):
    """kill -9 at three random moments: before, between and while checkpoints are written."""
    opts = [
        *CITYSCAPES,
        "SOLVER.MAX_ITER",
        30,
        "SOLVER.CHECKPOINT_PERIOD",
        2,
        "TEST.EVAL_PERIOD",
        10,
    ]
    args = ("joint_cityscapes", tmp_path / "killed", *opts)
    started = time.monotonic()
    run(datasets_root, "joint_cityscapes", tmp_path / "whole", *opts)
    whole_time = time.monotonic() - started
    rng = random.Random()
    for _ in range(3):
        process = subprocess.Popen(
            command(*args, "--resume"),
            env=environment(datasets_root),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0.2, 0.9) * whole_time)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(datasets_root, *args, "--resume")

    expected, actual = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=False)
        for name in ("whole", "killed")
    )
    assert expected["iteration"] == actual["iteration"] == 29
    assert expected["model"].keys() == actual["model"].keys()
    for name, value in expected["model"].items():
        assert torch.equal(value, actual["model"][name]), name
    # Steps that were lost and made again are in the log twice, with the same numbers.
    measured = [
        {(row["iteration"], k): v for row in rows_of(tmp_path / name) for k, v in row.items()
         if k == "sem_seg/mIoU"}
        for name in ("whole", "killed")
    ]  # fmt: skip
    assert measured[0] == measured[1]
    assert len(measured[0]) >= 2
