"""What a model says, whether or not it is right: class maps, numbers of classes, entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import entropy

from ttt_video.tasks import LabelInfo, PredictionStatistics, ScoredFrame, score
from ttt_video.tasks.outputs import (
    class_map,
    mean_entropy,
    predicted_classes,
    scores_are_finite,
)
from ttt_video.tasks.prediction import Predictions


def instances(scores, classes) -> Instances:
    result = Instances((2, 2))
    result.scores = torch.tensor(scores, dtype=torch.float32)
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return result


few = st.sampled_from([0.0, 0.25, 1.0])  # so that scores are often equal


@given(scores=hnp.arrays(np.float32, (4, 3, 5), elements=few))
def test_the_first_of_the_highest_scores_wins(scores):
    output = {"sem_seg": torch.from_numpy(scores)}
    classes = class_map(output)
    assert classes.dtype == np.int16
    assert (classes == scores.argmax(0)).all()
    assert predicted_classes(output) == set(scores.argmax(0).ravel().tolist())


def test_class_map_of_panoptic_segments():
    segments = [{"id": 3, "category_id": 132}, {"id": 1, "category_id": 0}]
    output = {"panoptic_seg": (torch.tensor([[0, 1], [3, 3]], dtype=torch.int32), segments)}
    assert class_map(output).tolist() == [[-1, 0], [132, 132]]
    assert predicted_classes(output) == {0, 132}
    nothing = {"panoptic_seg": (torch.zeros(1, 2, dtype=torch.int32), [])}
    assert class_map(nothing).tolist() == [[-1, -1]]
    assert predicted_classes(nothing) == frozenset()


def test_classes_of_instances_are_those_that_score():
    output = {"instances": instances([0.9, 0.5, 0.49], [3, 1, 2])}
    assert class_map(output) is None
    assert predicted_classes(output) == {1, 3}


def test_entropy_of_class_scores_is_scipys():
    scores = torch.rand(5, 9, 13, generator=torch.Generator().manual_seed(0))
    expected = entropy(scores[:, ::4, ::4].numpy(), axis=0).mean()
    assert mean_entropy({"sem_seg": scores}) == pytest.approx(expected, rel=1e-5)
    assert mean_entropy({"sem_seg": torch.ones(5, 4, 4)}) == pytest.approx(math.log(5))
    certain = torch.zeros(5, 4, 4)
    certain[2] = 3
    assert mean_entropy({"sem_seg": certain}) == 0


def test_entropy_of_instances_and_of_nothing():
    assert mean_entropy({"instances": instances([0.5, 1.0], [0, 1])}) == pytest.approx(
        math.log(2) / 2
    )
    assert mean_entropy({"instances": instances([], [])}) is None
    assert mean_entropy({"panoptic_seg": (None, [])}) is None
    assert mean_entropy({"sem_seg": torch.full((2, 4, 4), math.nan)}) is None


def test_a_record_of_every_frame_labels_or_not():
    evaluator = PredictionStatistics()
    record = evaluator.record({}, {"sem_seg": torch.ones(3, 4, 4)})
    assert record == {"classes": 1, "entropy": pytest.approx(math.log(3)), "finite": True}
    assert evaluator.frame_metrics(record).keys() == {"predicted_classes", "prediction_entropy"}
    assert evaluator.record({}, {"picture": 1}) is None
    colours = evaluator.record({}, {"color": torch.zeros(3, 4, 4, dtype=torch.uint8)})
    assert colours == {"finite": True}
    assert evaluator.frame_metrics(colours) == {}
    frames = [ScoredFrame("a", i, {"prediction": {"finite": bool(i)}}) for i in range(3)]
    scores = score(frames, LabelInfo())
    assert scores["nonfinite_frames"] == 1
    assert not any(name.startswith("predict") for name in scores)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_score_that_is_not_finite_is_seen(bad):
    scores = torch.ones(3, 9, 9)
    assert scores_are_finite({"sem_seg": scores})
    scores[1, 6, 7] = bad  # no pixel that the entropy looks at
    assert not scores_are_finite({"sem_seg": scores})
    assert scores_are_finite({"instances": instances([0.5, 0.25], [0, 1])})
    assert not scores_are_finite({"instances": instances([0.5, bad], [0, 1])})
    assert scores_are_finite({"panoptic_seg": (None, []), "instances": instances([], [])})
    assert scores_are_finite({"another_task": torch.ones(3)})
    assert not scores_are_finite({"another_task": torch.tensor([1.0, bad])})
    colours = torch.zeros(3, 2, 2, dtype=torch.uint8)
    for known in (True, torch.tensor(True)):
        assert scores_are_finite({"color": colours, "finite": known})
    assert not scores_are_finite({"color": colours, "finite": torch.tensor(False)})


def test_summary_is_in_order_of_video_and_frame():
    first = ([3, 1, 2, 4, 8, 2, 2, 0], [0.5, 1.5, *[1.0] * 4, math.nan, 2.0])
    total = Predictions([first[0], [5]], [first[1], [math.nan]], 2)
    numbers = {}
    for name, metric in PredictionStatistics.metrics.items():
        numbers[name] = metric.value(total)
        numbers |= metric.details(total) if metric.details else {}
    assert numbers == {
        "nonfinite_frames": 2,
        "predicted_classes_mean": 3.0,
        "predicted_classes_min": 0,
        "predicted_classes_last": 5,
        "predicted_classes_first_quarter": 3.0,
        "predicted_classes_last_quarter": pytest.approx(7 / 3),
        "prediction_entropy_mean": pytest.approx(8 / 7),
        "prediction_entropy_max": 2.0,
        "prediction_entropy_first_quarter": 1.0,
        "prediction_entropy_last_quarter": 2.0,
    }
    rows = [
        ScoredFrame(video, i, {"prediction": {"classes": n, "entropy": None, **more}})
        for video, i, n, more in (
            ("b", 1, 7, {"finite": False}), ("a", 0, 5, {}), ("b", 0, 9, {"finite": True})
        )
    ]  # fmt: skip
    scores = score(rows, LabelInfo())
    assert scores["predicted_classes_last"] == 7
    assert scores["predicted_classes_first_quarter"] == 7  # of 5 and 9
    assert scores["prediction_entropy_mean"] is None
    assert scores["prediction_entropy_last_quarter"] is None
    assert scores["videos"]["a"]["predicted_classes_last"] == 5
    assert scores["nonfinite_frames"] == scores["videos"]["b"]["nonfinite_frames"] == 1
    assert scores["videos"]["a"]["nonfinite_frames"] == 0
