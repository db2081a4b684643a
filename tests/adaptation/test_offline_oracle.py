"""What the offline oracle chooses its step by: the data set's own metric, of its own labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from PIL import Image

from ttt_video.adaptation.offline_ttt_mae_oracle import scorer


@pytest.fixture
def score(tiny_cfg):
    """``score(frame, output, KEY=VALUE of the metadata...)``."""
    names = []

    def run(frame, output, **metadata):
        names.append(f"oracle_{len(names)}")
        MetadataCatalog.get(names[-1]).set(**metadata)
        tiny_cfg.DATASETS.TEST = (names[-1],)
        return scorer(tiny_cfg)([frame], lambda _: output)

    yield run
    for name in names:
        MetadataCatalog.remove(name)


def test_models_of_several_tasks_are_scored_on_the_labels_of_the_data_set(score, tmp_path):
    """All objects are found and all segments missed: AP 100, PQ 0."""
    Image.fromarray(np.full((8, 8, 3), (5, 0, 0), np.uint8)).save(tmp_path / "pan.png")
    corners = [0, 0, 8, 0, 8, 8, 0, 8]
    frame = {
        "pan_seg_file_name": str(tmp_path / "pan.png"),
        "segments_info": [{"id": 5, "category_id": 0, "iscrowd": 0, "area": 64}],
        "annotations": [{"category_id": 0, "segmentation": [corners], "iscrowd": 0, "area": 64}],
    }
    found = Instances((8, 8), pred_masks=torch.ones(1, 8, 8), scores=torch.ones(1))
    found.pred_classes = torch.zeros(1, dtype=torch.int64)
    output = {"instances": found, "panoptic_seg": (torch.zeros(8, 8, dtype=torch.int32), [])}
    assert score(frame, output, evaluator_type="video_instance") == pytest.approx(100)
    assert score(frame, output, evaluator_type="video_panoptic") == 0


@pytest.mark.parametrize(("ignored", "expected"), [(7, 100), (255, 25)])
def test_labels_that_the_data_set_ignores_do_not_count(score, tmp_path, ignored, expected):
    labels = np.zeros((8, 8), np.uint8)
    labels[:4] = 7
    Image.fromarray(labels).save(tmp_path / "labels.png")
    scores = torch.zeros(19, 8, 8)
    scores[0] = 1
    frame = {"sem_seg_file_name": str(tmp_path / "labels.png")}
    metadata = {"evaluator_type": "video_sem_seg", "ignore_label": ignored}
    assert score(frame, {"sem_seg": scores}, **metadata) == expected
