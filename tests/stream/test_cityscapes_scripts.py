"""Cityscapes' own evaluation reads the files of ``--save cityscapes`` and finds our mIoU."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from ttt_video.data import register_custom_video
from ttt_video.data.cityscapes import CITYSCAPES_CLASSES, NUM_LABEL_IDS, train_ids
from ttt_video.data.sources import FrameTransform, open_dataset
from ttt_video.stream import RunDirectory, Settings, StreamEvaluation
from ttt_video.stream.saving import SavedPredictions

NAME = "scored_by_cityscapes"


@pytest.fixture
def labels(tmp_path) -> dict[str, Path]:
    """Registers a video of noise with random labels; gives the files of label ids by frame."""
    ids = {}
    for folder in ("frames", "labels", "ids"):
        (tmp_path / folder).mkdir()
    rng = np.random.default_rng(0)
    for index in range(3):
        stem = f"aachen_000001_{index:06d}"
        values = rng.integers(0, NUM_LABEL_IDS, (12, 16), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        pixels = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        ids[stem] = tmp_path / "ids" / f"{stem}_gtFine_labelIds.png"
        Image.fromarray(values).save(ids[stem])
        Image.fromarray(pixels).save(tmp_path / "frames" / f"{stem}.png")
        Image.fromarray(train_ids(values)).save(tmp_path / "labels" / f"{stem}.png")
    places = (str(tmp_path / name) for name in ("frames", "labels"))
    register_custom_video(NAME, *places, list(CITYSCAPES_CLASSES))
    yield ids
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def test_cityscapes_scripts_find_our_mean_iou(labels, tiny_cfg, tiny_model, tmp_path):
    theirs = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    tiny_cfg.merge_from_list(["TTT.BATCH_SIZE", 1])
    run = RunDirectory(tmp_path / "run")
    sink = SavedPredictions(tiny_cfg, run.path, ["cityscapes"], compare=True, dataset_name=NAME)
    settings = Settings(tiny_cfg, run, dataset_name=NAME, sinks=[sink], compare=True)
    sources = open_dataset(NAME, FrameTransform(min_size=0))
    summary = StreamEvaluation(settings, copy.deepcopy(tiny_model)).evaluate(sources)
    theirs.args.quiet, theirs.args.evalInstLevelScore = True, False
    theirs.args.JSONOutput = False
    for who, folder in (("adapted", "cityscapes"), ("frozen", "cityscapes_frozen")):
        # Its main() does so with CITYSCAPES_RESULTS, which it reads when it is imported.
        theirs.args.predictionPath, theirs.args.predictionWalk = str(run.path / folder), None
        files = [str(file) for file in labels.values()]
        predictions = [theirs.getPrediction(theirs.args, file) for file in files]
        found = theirs.evaluateImgLists(predictions, files, theirs.args)["averageScoreClasses"]
        assert 100 * found == pytest.approx(summary["metrics"][who]["mIoU"], abs=1e-9)
        assert found > 0
