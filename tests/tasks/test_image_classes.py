"""The accuracy of image classes against torchmetrics, and predictions that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from ttt_video.config import load_config
from ttt_video.tasks import ImageClassTask, LabelInfo, ScoredFrame, overlay_painter, score
from ttt_video.tasks.image_classes import cross_entropy
from ttt_video.tasks.prediction import PredictionStatistics


def record(logits, label: int) -> dict:
    return ImageClassTask()._record({"class_id": label}, {"image_class": torch.tensor(logits)})


def test_metrics_are_torchmetrics_and_torchs():
    torch.manual_seed(0)
    logits, labels = torch.randn(300, 12), torch.randint(12, (300,))
    frames = [
        ScoredFrame("v", i, {"image_classes": record(logits[i].tolist(), int(labels[i]))})
        for i in range(300)
    ]
    found = score(frames, LabelInfo(tuple("abcdefghijkl")), [ImageClassTask])
    for name, k in (("top1", 1), ("top5", 5)):
        expected = multiclass_accuracy(logits, labels, 12, average="micro", top_k=k)
        assert found[name] == pytest.approx(100 * expected.item(), rel=1e-6)
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert found["cross_entropy"] == pytest.approx(loss, rel=1e-9)
    of_classes = multiclass_accuracy(logits, labels, 12, average=None).tolist()
    for name, expected in zip("abcdefghijkl", of_classes, strict=True):
        assert found["per_class"]["top1"][name] == pytest.approx(100 * expected, rel=1e-6)


def test_known_predictions():
    assert record([0.0, 2.0, 1.0], 2)["top"] == [1, 2, 0]
    shares = np.exp([0.0, 2.0, 1.0])
    assert record([0.0, 2.0, 1.0], 2)["score"] == pytest.approx(shares[2] / shares.sum())
    assert record([1.0] * 7, 6)["top"] == [0, 1, 2, 3, 4]  # the first of equals
    assert record([1.0, math.nan, 0.0], 0) == {"label": 0, "top": [], "score": None}
    assert record([1.0, math.inf, 0.0], 1) == {"label": 1, "top": [], "score": None}
    assert "scores" not in record([0.0, 1.0], 0)
    sure = record([0.0, 2000.0], 0)
    assert sure["score"] == 0.0
    assert cross_entropy(sure) == pytest.approx(708.396, abs=1e-3)


def test_scores_are_recorded_with_the_steps():
    cfg = load_config("joint_cityscapes.yaml", opts=["TTT.RECORD_STEPS", "True"])
    output = {"image_class": torch.log(torch.tensor([0.2, 0.5, 0.3]))}
    found = ImageClassTask(cfg=cfg)._record({"class_id": 0}, output)
    assert found == {
        "label": 0, "top": [1, 2, 0], "score": pytest.approx(0.2), "scores": [0.5, 0.3, 0.2],
    }  # fmt: skip
    step = {key: found[key] for key in ("top", "score", "scores")}
    kept = ImageClassTask.with_steps(found, [found, found])
    assert kept.pop("steps") == [step, step]
    assert kept == {key: found[key] for key in ("label", "top", "score")}


def test_accuracy_after_each_step_counts_the_images_that_had_it():
    steps = [[[0], [1], [1]], [[1], [1]], []]
    frames = []
    for index, (tops, label) in enumerate(zip(steps, (1, 1, 0), strict=True)):
        kept = ImageClassTask.with_steps(
            {"label": label, "top": [1], "score": 0.5},
            [{"label": label, "top": top, "score": 0.5} for top in tops],
        )
        assert kept["steps"] == [{"top": top, "score": 0.5} for top in tops]
        frames.append(ScoredFrame("v", index, {"image_classes": kept}))
    found = score(frames, LabelInfo(), [ImageClassTask])
    accuracies = [found[f"top1_step_{n}"] for n in (1, 2, 3)]
    assert accuracies == [50.0, 100.0, 100.0]
    assert found["top1"] == pytest.approx(200 / 3)
    assert "top1_step_4" not in found


def test_the_entropy_of_an_image_is_that_of_its_classes():
    frame = {"video_id": "v", "frame_index": 0}
    output = {"image_class": torch.tensor([0.0, 0.0, 0.0, 0.0])}
    assert PredictionStatistics().record(frame, output) == {
        "classes": 1, "entropy": pytest.approx(math.log(4)), "finite": True,
    }  # fmt: skip
    broken = {"image_class": torch.tensor([0.0, math.nan])}
    assert PredictionStatistics().record(frame, broken)["finite"] is False


def test_the_picture_names_the_class_at_the_lower_end():
    metadata = type("Metadata", (), {"classes": ["cat", "dog"]})
    image = np.full((200, 300, 3), 100, np.uint8)
    drawn = {}
    for name, logits in (("cat", [9.0, 0.0]), ("dog", [0.0, 9.0])):
        output = {"image_class": torch.tensor(logits)}
        drawn[name] = overlay_painter(output, metadata)(image)
        assert (drawn[name][:179] == 100).all()
        assert drawn[name][180:].max() > 200
    assert not np.array_equal(drawn["cat"], drawn["dog"])
