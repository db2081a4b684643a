"""How far two models' predictions of a frame are apart: one number for each kind of task."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from skimage.color import deltaE_ciede2000, rgb2lab

from ttt_video.stream.records import summarize
from ttt_video.tasks import differences, tasks
from ttt_video_cli.stream import report


def scores_of(classes) -> dict:
    return {"sem_seg": torch.nn.functional.one_hot(torch.tensor(classes), 4).permute(2, 0, 1)}


def panoptic_of(ids, *categories) -> dict:
    segments = [{"id": i, "category_id": k} for i, k in enumerate(categories, 1)]
    return {"panoptic_seg": (torch.tensor(ids, dtype=torch.int32), segments)}


def instances_of(masks, scores, classes) -> dict:
    masks = torch.tensor(masks, dtype=torch.float32)
    found = Instances(tuple(masks.shape[1:]))
    found.pred_masks, found.scores = masks, torch.tensor(scores)
    found.pred_classes = torch.tensor(classes)
    return {"instances": found}


def test_pixels_of_another_class():
    assert differences(scores_of([[0, 1], [2, 3]]), scores_of([[0, 1], [3, 2]])) == {
        "other_class": 50.0
    }
    # Segments are numbered anew in each prediction; 0 is no segment.
    first, second = panoptic_of([[1, 1], [2, 0]], 5, 7), panoptic_of([[2, 1], [1, 1]], 7, 5)
    assert differences(first, second) == {"other_class": 50.0}
    # The best instance lies on top; those below 0.5 are none.
    one = instances_of([[[1, 1], [0, 0]], [[0, 1], [0, 1]]], [0.6, 0.9], [3, 4])
    two = instances_of([[[1, 1], [0, 0]], [[0, 1], [0, 1]]], [0.7, 0.4], [3, 4])
    assert differences(one, two) == {"other_class": 50.0}
    # The whole prediction is compared as it is drawn.
    both = {**scores_of([[0, 0], [0, 0]]), **first}
    assert differences(both, {**scores_of([[1, 1], [1, 1]]), **first}) == {"other_class": 0.0}


def test_colours_are_compared_as_scikit_image_does():
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 256, (2, 16, 24, 3), np.uint8)
    outputs = [{"color": torch.from_numpy(x).permute(2, 0, 1)} for x in (first, second)]
    expected = deltaE_ciede2000(*(rgb2lab(x[::4, ::4]) for x in (first, second))).mean()
    assert differences(*outputs) == {"color_distance": pytest.approx(expected, rel=1e-4)}


def test_images_differ_by_their_highest_logit():
    outputs = [{"image_class": torch.tensor(x)} for x in ([0.0, 2.0, 1.0], [0.0, 3.0, 0.0])]
    assert differences(*outputs) == {"other_image_class": 0.0}
    outputs[1] = {"image_class": torch.tensor([4.0, 3.0, 0.0])}
    assert differences(*outputs) == {"other_image_class": 100.0}


def test_what_no_task_compares_has_no_number():
    assert differences({"boxes": 1}, {"boxes": 2}) == {}


def test_every_task_that_is_drawn_says_how_far_models_are_apart():
    drawn = [task for task in tasks() if task.picture_rank is not None]
    lacking = [
        task.name
        for task in drawn
        if task.difference is None and task.__module__.startswith("ttt_video.")
    ]
    assert lacking == []


def row_of(index: int, apart: float, **metrics: float) -> dict:
    part = {"predict_seconds": 0.1, "metrics": metrics}
    place = {"video_id": "a", "frame_index": index, "adapt_seconds": 0.1}
    return {**place, **part, "frozen": {**part, "differences": {"other_class": apart}}}


def test_the_console_says_so_where_there_are_no_labels():
    summary = summarize([row_of(0, 1.0), row_of(1, 2.0)])
    assert summary["differences"] == {"other_class": 1.5}
    summary |= {"skipped_frames": [], "settings": SimpleNamespace()}
    said = "frozen and adapted differ: 1.50 % of the pixels have another class, mean over frames"
    assert said in report(summary).splitlines()
    scored = {**summary, "metrics": {"adapted": {"mIoU": 40.0}}}
    assert "differ" not in report(scored)
    alone = [{k: v for k, v in row_of(0, 1.0).items() if k != "frozen"}]
    assert "differences" not in summarize(alone)
