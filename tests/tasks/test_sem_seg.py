"""Counts and mean IoU against detectron2's evaluator and against arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ttt_video.tasks.semantic import (
    add_counts,
    class_counts,
    class_iou,
    confusion_matrix,
    mean_iou,
    mean_iou_release,
)

NUM_CLASSES = 5


def counts_of(predicted: np.ndarray, labels: np.ndarray, num_classes: int = NUM_CLASSES):
    return class_counts(confusion_matrix(predicted, labels, num_classes))


@pytest.fixture(scope="module")
def detectron2_says():
    """detectron2's results for pairs of label maps, its files replaced by arrays."""
    name = "test_sem_seg_against_detectron2"
    labels_by_file: dict[str, np.ndarray] = {}
    DatasetCatalog.register(
        name, lambda: [{"file_name": k, "sem_seg_file_name": k} for k in labels_by_file]
    )
    MetadataCatalog.get(name).set(
        stuff_classes=[f"class {k}" for k in range(NUM_CLASSES)], ignore_label=255
    )

    def evaluate(pairs):
        labels_by_file.clear()
        labels_by_file.update({str(i): labels for i, (_, labels) in enumerate(pairs)})
        evaluator = SemSegEvaluator(
            name,
            distributed=False,
            sem_seg_loading_fn=lambda file, dtype: labels_by_file[file].astype(dtype),
        )
        evaluator.reset()
        for i, (predicted, _) in enumerate(pairs):
            scores = np.eye(NUM_CLASSES, dtype=np.float32)[predicted].transpose(2, 0, 1)
            evaluator.process(
                [{"file_name": str(i)}], [{"sem_seg": torch.from_numpy(scores.copy())}]
            )
        return evaluator.evaluate()["sem_seg"]

    yield evaluate
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


# Maps of few classes, so that classes go missing on either side, with unlabelled pixels.
maps = st.tuples(st.integers(1, 6), st.integers(1, 6)).flatmap(
    lambda shape: st.tuples(
        hnp.arrays(np.int64, shape, elements=st.integers(0, NUM_CLASSES - 1)),
        hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 1, 2, NUM_CLASSES - 1, 255])),
    )
)


@settings(max_examples=150)
@given(pairs=st.lists(maps, min_size=1, max_size=3))
def test_pooled_iou_is_detectron2s(detectron2_says, pairs):
    ours = add_counts(counts_of(predicted, labels) for predicted, labels in pairs)
    if mean_iou(ours) is None:  # nothing labelled: detectron2 gives NaN
        return
    theirs = detectron2_says(pairs)
    ious = class_iou(ours)
    for k in range(NUM_CLASSES):
        expected = theirs[f"IoU-class {k}"]
        assert np.isnan(expected) == (k not in ious)
        if k in ious:
            assert ious[k] == pytest.approx(expected)
    assert mean_iou(ours) == pytest.approx(theirs["mIoU"])


def test_by_hand():
    labels = np.array([[0, 0, 0, 1], [1, 255, 255, 2]], np.uint8)
    predicted = np.array([[0, 0, 1, 1], [3, 0, 3, 0]])
    confusion = confusion_matrix(predicted, labels, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    counts = class_counts(confusion)
    assert counts == {"0": [2, 1, 1], "1": [1, 1, 1], "2": [0, 0, 1], "3": [0, 1, 0]}
    ious = class_iou(counts)
    # Class 3 is predicted and never labelled: it is not in the mean, its pixel is an error of 1.
    assert ious == pytest.approx({0: 50.0, 1: 100 / 3, 2: 0.0})
    assert mean_iou(counts) == pytest.approx((50 + 100 / 3 + 0) / 3)


def test_perfect_and_hopeless():
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    assert mean_iou(counts_of(np.array([[0, 1], [2, 4]]), labels)) == 100.0
    assert mean_iou(counts_of(np.array([[1, 2], [0, 4]]), labels)) == 0.0


def test_nothing_labelled_is_no_score():
    labels = np.full((2, 2), 255, np.uint8)
    counts = counts_of(np.zeros((2, 2), int), labels)
    assert counts == {}
    assert class_iou(counts) == {}
    assert mean_iou(counts) is None
    assert mean_iou({}) is None


@given(pairs=st.lists(maps, max_size=4))
def test_pooling_frames_is_counting_their_pixels_together(pairs):
    pooled = add_counts(counts_of(*pair) for pair in pairs)
    flat = [np.concatenate([pair[i].ravel() for pair in pairs] or [[]]) for i in (0, 1)]
    predicted, labels = (a.astype(np.int64)[None] for a in flat)
    assert pooled == counts_of(predicted, labels)
    assert list(pooled) == sorted(pooled, key=int)


def test_pooling_is_not_the_mean_over_frames():
    good, bad = {"0": [9, 0, 1]}, {"0": [0, 5, 5]}
    assert mean_iou(add_counts([good, bad])) == pytest.approx(100 * 9 / 20)
    assert (mean_iou(good) + mean_iou(bad)) / 2 == pytest.approx(45 - 0.0)
    assert mean_iou(add_counts([good, {"1": [0, 0, 3]}])) == pytest.approx(45.0)
    assert add_counts([]) == {}


def test_pooling_leaves_its_arguments_alone():
    a, b = {"0": [1, 2, 3]}, {"0": [1, 1, 1]}
    assert add_counts([a, b]) == {"0": [2, 3, 4]}
    assert (a, b) == ({"0": [1, 2, 3]}, {"0": [1, 1, 1]})


@given(pair=maps)
def test_confusion_counts_every_labelled_pixel_once(pair):
    predicted, labels = pair
    confusion = confusion_matrix(predicted, labels, NUM_CLASSES)
    assert confusion.shape == (NUM_CLASSES, NUM_CLASSES)
    assert confusion.dtype == np.int64
    expected = np.zeros((NUM_CLASSES, NUM_CLASSES), int)
    for p, t in zip(predicted.ravel(), labels.ravel(), strict=True):
        if t != 255:
            expected[t, p] += 1
    assert (confusion == expected).all()


def test_another_ignore_label():
    labels, predicted = np.array([[0, 1, 7]]), np.array([[0, 0, 1]])
    assert confusion_matrix(predicted, labels, 2, ignore_label=7).tolist() == [[1, 0], [1, 0]]
    assert confusion_matrix(predicted, labels % 7, 2, ignore_label=-1).tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(
    ("predicted", "labels", "words"),
    [
        ([[0, 1]], [[0, 5]], "label 5 is not a class of 0..4"),
        ([[0, 5]], [[0, 1]], "prediction 5 is not a class of 0..4"),
        ([[0, -1]], [[0, 1]], "prediction -1 is not a class"),
        ([[0, 1]], [[0, -1]], "label -1 is not a class"),
        ([[0, 1]], [[0, 256]], "label 256 is not a class"),
        ([[0, 1]], [[0, 1, 1]], "differ in shape"),
        # Broadcasting would make these fit.
        ([[0], [1]], [[0, 1]], "differ in shape"),
    ],
)
def test_maps_that_cannot_be_compared_are_refused(predicted, labels, words):
    with pytest.raises(ValueError, match=words):
        confusion_matrix(np.array(predicted), np.array(labels), NUM_CLASSES)


def test_many_pixels_do_not_overflow_small_label_types():
    labels = np.full((300, 300), 18, np.uint8)  # 18 * 19 > 255
    confusion = confusion_matrix(labels, labels, 19)
    assert confusion[18, 18] == 90_000
    assert confusion.sum() == 90_000


def test_release_counts_a_class_that_is_predicted_but_not_labelled_as_zero():
    """Rule of detectron2 0.6: such a class is in the mean; today's detectron2 leaves it out."""
    labels = np.array([[0, 0, 0, 0, 255]], np.uint8)
    predicted = np.array([[0, 0, 0, 3, 4]])
    counts = counts_of(predicted, labels)
    assert mean_iou(counts) == pytest.approx(75.0)
    assert mean_iou_release(counts) == pytest.approx(75.0 / 2)
    # What is predicted where nothing is labelled (class 4) counts for neither.


def test_release_has_no_number_for_a_frame_without_labels():
    assert mean_iou_release({}) is None
    assert mean_iou_release({"1": [0, 1, 0]}) is None


@given(pair=maps)
def test_release_and_standard_rule_agree_where_all_predicted_classes_are_labelled(pair):
    predicted, labels = pair
    predicted = np.where(np.isin(predicted, labels), predicted, labels[labels < 255].min(initial=0))
    counts = counts_of(predicted, labels)
    if set(np.unique(predicted[labels != 255])) <= set(np.unique(labels)):
        assert mean_iou_release(counts) == mean_iou(counts)


@given(pair=maps)
def test_release_rule_is_detectron2_0_6s(pair):
    """Its lines in plain arithmetic: the sum over labelled classes over the number of classes
    that are labelled or predicted."""
    predicted, labels = pair
    counted = labels != 255
    present = [k for k in range(NUM_CLASSES) if (labels[counted] == k).any()]
    either = [k for k in range(NUM_CLASSES) if k in present or (predicted[counted] == k).any()]
    result = mean_iou_release(counts_of(predicted, labels))
    if not present:
        assert result is None
        return
    ious = [
        ((predicted == k) & (labels == k)).sum()
        / (counted & ((predicted == k) | (labels == k))).sum()
        for k in present
    ]
    assert result == pytest.approx(100 * sum(ious) / len(either), abs=1e-9)
