"""What detectron2's evaluators of stills are given to read."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from ttt_video.errors import UserError
from ttt_video.formats.labels import PANOPTIC_FORMAT, SEM_SEG_FORMAT_KEY
from ttt_video.tasks.stills import CheckedLabels, CheckedPanopticEvaluator


@pytest.fixture
def registered():
    """``registered(record)``: the name of a data set of one picture and three classes."""
    names = []

    def add(record):
        names.append(f"stills_{uuid.uuid4().hex}")
        DatasetCatalog.register(names[-1], lambda: [record])
        MetadataCatalog.get(names[-1]).set(
            stuff_classes=["a", "b", "c"],
            stuff_dataset_id_to_contiguous_id={k: k for k in range(3)},
            thing_dataset_id_to_contiguous_id={},
            ignore_label=255,
        )
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


@pytest.mark.parametrize("as_colors", [False, True])
def test_semantic_evaluation_of_either_kind_of_label_file(tmp_path, registered, as_colors):
    """mIoU by hand: class 0 has 2 of 3 pixels, class 2 has 1 of 2, class 1 is nowhere labelled."""
    labels = np.array([[0, 0, 2], [255, 0, 2]], np.uint8)
    predicted = torch.tensor([[0, 0, 2], [1, 1, 1]])
    pixels = np.stack([labels, labels * 0, labels * 0 + 5], axis=-1) if as_colors else labels
    Image.fromarray(pixels).save(tmp_path / "l.png")
    record = {"file_name": "f.png", "sem_seg_file_name": str(tmp_path / "l.png")}
    if as_colors:
        record[SEM_SEG_FORMAT_KEY] = PANOPTIC_FORMAT
    name = registered(record)
    evaluator = SemSegEvaluator(name, distributed=False, sem_seg_loading_fn=CheckedLabels(name))
    evaluator.reset()
    scores = torch.nn.functional.one_hot(predicted, 3).permute(2, 0, 1)
    evaluator.process([record], [{"sem_seg": scores}])
    result = evaluator.evaluate()["sem_seg"]
    assert result["mIoU"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    Image.fromarray(pixels + np.uint8(3)).save(tmp_path / "l.png")
    with pytest.raises(UserError, match=r"l\.png has label 3, but .* classes 0 to 2, and 255"):
        evaluator.process([record], [{"sem_seg": scores}])


def test_panoptic_evaluation_refuses_what_pillow_would_change(tmp_path, registered):
    file = tmp_path / "l.png"
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(file)
    record = {
        "file_name": "f.png",
        "image_id": 1,
        "pan_seg_file_name": str(file),
        "segments_info": [{"id": 0, "category_id": 2}],
    }
    evaluator = CheckedPanopticEvaluator(registered(record))
    evaluator.reset()
    outputs = [{"panoptic_seg": (torch.zeros(2, 3, dtype=torch.int32), [])}]
    evaluator.process([record], outputs)
    assert len(evaluator._predictions) == 1
    record["segments_info"] = [{"id": 0, "category_id": 3}]
    with pytest.raises(UserError, match=r"l\.png has label 3, but its data set has classes 0 to 2"):
        evaluator.process([record], outputs)
    record["segments_info"] = []
    Image.fromarray(np.zeros((2, 3), np.uint16)).save(file)
    with pytest.raises(UserError, match=r"l\.png is no label map of panoptic ids: it is 16-bit"):
        evaluator.process([record], outputs)
