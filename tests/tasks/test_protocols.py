"""Protocols by name: what is averaged over what, which frames count, and the rule in words."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ttt_video.tasks import (
    InstanceTask,
    LabelInfo,
    PanopticTask,
    ScoredFrame,
    headlines,
    metrics,
    rules,
    score,
)
from ttt_video.tasks.metrics import mean


def frame(index: int, counts: dict, video: str = "a") -> ScoredFrame:
    return ScoredFrame(video, index, {"sem_seg": counts})


def test_the_three_averages_of_one_example():
    frames = [
        frame(0, {"0": [1, 0, 1]}),  # 1/2
        frame(1, {"0": [3, 1, 0]}),  # 3/4
        frame(0, {"0": [9, 0, 1]}, "b"),  # 9/10
    ]
    scores = score(frames, LabelInfo())
    assert scores["mIoU"] == pytest.approx(100 * 13 / 16)
    assert scores["mIoU_frame_release"] == pytest.approx((50 + 75 + 90) / 3)
    assert scores["mIoU_video_mean"] == pytest.approx((100 * 4 / 6 + 90) / 2)


@given(st.lists(st.lists(st.floats(0, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_release_mean_is_the_mean_of_videos_weighted_by_length(videos):
    """As the release computes it: each video's mean, weighted by its number of frames."""
    means, lengths = [np.mean(v) for v in videos], [len(v) for v in videos]
    expected = np.sum(np.array(means) * lengths) / np.sum(lengths)
    release_mean = metrics()["mIoU_frame_release"].value
    assert release_mean([*itertools.chain(*videos)]) == pytest.approx(expected, abs=1e-9)
    for order in itertools.islice(itertools.permutations(videos), 5):
        pooled = [release_mean([*itertools.chain(*each)]) for each in (videos, order)]
        assert pooled[0] == pooled[1]


def test_release_scores_every_tenth_frame_of_coco_videos():
    """Rule: frames 0, 10, 20, ... of a video, also where others are labelled. Pooled takes all."""
    frames = [frame(i, {"0": [i % 10 == 0, 0, i % 10 != 0]}) for i in range(25)]
    assert score(frames, LabelInfo(period=10))["mIoU_frame_release"] == 100.0
    assert score(frames, LabelInfo())["mIoU_frame_release"] == pytest.approx(100 * 3 / 25)
    assert score(frames, LabelInfo(period=10))["mIoU"] == pytest.approx(100 * 3 / 25)


def test_release_leaves_out_frames_without_ground_truth():
    """Rule: such a frame has no number, is in no mean and in no weight."""
    frames = [frame(0, {"0": [1, 0, 0]}), frame(1, {}), frame(2, {"0": [0, 0, 1]})]
    scores = score(frames, LabelInfo())
    assert scores["mIoU_frame_release"] == 50.0
    assert scores["videos"]["a"]["frames"] == 3


def test_which_labelled_frames_the_release_leaves_out():
    """Rule: those where the metric is undefined, which PQ never is: all void is 0."""
    void = {"sem_seg": {}, "panoptic_seg": {"standard": {}, "release": {}}}
    whole = {
        "sem_seg": {"0": [1, 0, 0]},
        "panoptic_seg": {"standard": {"0": [1, 0, 0, 1.0]}, "release": {"0": [1, 0, 0, 1.0]}},
    }
    scores = score([ScoredFrame("a", 0, void), ScoredFrame("a", 1, whole)], LabelInfo())
    assert scores["mIoU_frame_release"] == 100.0
    assert scores["PQ_frame_release"] == 50.0
    for metric, rule in rules(["mIoU_frame_release", "PQ_frame_release"]).items():
        assert "mean over the frames of a video for which that is defined" in rule, metric
        assert "frames without labels are left out, and so are those that could not be" in rule


def test_absent_classes_are_in_no_mean_of_their_frames_but_in_that_of_others():
    frames = [frame(0, {"0": [1, 0, 0]}), frame(1, {"1": [0, 0, 4]})]
    scores = score(frames, LabelInfo(("road", "car")))
    assert scores["per_class"]["IoU"] == {"road": 100.0, "car": 0.0}
    assert scores["mIoU"] == 50.0


def test_videos_without_a_number_are_in_no_video_mean():
    scores = score([frame(0, {"0": [1, 0, 1]}), frame(0, {}, "b")], LabelInfo())
    assert scores["videos"]["b"]["mIoU"] is None
    assert scores["mIoU_video_mean"] == 50.0


def test_numbers_of_a_video_are_those_of_a_run_of_that_video_alone():
    rng = np.random.default_rng(0)
    frames = [
        ScoredFrame(
            video,
            i,
            {
                "sem_seg": {str(k): rng.integers(0, 9, 3).tolist() for k in range(3)},
                "panoptic_seg": {
                    "standard": {"1": [1, 2, 3, 0.75 + i / 64]},
                    "release": {"1": [1, 2, 3, 0.75]},
                },
            },
        )
        for video in "ab"
        for i in range(4)
    ]
    info = LabelInfo(things=frozenset({1}))
    together = score(frames, info)
    for video in "ab":
        alone = score([f for f in frames if f.video_id == video], info)
        own = {k: v for k, v in alone.items() if k not in ("per_class", "videos")}
        own = {k: v for k, v in own.items() if not k.endswith("_video_mean")}
        assert together["videos"][video] == {"frames": 4, "labelled_frames": 4, **own}
    assert set(together) >= {"mIoU", "PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"}
    assert together["PQ_stuff"] is None


def test_no_things_known_no_split():
    record = {"panoptic_seg": {"standard": {"1": [1, 0, 0, 1.0]}, "release": {}}}
    scores = score([ScoredFrame("a", 0, record)], LabelInfo())
    assert "PQ_things" not in scores
    assert scores["per_class"]["SQ"] == {"1": 100.0}


def test_nothing_scored_is_nothing():
    assert score([], LabelInfo()) == {}
    assert mean([]) is None


def test_every_metric_has_its_rule_in_words():
    names = {*metrics(), *(f"{name}_video_mean" for name in headlines())}
    # The release has no colorization and no image classes.
    others = {"PSNR", "top1"}
    assert names >= {f"{name}_frame_release" for name in headlines() if name not in others}
    found = rules(names)
    assert found.keys() == names
    assert len(set(found.values())) == len(names)
    assert all(len(text) > 20 for text in found.values())
    assert "every 10th" in found["PQ_frame_release"]
    assert "0 where predicted but not labelled" in found["mIoU_frame_release"]
    assert rules(["videos", "per_class"]) == {}


def test_label_info_of_data_sets():
    assert LabelInfo.of("") == LabelInfo.of(None) == LabelInfo()
    name = "test_protocols_label_info"
    metadata = MetadataCatalog.get(name)
    try:
        metadata.set(
            evaluator_type="video_panoptic",
            stuff_classes=["cat", "sky"],
            thing_classes=["cat"],
            thing_dataset_id_to_contiguous_id={17: 0},
            ignore_label=200,
            label_period=10,
        )
        info = LabelInfo.of(name)
        assert info == LabelInfo(("cat", "sky"), frozenset({0}), 200, 10)
        assert [info.name(k) for k in (1, 2)] == ["sky", "2"]
    finally:
        MetadataCatalog.remove(name)
    kitti = LabelInfo.of("kitti_step_video_sem_seg_val")
    assert kitti.classes[:2] == ("road", "sidewalk")
    assert (len(kitti.classes), kitti.ignore_label, kitti.period) == (19, 255, 1)


@pytest.mark.parametrize(
    ("info", "category"),
    [
        (LabelInfo(), 255),
        (LabelInfo(classes=("a",) * 133, things=frozenset(range(80))), 255),
        (LabelInfo(classes=("a",) * 255), 255),
        (LabelInfo(classes=("a",) * 256), None),
        (LabelInfo(things=frozenset({0, 255})), None),
        (LabelInfo(classes=("a", "b"), ignore_label=2), 2),
        (LabelInfo(classes=("a", "b"), ignore_label=1), None),
    ],
)
def test_a_class_is_not_the_unlabelled_category(info, category):
    assert info.unlabelled_category == category


@pytest.mark.parametrize(("classes", "pq", "release"), [(300, 50.0, 50.0), (133, 100.0, 100.0)])
def test_segments_of_category_255(tmp_path, classes, pq, release):
    """A class is found, category 255 is missed: a class of 300, and unlabelled beside 133."""
    ids = np.repeat([[1, 2]], 4, axis=0).astype(np.uint8)
    Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1)).save(tmp_path / "ids.png")
    frame = {
        "pan_seg_file_name": str(tmp_path / "ids.png"),
        "segments_info": [{"id": 1, "category_id": 4}, {"id": 2, "category_id": 255}],
    }
    predicted = torch.from_numpy((ids == 1).astype(np.int32))
    info = LabelInfo(classes=tuple(map(str, range(classes))), things=frozenset())
    record = PanopticTask(info).record(
        frame, {"panoptic_seg": (predicted, [{"id": 1, "category_id": 4, "isthing": False}])}
    )
    numbers = score([ScoredFrame("a", 0, {"panoptic_seg": record})], info)
    assert (numbers["PQ"], numbers["PQ_frame_release"]) == (pq, release)


@pytest.mark.parametrize(("classes", "stuff"), [(300, 2), (133, 1)])
def test_the_releases_stuff_of_category_255(classes, stuff):
    info = LabelInfo(classes=tuple(map(str, range(classes))), things=frozenset({0}))
    found = Instances((2, 2))
    found.pred_masks = torch.zeros(0, 2, 2)
    found.scores, found.pred_classes = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    frame = {
        "annotations": [],
        "segments_info": [{"id": 1, "category_id": 9}, {"id": 2, "category_id": 255}],
    }
    assert InstanceTask(info).record(frame, {"instances": found})["stuff"] == stuff
