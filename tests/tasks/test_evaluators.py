"""Evaluators through detectron2's interface, on data sets in the layouts that are scored."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.structures import Instances
from PIL import Image

from ttt_video.data.coco_videos import coco_videos_metadata, load_coco_video
from ttt_video.errors import UserError
from ttt_video.formats.labels import read_segment_ids
from ttt_video.tasks import (
    ColorizationTask,
    ColorStatistics,
    Consistency,
    InstanceTask,
    LabelInfo,
    PanopticTask,
    PredictionStatistics,
    ScoredFrame,
    SemanticTask,
    Steadiness,
    build_tasks,
    score,
    score_frame,
    tasks,
)
from ttt_video.world.layouts import write_coco_videos
from ttt_video.world.video import WorldVideo


def scores_of(classes: np.ndarray, num_classes: int = 19) -> torch.Tensor:
    return torch.from_numpy(
        np.eye(num_classes, dtype=np.float32)[classes].transpose(2, 0, 1).copy()
    )


@pytest.fixture
def sem_seg_frames(tmp_path):
    """Labelled frames of noise of two videos, and predictions that are half right."""
    rng = np.random.default_rng(0)
    frames = []
    for index in range(6):
        labels = rng.choice(np.array([0, 1, 10, 255], np.uint8), (8, 9))
        predicted = np.where(rng.random((8, 9)) < 0.5, labels % 19, rng.integers(0, 12, (8, 9)))
        file = tmp_path / f"{index}.png"
        Image.fromarray(labels).save(file)
        frame = {
            "file_name": f"{index}.jpg",
            "sem_seg_file_name": str(file),
            "video_id": "ab"[index % 2],
            "frame_index": index // 2,
        }
        frames.append((frame, {"sem_seg": scores_of(predicted)}))
    return frames


@pytest.fixture
def register():
    """``register(**metadata)``: the name of a data set."""
    names = []

    def add(records=(), **metadata):
        names.append(f"test_evaluators_{len(names)}")
        DatasetCatalog.register(names[-1], lambda: list(records))
        MetadataCatalog.get(names[-1]).set(**metadata)
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_semantic_through_detectron2s_interface(sem_seg_frames, register):
    classes = [f"class {k}" for k in range(19)]
    name = register([f for f, _ in sem_seg_frames], stuff_classes=classes, ignore_label=255)
    theirs = SemSegEvaluator(name, distributed=False)
    ours = SemanticTask(LabelInfo.of(name))
    theirs.reset()
    for evaluator in (theirs, ours):
        for pair in zip(sem_seg_frames[::2], sem_seg_frames[1::2], strict=True):
            inputs, outputs = zip(*pair, strict=True)
            evaluator.process(list(inputs), list(outputs))
    expected, results = theirs.evaluate()["sem_seg"], ours.evaluate()["sem_seg"]
    assert results["mIoU"] == pytest.approx(expected["mIoU"], abs=1e-9)
    for k in (0, 1, 10):
        key = f"IoU-class {k}"
        assert results[key] == pytest.approx(expected[key], abs=1e-9)
    assert not any(isinstance(value, dict) for value in results.values())
    ours.reset()
    assert ours.evaluate() == {"sem_seg": {}}


def test_records_are_json_and_curves_are_of_the_frame_alone(sem_seg_frames):
    evaluator = SemanticTask()
    for frame, output in sem_seg_frames:
        record = evaluator.record(frame, output)
        assert json.loads(json.dumps(record)) == record
        metrics = evaluator.frame_metrics(record)
        alone = score([ScoredFrame("a", 0, {"sem_seg": record})], LabelInfo())
        assert metrics == {key: alone[key] for key in ("mIoU", "mIoU_frame_release")}
        assert metrics["mIoU_frame_release"] < metrics["mIoU"]  # classes that are not there


def test_unlabelled_frames_have_no_record():
    for evaluator in (SemanticTask, PanopticTask, InstanceTask):
        assert evaluator().record({"file_name": "x"}, {}) is None


def test_a_required_output_that_is_missing_is_told(sem_seg_frames):
    frame, _ = sem_seg_frames[0]
    assert SemanticTask().record(frame, {"instances": 1}) is None
    with pytest.raises(UserError, match=r"0.jpg.*sem_seg.*instances.*SEMANTIC_ON"):
        SemanticTask(required=True).record(frame, {"instances": 1})


@pytest.mark.parametrize(("value", "size"), [(19, (8, 9)), (0, (8, 8))])
def test_labels_that_do_not_fit_are_told_with_their_file(sem_seg_frames, value, size):
    frame, output = sem_seg_frames[0]
    Image.fromarray(np.full(size, value, np.uint8)).save(frame["sem_seg_file_name"])
    with pytest.raises(UserError, match=r"0.png does not fit") as error:
        SemanticTask().record(frame, output)
    assert "\n" not in str(error.value)


def test_a_label_that_is_no_class_of_the_data_set_is_no_class_of_the_model(sem_seg_frames):
    """Label 1 of a set of one class would be scored as the model's class 1."""
    frame, output = sem_seg_frames[0]
    two = LabelInfo(classes=("road",), ignore_label=255)
    Image.fromarray(np.full((8, 9), 7, np.uint8)).save(frame["sem_seg_file_name"])
    with pytest.raises(UserError, match=r"0\.png has label 7, but its data set has classes 0 to 0"):
        SemanticTask(two).record(frame, output)
    Image.fromarray(np.full((8, 9), 255, np.uint8)).save(frame["sem_seg_file_name"])
    assert SemanticTask(two).record(frame, output) == {}


@pytest.mark.parametrize("things", [None, frozenset({0, 1})])
def test_a_category_that_is_no_class_is_told_with_its_file(tmp_path, things):
    info = LabelInfo(classes=("cat", "dog"), things=things)
    file = tmp_path / "l.png"
    Image.fromarray(np.zeros((2, 2, 3), np.uint8)).save(file)
    objects = Instances((2, 2), pred_masks=torch.zeros(0, 2, 2), scores=torch.zeros(0))
    objects.pred_classes = torch.zeros(0, dtype=torch.int64)
    predicted = {
        "panoptic_seg": (torch.zeros(2, 2, dtype=torch.int32), []),
        "instances": objects,
    }
    rle = {"size": [2, 2], "counts": [4]}
    for category, known in ((1, True), (255, True), (2, False), (-1, False)):
        label = {"id": 5, "category_id": category, "segmentation": rle}
        frame = {
            "file_name": "f.jpg",
            "pan_seg_file_name": str(file),
            "segments_info": [label],
            "annotations": [label],
        }
        for evaluator in (PanopticTask(info), InstanceTask(info)):
            if known:
                evaluator.record(frame, predicted)
                continue
            with pytest.raises(UserError, match=rf"(l\.png|f\.jpg) has label {category}, but its"):
                evaluator.record(frame, predicted)


@pytest.mark.parametrize(
    ("kind", "evaluator"),
    [
        ("video_sem_seg", SemanticTask),
        ("sem_seg", SemanticTask),
        ("video_panoptic", PanopticTask),
        ("video_instance", InstanceTask),
        ("video_color", ColorizationTask),
    ],
)
def test_a_data_sets_type_says_what_is_scored(tiny_cfg, register, kind, evaluator):
    name = register(evaluator_type=kind, thing_classes=["cat"], ignore_label=7)
    built = build_tasks(name)
    everywhere = [Steadiness, Consistency, PredictionStatistics, ColorStatistics]
    assert {type(e) for e in built} == {evaluator, *everywhere}
    assert len(built) == 5
    assert [type(e) for e in built if e.required] == [evaluator]
    assert all(e.info.ignore_label == 7 for e in built)


def test_without_a_type_frames_are_scored_on_the_labels_they_have(
    tiny_cfg, register, sem_seg_frames
):
    for name in ("", None, register(stuff_classes=[str(k) for k in range(11)])):
        built = build_tasks(name)
        assert len({e.name for e in built}) == len(built) == len(tasks())
        frame, output = sem_seg_frames[0]
        row = score_frame(built, frame, output)
        assert row["records"].keys() == {"sem_seg", "prediction"}
        assert row["metrics"].keys() >= {"mIoU", "predicted_classes"}
        unlabelled = {"video_id": "a", "frame_index": 1}
        row = score_frame(built, unlabelled, output)
        assert row["records"].keys() == {"temporal", "prediction"}
        assert row["records"]["temporal"]["changed"] == 0


def test_a_row_is_the_records_of_each_evaluator_alone(tiny_cfg, sem_seg_frames):
    together = build_tasks("")
    alone = build_tasks("")
    for frame, output in sem_seg_frames[::2]:
        row = score_frame(together, frame, output)
        records = {e.name: e.record(frame, output) for e in alone}
        assert row["records"] == {k: v for k, v in records.items() if v is not None}
        assert "class_map" not in output  # the model's output is left as it is


def test_an_output_that_nobody_scores_gives_an_empty_row(tiny_cfg):
    assert score_frame(build_tasks(""), {}, {"picture": 1}) == {}


def test_an_evaluator_without_state_refuses_one():
    evaluator = SemanticTask()
    evaluator.load_state_dict(evaluator.state_dict())
    with pytest.raises(ValueError, match="no state"):
        evaluator.load_state_dict({"x": 1})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world video of 12 frames in COCO Videos' layout, two of them labelled."""
    root = tmp_path_factory.mktemp("coco_videos")
    write_coco_videos(root, "town", WorldVideo(3, 12, 64, 96))
    return root


def perfect_panoptic(frame: dict) -> dict:
    """The labels as a prediction; unlabelled segments are predicted as sky, which is wrong."""
    ids = read_segment_ids(frame["pan_seg_file_name"])
    segments = [{"id": s["id"], "category_id": s["category_id"]} for s in frame["segments_info"]]
    sky = coco_videos_metadata("panoptic")["stuff_classes"].index("sky-other-merged")
    for segment in segments:
        if segment["category_id"] == 255:
            segment["category_id"] = sky
    return {"panoptic_seg": (torch.from_numpy(ids), segments)}


def test_a_perfect_prediction_of_coco_videos_panoptic(world, tiny_cfg, register):
    records = load_coco_video(world, "town", "panoptic")
    name = register(records, **coco_videos_metadata("panoptic"))
    evaluator, *_ = build_tasks(name)
    labelled = [f for f in records if "pan_seg_file_name" in f]
    assert [f["frame_index"] for f in labelled] == [0, 10]
    assert evaluator.record(records[1], {}) is None
    rows = []
    for frame in labelled:
        assert any(s["category_id"] == 255 for s in frame["segments_info"])
        record = evaluator.record(frame, perfect_panoptic(frame))
        rows.append(ScoredFrame("town", frame["frame_index"], {"panoptic_seg": record}))
    scores = score(rows, evaluator.info)
    for metric in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "PQ_video_mean"):
        assert scores[metric] == 100.0
    # What is predicted on the unlabelled category is false by the release's rule.
    assert 0 < scores["PQ_frame_release"] < 100
    assert scores["videos"]["town"]["frames"] == 2
    assert "car" in scores["per_class"]["PQ"] or "tree-merged" in scores["per_class"]["PQ"]


def test_a_perfect_prediction_of_coco_videos_instances(world, tiny_cfg, register):
    records = load_coco_video(world, "town", "instance")
    name = register(records, **coco_videos_metadata("instance"))
    evaluator, *_ = build_tasks(name)
    rows = []
    for frame in records:
        if "annotations" not in frame:
            continue
        ids = read_segment_ids(frame["pan_seg_file_name"])
        predicted = Instances(ids.shape)
        own = [ids == a["id"] for a in frame["annotations"]]
        predicted.pred_masks = torch.from_numpy(np.stack(own)).float()
        predicted.scores = torch.linspace(0.5, 0.9, len(own))
        predicted.pred_classes = torch.tensor([a["category_id"] for a in frame["annotations"]])
        record = evaluator.record(frame, {"instances": predicted})
        assert record["stuff"] >= 3
        rows.append(ScoredFrame("town", frame["frame_index"], {"instances": record}))
    scores = score(rows, evaluator.info)
    assert scores["AP"] == scores["AP50"] == pytest.approx(100.0)
    # Things alone cannot be all segments.
    assert 0 < scores["AP_frame_release"] < 60
    assert set(scores["per_class"]["AP"]) <= set(coco_videos_metadata("instance")["thing_classes"])
