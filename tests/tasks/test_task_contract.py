"""The built-in tasks under contract, on three small frames of noise."""

from __future__ import annotations

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.structures import Instances
from PIL import Image
from task_contract import TaskContract

from ttt_video.tasks import (
    ColorizationTask,
    ColorStatistics,
    Consistency,
    ImageClassTask,
    InstanceTask,
    Metric,
    PanopticTask,
    PredictionStatistics,
    SemanticTask,
    Steadiness,
    headlines,
    metrics,
    tasks,
)

HEIGHT, WIDTH, CLASSES = 8, 9, 3


@pytest.fixture
def noise_video(tmp_path):
    """Three frames that have the labels of every task, with every output."""
    rng = np.random.default_rng(0)
    video = []
    for index in range(3):
        labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (HEIGHT, WIDTH))
        Image.fromarray(labels).save(tmp_path / f"{index}.png")
        ids = np.stack([labels + 1, 0 * labels, 0 * labels], -1)  # 255 + 1 is 0, no segment
        Image.fromarray(ids).save(tmp_path / f"{index}_ids.png")
        segments = [{"id": int(k) + 1, "category_id": int(k)} for k in np.unique(labels)[:-1]]
        thing = mask_util.encode(np.asfortranarray((labels == 0).astype(np.uint8)))
        frame = {
            "file_name": f"{index}.jpg",
            "video_id": "a",
            "frame_index": index,
            "height": HEIGHT,
            "width": WIDTH,
            "sem_seg_file_name": str(tmp_path / f"{index}.png"),
            "pan_seg_file_name": str(tmp_path / f"{index}_ids.png"),
            "segments_info": segments,
            "annotations": [{"category_id": 0, "segmentation": thing}],
            "original": rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8),
            "class_id": index,
        }
        scores = rng.random((CLASSES, HEIGHT, WIDTH), np.float32)
        predicted = scores.argmax(0)
        present = np.unique(predicted).tolist()
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_masks = torch.from_numpy(np.stack([predicted == k for k in present]))
        instances.scores = torch.linspace(0.9, 0.6, len(present))
        instances.pred_classes = torch.tensor(present)
        found = [{"id": k + 1, "category_id": k, "isthing": k == 0} for k in present]
        output = {
            "sem_seg": torch.from_numpy(scores),
            "panoptic_seg": (torch.from_numpy(predicted + 1), found),
            "instances": instances,
            "color": torch.from_numpy(rng.integers(0, 256, (3, HEIGHT, WIDTH), np.uint8)),
            "image_class": torch.from_numpy(rng.standard_normal(CLASSES, np.float32)),
        }
        video.append((frame, output))
    return video


class _OnNoise(TaskContract):
    @pytest.fixture
    def video(self, noise_video):
        return noise_video


class TestSemantic(_OnNoise):
    task = SemanticTask


class TestPanoptic(_OnNoise):
    task = PanopticTask


class TestInstances(_OnNoise):
    task = InstanceTask


class TestSteadiness(_OnNoise):
    task = Steadiness


class TestConsistency(_OnNoise):
    task = Consistency

    @pytest.fixture
    def video(self, noise_video):
        """Nine frames, because a clip has eight."""
        many = enumerate(noise_video * 3)
        return [({**frame, "frame_index": index}, output) for index, (frame, output) in many]


class TestPredictionStatistics(_OnNoise):
    task = PredictionStatistics


class TestColorization(_OnNoise):
    task = ColorizationTask


class TestColorStatistics(_OnNoise):
    task = ColorStatistics


class TestImageClasses(_OnNoise):
    task = ImageClassTask


def test_all_built_in_tasks_are_under_contract():
    classes = [
        SemanticTask, PanopticTask, InstanceTask, Steadiness, Consistency,
        PredictionStatistics, ColorizationTask, ColorStatistics, ImageClassTask,
    ]  # fmt: skip
    assert tasks() == classes
    assert headlines() == ["mIoU", "PQ", "AP", "PSNR", "top1"]
    assert len(metrics()) == sum(len(task.metrics) for task in classes)


def test_two_metrics_of_one_name_are_refused():
    class Other(Metric):
        name = "PQ"

        value = None

    with pytest.raises(ValueError, match="a metric 'PQ' already"):
        SemanticTask.add_metric(Other)
