"""Flicker and change by hand, over pairs of frames, and through an interruption."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from ttt_video.tasks import LabelInfo, ScoredFrame, Steadiness, score
from ttt_video.tasks.steadiness import change_counts

add_changes, change_shares = Steadiness.tally.sum, Steadiness.frame_metrics


def scores_of(classes: np.ndarray, num_classes: int = 4) -> torch.Tensor:
    return torch.from_numpy(
        np.eye(num_classes, dtype=np.float32)[classes].transpose(2, 0, 1).copy()
    )


def test_by_hand():
    previous, current = np.array([[0, 0, 1, 1, 2]]), np.array([[0, 1, 1, 0, 3]])
    then, now = np.array([[0, 0, 1, 1, 255]]), np.array([[0, 0, 1, 2, 255]])
    counts = change_counts(previous, current, then, now)
    # The fourth pixel's label changes too, the fifth has none.
    assert counts == {"changed": 3, "pixels": 5, "flickered": 1, "steady": 3}
    assert change_shares(counts) == {"change": 60.0, "flicker": pytest.approx(100 / 3)}


def test_without_labels_of_both_frames_there_is_change_alone():
    maps = np.array([[0, 1]]), np.array([[0, 2]])
    labels = np.array([[0, 0]])
    for pair in ((None, None), (labels, None), (None, labels)):
        counts = change_counts(*maps, *pair)
        assert change_shares(counts) == {"change": 50.0}


def test_nothing_steady_is_no_flicker_of_zero():
    void = np.array([[255, 255]])
    counts = change_counts(np.array([[0, 1]]), np.array([[1, 0]]), void, void)
    assert change_shares(counts) == {"change": 100.0, "flicker": None}


maps = hnp.arrays(np.int16, (3, 4), elements=st.integers(0, 2))


@given(a=maps, b=maps, labels=maps)
def test_symmetric_bounded_and_zero_for_the_same(a, b, labels):
    counts = change_counts(a, b, labels, labels)
    assert counts == change_counts(b, a, labels, labels)
    assert counts["flickered"] == counts["changed"] == (a != b).sum()
    same = change_counts(a, a, labels, b)
    assert same["changed"] == same["flickered"] == 0
    assert same["steady"] == (labels == b).sum()


@given(many=st.lists(st.tuples(maps, maps), min_size=1, max_size=5))
def test_pooling_pairs_is_counting_their_pixels_together(many):
    pooled = add_changes(change_counts(a, b) for a, b in many)
    stacked = [np.concatenate([pair[i] for pair in many]) for i in (0, 1)]
    assert pooled == change_counts(*stacked)


@pytest.fixture
def video(tmp_path):
    """Frames and outputs of a labelled video of noise."""
    rng = np.random.default_rng(0)
    frames = []
    for index in range(5):
        file = tmp_path / f"{index}.png"
        Image.fromarray(rng.choice(np.array([0, 1, 255], np.uint8), (6, 7))).save(file)
        frame = {"video_id": "a", "frame_index": index, "sem_seg_file_name": str(file)}
        frames.append((frame, {"sem_seg": scores_of(rng.integers(0, 4, (6, 7)))}))
    return frames


def test_frames_of_a_video_are_compared_with_the_one_before(video):
    evaluator = Steadiness()
    records = [evaluator.record(*pair) for pair in video]
    assert records[0] is None
    for (then, before), (now, output), record in zip(video, video[1:], records[1:], strict=False):
        classes = [o["sem_seg"].argmax(0).numpy() for o in (before, output)]
        labels = [np.asarray(Image.open(f["sem_seg_file_name"])) for f in (then, now)]
        assert record == change_counts(*classes, *labels)
        assert evaluator.frame_metrics(record).keys() == {"change", "flicker"}
    rows = [ScoredFrame("a", i, {"temporal": r}) for i, r in enumerate(records) if r]
    scores = score(rows, LabelInfo())
    assert scores["videos"]["a"]["labelled_frames"] == 0  # none is scored against its labels
    assert scores["flicker"] == change_shares(add_changes(records[1:]))["flicker"]


def test_other_videos_and_missing_frames_are_not_compared(video):
    evaluator = Steadiness()
    (first, output), (second, _), (third, _) = video[:3]
    assert evaluator.record(first, output) is None
    assert evaluator.record({**second, "video_id": "b"}, output) is None
    assert evaluator.record(third, output) is None  # after "b"
    evaluator.reset()
    assert evaluator.record(first, output) is None
    assert evaluator.record(third, output) is None  # the second was skipped
    evaluator.reset()
    assert evaluator.record(second, output) is None  # forgotten


def test_goes_on_from_its_state(video):
    whole, part, rest = (Steadiness() for _ in range(3))
    expected = [whole.record(*pair) for pair in video]
    for stop in range(len(video)):
        part.reset()
        records = [part.record(*pair) for pair in video[:stop]]
        file = io.BytesIO()
        torch.save(part.state_dict(), file)
        file.seek(0)
        rest.load_state_dict(torch.load(file, weights_only=True))
        assert records + [rest.record(*pair) for pair in video[stop:]] == expected


def test_panoptic_predictions_change_by_class_not_by_id():
    evaluator = Steadiness()
    ids = torch.tensor([[1, 1, 2, 0]], dtype=torch.int32)
    segments = [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 130}]
    other = [{"id": 1, "category_id": 130}, {"id": 2, "category_id": 5}]
    frame = {"video_id": "a", "frame_index": 0}
    assert evaluator.record(frame, {"panoptic_seg": (ids, segments)}) is None
    swapped = torch.tensor([[2, 2, 1, 1]], dtype=torch.int32)
    record = evaluator.record({**frame, "frame_index": 1}, {"panoptic_seg": (swapped, other)})
    assert record == {"changed": 1, "pixels": 4}  # where there was no segment


def test_instances_alone_have_no_class_map():
    assert Steadiness().record({"video_id": "a", "frame_index": 0}, {"instances": 1}) is None
