"""Mask AP against pycocotools and hotcoco on wild cases, and against hand arithmetic."""

from __future__ import annotations

import contextlib
import io
import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ttt_video.errors import UserError
from ttt_video.tasks import InstanceTask, LabelInfo, ScoredFrame, score
from ttt_video.tasks.average_precision import (
    AREA_RANGES,
    Detections,
    average_precision,
    frame_average_precision,
    mask_ious,
    mask_overlaps,
    match_class,
)

SIZE = (8, 9)
NUM_CLASSES = 3
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def rle(mask: np.ndarray) -> dict:
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def box(top: int, left: int, height: int, width: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def instances(masks, scores, classes, size=SIZE) -> Instances:
    result = Instances(size)
    stacked = np.stack(masks) if len(masks) else np.zeros((0, *size))
    result.pred_masks = torch.from_numpy(stacked.astype(np.float32))
    result.pred_boxes = Boxes(torch.zeros(len(masks), 4))
    result.scores = torch.tensor(scores, dtype=torch.float32)
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return result


def coco_json(frames) -> tuple[dict, list]:
    """Ground truth and results of frames (annotations, Instances) in COCO's format."""
    truth = {
        "images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(frames))],
        "categories": [{"id": k, "name": str(k)} for k in range(NUM_CLASSES)],
        "annotations": [],
    }
    results = []
    for i, (annotations, predicted) in enumerate(frames):
        for a in annotations:
            extra = {"image_id": i, "id": len(truth["annotations"]) + 1, "bbox": [0, 0, 1, 1]}
            truth["annotations"].append({**a, **extra})
        results += [
            {"image_id": i, "category_id": int(k), "score": float(s), "segmentation": rle(m)}
            for m, s, k in zip(
                predicted.pred_masks.numpy(), predicted.scores, predicted.pred_classes, strict=True
            )
        ]
    return truth, results


def coco_says(frames) -> tuple[dict, np.ndarray]:
    """AP of frames in percent (NaN undefined), and by class."""
    dataset, results = coco_json(frames)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.where(evaluation.stats[:6] < 0, np.nan, 100 * evaluation.stats[:6])
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    by_class = [
        100 * p[p > -1].mean() if (p > -1).any() else np.nan for p in np.moveaxis(precision, 2, 0)
    ]
    return dict(zip(METRICS, stats, strict=True)), np.array(by_class)


def we_say(frames) -> dict:
    evaluator = InstanceTask(LabelInfo())
    records = [evaluator.record({"annotations": a}, {"instances": p}) for a, p in frames]
    rows = [ScoredFrame("a", i, {"instances": through_json(r)}) for i, r in enumerate(records)]
    return score(rows[::-1], LabelInfo())  # workers write them in any order


def through_json(record):
    """As the record is read back from a row on disk."""
    back = json.loads(json.dumps(record))
    assert back == record
    return back


def test_a_score_that_is_not_finite_counts_as_0():
    truth = [{"category_id": 0, "segmentation": rle(box(0, 0, 4, 4)), "area": 16.0}]
    found = [box(0, 0, 4, 4), box(4, 4, 2, 2), box(5, 0, 2, 2)]
    broken = instances(found, [np.nan, 0.5, np.inf], [0, 0, 0])
    zero = instances(found, [0.0, 0.5, 0.0], [0, 0, 0])
    assert we_say([(truth, broken)]) == we_say([(truth, zero)])
    assert we_say([(truth, zero)])["AP"] == pytest.approx(50.0, abs=0.5)  # the second of two


masks = st.one_of(
    st.builds(box, st.integers(0, 7), st.integers(0, 8), st.integers(1, 8), st.integers(1, 9)),
    st.builds(lambda seed: np.random.default_rng(seed).random(SIZE) < 0.5, st.integers(0, 99)),
    st.just(np.zeros(SIZE, bool)),
)
# Stated areas far from the pixels put small masks into every size range.
areas = st.sampled_from([0.0, 5.5, 1024.0, 1024.5, 5000.0, 9216.0, 1e5])
annotations = st.builds(
    lambda mask, k, crowd, area: {
        "category_id": k,
        "iscrowd": crowd,
        "segmentation": rle(mask),
        "area": area,
    },
    masks,
    st.integers(0, NUM_CLASSES - 1),
    st.sampled_from([0, 0, 0, 1]),
    areas,
)
detections = st.lists(
    st.tuples(
        masks, st.sampled_from([0.1, 0.25, 0.5, 0.5000001, 0.9]), st.integers(0, NUM_CLASSES - 1)
    ),
    max_size=7,
)


@st.composite
def some_frames(draw):
    frames = []
    for _ in range(draw(st.integers(1, 4))):
        labels = draw(st.lists(annotations, max_size=5))
        found = draw(detections)
        # Copies of objects, so that something matches.
        for a in labels:
            if draw(st.booleans()):
                shift = draw(st.integers(0, 2))
                mask = np.roll(mask_util.decode(a["segmentation"]).astype(bool), shift, axis=1)
                found.append((mask, draw(st.sampled_from([0.3, 0.5, 0.9])), a["category_id"]))
        columns = list(zip(*found, strict=True)) or [(), (), ()]
        frames.append((labels, instances(*map(list, columns))))
    return frames


@settings(max_examples=60)
@given(frames=some_frames())
def test_pycocotools_says_the_same(frames):
    if not any(len(p) for _, p in frames):  # pycocotools cannot load no results
        return
    expected, by_class = coco_says(frames)
    ours = we_say(frames)
    for metric in METRICS:
        if np.isnan(expected[metric]):
            assert ours[metric] is None
        else:
            assert ours[metric] == pytest.approx(expected[metric], abs=1e-9)
    for k, value in enumerate(by_class):
        got = ours["per_class"]["AP"].get(str(k))
        assert got is None if np.isnan(value) else got == pytest.approx(value, abs=1e-9)


def random_frames(seed: int, frames: int = 6):
    rng = np.random.default_rng(seed)

    def mask():
        top, left = rng.integers(0, SIZE[0]), rng.integers(0, SIZE[1])
        return box(top, left, rng.integers(1, 6), rng.integers(1, 6))

    result = []
    for _ in range(frames):
        labels = []
        for _ in range(rng.integers(0, 5)):
            k, crowd = int(rng.integers(0, NUM_CLASSES)), int(rng.random() < 0.2)
            segmentation = rle(mask())
            area = float(mask_util.area(segmentation))
            labels.append(
                {"category_id": k, "iscrowd": crowd, "segmentation": segmentation, "area": area}
            )
        copies = [mask_util.decode(a["segmentation"]).astype(bool) for a in labels]
        found = [m | mask() if rng.random() < 0.3 else m for m in copies] + [mask(), mask()]
        classes = [a["category_id"] for a in labels] + [0, 1]
        result.append((labels, instances(found, rng.random(len(found)), classes)))
    return result


@pytest.mark.parametrize("seed", range(3))
def test_hotcoco_says_the_same(seed, tmp_path):
    hotcoco = pytest.importorskip("hotcoco")
    frames = random_frames(seed)
    write_coco_json(frames, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = hotcoco.COCO(str(tmp_path / "truth.json"))
        evaluation = hotcoco.COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = we_say(frames)
    for metric, expected in zip(METRICS, evaluation.stats, strict=False):
        if expected >= 0:
            assert ours[metric] == pytest.approx(100 * expected, abs=1e-9)
        else:
            assert ours[metric] is None


@pytest.mark.parametrize("seed", range(2))
def test_detectron2_says_the_same(seed, tmp_path):
    frames = random_frames(seed)
    write_coco_json(frames, tmp_path)
    name = f"test_instances_against_detectron2_{seed}"
    MetadataCatalog.get(name).set(
        json_file=str(tmp_path / "truth.json"),
        thing_classes=[str(k) for k in range(NUM_CLASSES)],
        thing_dataset_id_to_contiguous_id={k: k for k in range(NUM_CLASSES)},
    )
    try:
        theirs = COCOEvaluator(name, tasks=("segm",), distributed=False, use_fast_impl=False)
        theirs.reset()
        ours = InstanceTask(LabelInfo.of(name))
        for i, (annotations, predicted) in enumerate(frames):
            frame = {"image_id": i, "file_name": str(i), "annotations": annotations}
            theirs.process([frame], [{"instances": predicted}])
            ours.process([frame], [{"instances": predicted}])
        expected = theirs.evaluate()["segm"]
    finally:
        MetadataCatalog.remove(name)
    results = ours.evaluate()["instances"]
    for metric in METRICS:
        assert results[metric] == pytest.approx(expected[metric], abs=1e-9, nan_ok=True)
    for k in range(NUM_CLASSES):
        got = results.get(f"AP-{k}", np.nan)
        assert got == pytest.approx(expected[f"AP-{k}"], abs=1e-9, nan_ok=True)


def write_coco_json(frames, folder) -> None:
    truth, results = coco_json(frames)
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))


def test_more_than_a_hundred_detections_of_a_class():
    """The hundred with the highest scores count, in each frame and of each class."""
    good = box(0, 0, 4, 4)
    labels = [{"category_id": 0, "iscrowd": 0, "segmentation": rle(good), "area": 16.0}]
    wrong = [box(5, 5, 2, 2)] * 100
    for score_of_good, expected in ((0.1, 0.0), (0.7, 100.0)):
        scores = [*np.linspace(0.5, 0.6, 100), score_of_good]
        frames = [(labels, instances([*wrong, good], scores, [0] * 101))]
        assert we_say(frames)["AP"] == pytest.approx(expected)
        assert coco_says(frames)[0]["AP"] == pytest.approx(expected)


def test_by_hand():
    """Two objects; by falling score: a hit, a miss, a hit. Precision 1 up to recall 1/2, then 2/3:
    51 of 101 levels at 1 and 50 at 2/3. The second hit has IoU 3/4, which is no hit from 0.80."""
    found = match_class(
        [0.9, 0.8, 0.7],
        np.array([16.0, 4, 16]),
        np.array([[1.0, 0], [0, 0], [0, 0.75]]),
        np.array([16.0, 16]),
        np.array([False, False]),
    )
    assert found["labelled"] == [2, 2, 0, 0]
    assert found["scores"] == [0.9, 0.8, 0.7]
    video = Detections()
    video.add(0, found)
    ap = average_precision([video])
    whole, half = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert ap[0] == pytest.approx([whole] * 6 + [half] * 4)
    assert ap[1] == pytest.approx(ap[0])
    assert np.isnan(ap[2:]).all()
    metrics = InstanceTask.metrics
    assert {name: metrics[name].value({0: ap}) for name in METRICS} == {
        "AP": pytest.approx(100 * (0.6 * whole + 0.4 * half)),
        "AP50": pytest.approx(100 * whole),
        "AP75": pytest.approx(100 * whole),
        "APs": pytest.approx(100 * (0.6 * whole + 0.4 * half)),
        "APm": None,
        "APl": None,
    }


def test_a_detection_is_right_only_once():
    found = match_class(
        [0.9, 0.8], np.array([4.0, 4]), np.ones((2, 1)), np.array([4.0]), np.array([False])
    )
    everywhere = 2**40 - 1
    assert found["right"][0] & 2**20 - 1 == 2**20 - 1  # all sizes, small
    assert found["right"][1] == 0
    assert found["ignored"][1] & 2**20 - 1 == 0  # a false positive
    crowd = match_class(
        [0.9, 0.8], np.array([4.0, 4]), np.ones((2, 1)), np.array([4.0]), np.array([True])
    )
    assert crowd["right"] == [0, 0]
    assert crowd["ignored"] == [everywhere, everywhere]  # a crowd excuses any number
    assert crowd["labelled"] == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_overlaps_of_masks(dtype):
    rng = np.random.default_rng(0)
    # More pixels than are taken at once.
    predicted, labelled = (rng.random((n, 300, 301)) < 0.3 for n in (3, 2))
    areas, shared = mask_overlaps(
        torch.from_numpy(predicted).to(dtype), torch.from_numpy(labelled.astype(np.uint8))
    )
    assert areas.tolist() == predicted.sum((1, 2)).tolist()
    assert shared.tolist() == [[(p & g).sum() for g in labelled] for p in predicted]
    crowd = np.array([False, True])
    rles = [[mask_util.encode(np.asfortranarray(m.astype(np.uint8))) for m in ms]
            for ms in (predicted, labelled)]  # fmt: skip
    expected = mask_util.iou(*rles, [0, 1])
    assert (mask_ious(shared, areas, labelled.sum((1, 2)), crowd) == expected).all()


def test_release_counts_labelled_stuff_as_zero():
    """Rule: all segments of a frame are ground truth, and a class that is labelled counts."""
    thing = box(0, 0, 4, 4)
    frame = {
        "annotations": [{"category_id": 0, "segmentation": rle(thing), "iscrowd": 0}],
        "segments_info": [
            {"id": 1, "category_id": 0},  # the thing
            {"id": 2, "category_id": 2},
            {"id": 3, "category_id": 2},  # the same stuff class: counts once
            {"id": 4, "category_id": 1, "iscrowd": 1},  # of crowds there is nothing to find
            {"id": 5, "category_id": 255},  # unlabelled
        ],
    }
    evaluator = InstanceTask(LabelInfo(things=frozenset({0})))
    record = evaluator.record(frame, {"instances": instances([thing], [0.9], [0])})
    assert record["stuff"] == 1
    metrics = evaluator.frame_metrics(record)
    assert metrics == {"AP": pytest.approx(100.0), "AP_frame_release": pytest.approx(50.0)}


def test_release_frames_without_predictions_and_without_labels():
    """Rule: nothing found where there is something is 0; a frame without labels has no number."""
    assert frame_average_precision({"things": {}, "stuff": 0}) == (None, None)
    assert frame_average_precision({"things": {}, "stuff": 2}) == (None, 0.0)
    labels = [{"category_id": 0, "iscrowd": 0, "segmentation": rle(box(0, 0, 2, 2))}]
    record = InstanceTask().record({"annotations": labels}, {"instances": instances([], [], [])})
    assert frame_average_precision(record) == (0.0, 0.0)
    empty = InstanceTask().record({"annotations": []}, {"instances": instances([], [], [])})
    assert empty == {"things": {}, "stuff": 0}


def test_release_is_the_mean_over_frames_and_the_fields_number_is_pooled():
    """One object is found in the first frame; of the second's two with lower scores none."""
    good, far = box(0, 0, 3, 3), box(5, 5, 3, 3)
    label = {"category_id": 0, "iscrowd": 0, "segmentation": rle(good)}
    other = {"category_id": 0, "iscrowd": 0, "segmentation": rle(box(0, 5, 2, 2))}
    frames = [
        ([label], instances([good], [0.9], [0])),
        ([label, other], instances([far], [0.5], [0])),
    ]
    scores = we_say(frames)
    assert scores["AP_frame_release"] == pytest.approx(50.0)
    assert scores["AP"] == pytest.approx(100 * 34 / 101)  # recall 1/3


def test_polygons_and_run_lengths_are_the_same_labels():
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]
    mask = np.zeros(SIZE, np.uint8, order="F")
    mask[1:5, 1:5] = 1
    lists = {"size": list(SIZE), "counts": []}
    flat = mask.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    lists["counts"] = np.diff([0, *changes, len(flat)]).tolist()
    records = [
        InstanceTask().record(
            {"annotations": [{"category_id": 0, "segmentation": segmentation}]},
            {"instances": instances([mask], [0.5], [0])},
        )
        for segmentation in (square, rle(mask), lists)
    ]
    assert records[0] == records[1] == records[2]
    assert records[0]["things"]["0"]["right"][0] & 2**10 - 1 == 2**10 - 1


def test_an_object_is_as_large_as_its_file_says():
    for area, counted in ((None, [1, 1, 0, 0]), (5000.0, [1, 0, 1, 0]), (1024.0, [1, 1, 1, 0])):
        label = {"category_id": 0, "segmentation": rle(box(0, 0, 2, 2))}
        if area is not None:
            label["area"] = area
        record = InstanceTask().record(
            {"annotations": [label]}, {"instances": instances([], [], [])}
        )
        assert record["things"]["0"]["labelled"] == counted
    assert [low for low, _ in AREA_RANGES] == [0, 0, 1024, 9216]


def test_labels_of_another_size_are_told_in_a_line():
    label = {"category_id": 0, "segmentation": rle(np.ones((4, 4)))}
    with pytest.raises(UserError, match=r"frame 7.*4x4.*8x9") as error:
        InstanceTask().record(
            {"annotations": [label], "file_name": "frame 7"},
            {"instances": instances([], [], [])},
        )
    assert "\n" not in str(error.value)


def test_records_are_small():
    frames = random_frames(0, 1)
    labels, _ = frames[0]
    masks = [box(i % 7, i % 8, 2, 2) for i in range(100)]
    scores = np.random.default_rng(0).random(100)
    predicted = instances(masks, scores, np.arange(100) % NUM_CLASSES)
    record = InstanceTask().record({"annotations": labels}, {"instances": predicted})
    assert len(json.dumps(record)) < 6000
    kept = [s for own in record["things"].values() for s in own["scores"]]
    single = predicted.scores.numpy()
    assert sorted(np.float32(kept)) == sorted(single)  # shortened without loss


def test_order_of_frames_does_not_matter_to_the_last_bit():
    """Not even between detections of equal score, which videos and frames put in order."""
    frames = random_frames(5, 8)
    for _, predicted in frames:
        predicted.scores = torch.full((len(predicted),), 0.5)
    evaluator = InstanceTask()
    rows = [
        ScoredFrame("ab"[i // 4], i % 4, {"instances": evaluator.record(*pair)})
        for i, pair in enumerate(({"annotations": a}, {"instances": p}) for a, p in frames)
    ]
    expected = score(rows, LabelInfo())
    assert expected["AP"] == pytest.approx(coco_says(frames)[0]["AP"], abs=1e-9)
    for seed in range(8):
        shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        assert score(shuffled, LabelInfo()) == expected
