"""Panoptic quality against panopticapi, hotcoco and detectron2 on wild cases, and by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from panopticapi.evaluation import pq_compute_single_core
from panopticapi.utils import id2rgb
from PIL import Image

from ttt_video.errors import UserError
from ttt_video.formats.labels import read_segment_ids
from ttt_video.tasks import LabelInfo, PanopticTask, ScoredFrame, score
from ttt_video.tasks.panoptic_quality import (
    add_panoptic_counts,
    class_quality,
    measure_overlaps,
    panoptic_counts,
    panoptic_counts_release,
    panoptic_quality,
    panoptic_quality_release,
)

NUM_CLASSES = 4
THINGS = frozenset({0, 1})
INFO = LabelInfo(things=THINGS)
CATEGORIES = [{"id": k, "name": str(k), "isthing": int(k in THINGS)} for k in range(NUM_CLASSES)]
# Ids that need all three bytes.
IDS = np.array([0, 1, 255, 256, 70000, 256**3 - 1])


def save_png(ids: np.ndarray, path) -> None:
    Image.fromarray(id2rgb(ids.astype(np.uint32))).save(path)


def areas(ids: np.ndarray, segments: list[dict]) -> list[dict]:
    return [{**s, "area": int((ids == s["id"]).sum())} for s in segments]


class Case(tuple):
    """(predicted map, its segments, labelled map, its segments)"""

    def overlaps(self):
        return measure_overlaps(*self)


@st.composite
def cases(draw):
    """Maps of few segments, so that some match; crowds, unlisted and invisible labels, void."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 7)))
    index = hnp.arrays(np.int64, shape, elements=st.integers(0, 3))
    labelled = draw(index)
    predicted = np.where(draw(hnp.arrays(bool, shape)), labelled, draw(index))
    if draw(st.booleans()):
        predicted = labelled.copy()
    id_sets = [draw(st.permutations(list(range(1, len(IDS))))) for _ in range(2)]
    maps = [
        np.where(m > 0, IDS[np.array(ids)][m - 1], 0)
        for m, ids in zip((predicted, labelled), id_sets, strict=True)
    ]
    classes = st.integers(0, NUM_CLASSES - 1)
    by_index = draw(st.lists(classes, min_size=4, max_size=4))
    segments = []
    for ids in id_sets:
        # Mostly one class per position, so that segments of one class meet.
        segments.append(
            [
                {
                    "id": int(IDS[i]),
                    "category_id": draw(st.sampled_from([by_index[n], draw(classes)])),
                }
                for n, i in enumerate(ids[:4])
            ]
        )
    there = np.unique(maps[0])
    own = [s for s in segments[0] if s["id"] in there]
    for s in segments[1]:
        s["iscrowd"] = draw(st.sampled_from([0, 0, 0, 1]))
    if draw(st.booleans()):
        segments[1].pop()  # what has pixels is listed nowhere, and not void
    return Case((maps[0], own, maps[1], areas(maps[1], segments[1])))


def panopticapi_says(many: list[Case], folder) -> dict[int, tuple]:
    pairs = []
    for i, (predicted, own, labelled, segments) in enumerate(many):
        save_png(labelled, folder / f"{i}.png")
        save_png(predicted, folder / f"{i}_predicted.png")
        pairs.append(
            (
                {"image_id": i, "file_name": f"{i}.png", "segments_info": copy.deepcopy(segments)},
                {
                    "image_id": i,
                    "file_name": f"{i}_predicted.png",
                    "segments_info": copy.deepcopy(own),
                },
            )
        )
    with contextlib.redirect_stdout(io.StringIO()):
        stat = pq_compute_single_core(0, pairs, folder, folder, {c["id"]: c for c in CATEGORIES})
    return stat


def through_json(record):
    back = json.loads(json.dumps(record))
    assert back == record
    return back


@settings(max_examples=100)
@given(many=st.lists(cases(), min_size=1, max_size=3))
def test_panopticapi_says_the_same(many, tmp_path_factory):
    stat = panopticapi_says(many, tmp_path_factory.mktemp("png"))
    records = [{"standard": panoptic_counts(c.overlaps()), "release": {}} for c in many]
    counts = add_panoptic_counts(r["standard"] for r in records)
    for k in range(NUM_CLASSES):
        expected = stat[k]
        tp, fp, fn, iou = counts.get(str(k), (0, 0, 0, 0))
        assert (tp, fp, fn) == (expected.tp, expected.fp, expected.fn)
        assert float(iou) == pytest.approx(expected.iou, abs=1e-9)
    rows = [ScoredFrame("a", i, {"panoptic_seg": through_json(r)}) for i, r in enumerate(records)]
    ours = score(rows, INFO)
    categories = {c["id"]: c for c in CATEGORIES}
    for isthing, names in (
        (None, ("PQ", "SQ", "RQ")),
        (True, ("PQ_things",)),
        (False, ("PQ_stuff",)),
    ):
        try:
            expected, _ = stat.pq_average(categories, isthing)
        except ZeroDivisionError:  # nothing to count
            assert all(ours[name] is None for name in names)
            continue
        for name, key in zip(names, ("pq", "sq", "rq"), strict=False):
            assert ours[name] == pytest.approx(100 * expected[key], abs=1e-9)


def random_case(seed: int, shape=(20, 30)) -> Case:
    """Blocks, shifted a little; every class; a crowd; void."""
    rng = np.random.default_rng(seed)
    index = np.kron(rng.integers(0, 9, (4, 5)), np.ones((5, 6), int))[: shape[0], : shape[1]]
    labelled = index * 1000
    predicted = np.roll(index, int(rng.integers(0, 3)), 1)
    classes = rng.integers(0, NUM_CLASSES, 10)
    segments = [
        {"id": int(i) * 1000, "category_id": int(classes[i]), "iscrowd": int(i == 3)}
        for i in np.unique(index)
        if i
    ]
    own = [{"id": int(i), "category_id": int(classes[i])} for i in np.unique(predicted) if i]
    return Case((predicted, own, labelled, areas(labelled, segments)))


def write_coco_panoptic(many: list[Case], folder):
    """Files in COCO's panoptic format; returns the paths of the two JSON files."""
    files = []
    for name, ids, segments in (("truth", 2, 3), ("results", 0, 1)):
        (folder / name).mkdir()
        for i, case in enumerate(many):
            save_png(case[ids], folder / name / f"{i}.png")
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(many))],
            "annotations": [
                {"image_id": i, "file_name": f"{i}.png", "segments_info": case[segments]}
                for i, case in enumerate(many)
            ],
            "categories": CATEGORIES,
        }
        files.append(folder / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    return files


def frames_of(many: list[Case], folder) -> list[tuple[dict, dict]]:
    """Dataset dicts and model outputs of cases whose files are in ``folder``."""
    return [
        (
            {
                "image_id": i,
                "file_name": f"{i}.jpg",
                "pan_seg_file_name": str(folder / "truth" / f"{i}.png"),
                "segments_info": segments,
                "video_id": "a",
                "frame_index": i,
            },
            {"panoptic_seg": (torch.from_numpy(predicted.astype(np.int32)), own)},
        )
        for i, (predicted, own, _, segments) in enumerate(many)
    ]


def evaluate(frames, info=INFO) -> dict:
    evaluator = PanopticTask(info)
    for frame, output in frames:
        evaluator.process([frame], [output])
    return evaluator.evaluate()["panoptic_seg"]


def test_detectron2_says_the_same(tmp_path):
    many = [random_case(seed) for seed in range(4)]
    truth, _ = write_coco_panoptic(many, tmp_path)
    frames = frames_of(many, tmp_path)
    name = "test_panoptic_against_detectron2"
    MetadataCatalog.get(name).set(
        panoptic_json=str(truth),
        panoptic_root=str(tmp_path / "truth"),
        thing_classes=["0", "1"],
        stuff_classes=["0", "1", "2", "3"],
        thing_dataset_id_to_contiguous_id={k: k for k in THINGS},
        stuff_dataset_id_to_contiguous_id={k: k for k in range(NUM_CLASSES)},
    )
    try:
        theirs = COCOPanopticEvaluator(name, str(tmp_path / "out"))
        theirs.reset()
        for frame, output in copy.deepcopy(frames):
            theirs.process([frame], [output])
        expected = theirs.evaluate()["panoptic_seg"]
        ours = evaluate(frames, LabelInfo.of(name))
    finally:
        MetadataCatalog.remove(name)
    names = {"PQ": "PQ", "SQ": "SQ", "RQ": "RQ", "PQ_things": "PQ_th", "PQ_stuff": "PQ_st"}
    for own, their in names.items():
        assert ours[own] == pytest.approx(expected[their], abs=1e-9)
    assert ours["PQ"] not in (0, 100)


def test_hotcoco_says_the_same(tmp_path):
    panoptic = pytest.importorskip("hotcoco.panoptic")
    many = [random_case(seed) for seed in range(4)]
    truth, results = write_coco_panoptic(many, tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = panoptic.pq_compute(str(truth), str(results))
    ours = evaluate(frames_of(many, tmp_path))
    for part, names in (
        ("All", ("PQ", "SQ", "RQ")),
        ("Things", ("PQ_things",)),
        ("Stuff", ("PQ_stuff",)),
    ):
        for name, key in zip(names, ("pq", "sq", "rq"), strict=False):
            assert ours[name] == pytest.approx(100 * expected[part][key], abs=1e-9)


def row(text: str) -> np.ndarray:
    """A map of one row: "1122.." has segments 1 and 2 and two pixels of none."""
    return np.array([[0 if c == "." else int(c) for c in text]])


def segments(*classes: int, **more) -> list[dict]:
    return [{"id": i, "category_id": k, **more} for i, k in enumerate(classes, 1)]


def test_by_hand():
    """Class 0: a match with IoU 3/4 and a missed segment. Class 1: a false segment."""
    case = Case((row("1113...22"), segments(0, 1, 1), row("1111..222"), segments(0, 0)))
    assert panoptic_counts(case.overlaps()) == {"0": [1, 0, 1, 0.75], "1": [0, 2, 0, 0.0]}
    counts = add_panoptic_counts([panoptic_counts(case.overlaps())])
    assert class_quality(counts) == {0: (50.0, 75.0, pytest.approx(200 / 3)), 1: (0.0, 0.0, 0.0)}
    assert panoptic_quality(counts) == (25.0, 37.5, pytest.approx(100 / 3))
    assert panoptic_quality(counts, THINGS.__contains__) == panoptic_quality(counts)
    assert panoptic_quality(counts, lambda k: k > 1) is None


def test_iou_of_one_half_is_no_match():
    case = Case((row("11"), segments(0), row("1."), segments(0)))
    # The pixel that is not labelled is void, and in no union.
    assert panoptic_counts(case.overlaps()) == {"0": [1, 0, 0, 1.0]}
    case = Case((row("11"), segments(0), row("12"), segments(0, 1)))
    assert panoptic_counts(case.overlaps()) == {"0": [0, 1, 1, 0.0], "1": [0, 0, 1, 0.0]}


def test_one_pixel_segments():
    case = Case((row("12"), segments(0, 1), row("12"), segments(0, 1)))
    assert panoptic_quality(panoptic_counts(case.overlaps())) == (100.0, 100.0, 100.0)


def test_all_void_counts_nothing():
    case = Case((row("112"), segments(0, 1), row("..."), []))
    assert panoptic_counts(case.overlaps()) == {}
    assert panoptic_quality({}) is None


def test_no_prediction_misses_everything():
    case = Case((row("..."), [], row("112"), segments(0, 1)))
    assert panoptic_counts(case.overlaps()) == {"0": [0, 0, 1, 0.0], "1": [0, 0, 1, 0.0]}


def test_crowds_excuse_predictions_of_their_class():
    labels = segments(0, iscrowd=1)
    case = Case((row("1122"), segments(0, 1), row("1111"), labels))
    assert panoptic_counts(case.overlaps()) == {"1": [0, 1, 0, 0.0]}


def test_release_crowds_are_ordinary_segments():
    """Rule: a crowd is found or missed as any other segment."""
    labels = segments(0, iscrowd=1)
    found = Case((row("1111"), segments(0), row("1111"), labels)).overlaps()
    assert panoptic_counts(found) == {}
    assert panoptic_counts_release(found) == {"0": [1, 0, 0, 1.0]}
    missed = Case((row("1122"), segments(0, 1), row("1111"), labels)).overlaps()
    assert panoptic_counts(missed) == {"1": [0, 1, 0, 0.0]}
    assert panoptic_counts_release(missed) == {"0": [0, 1, 1, 0.0], "1": [0, 1, 0, 0.0]}


def test_release_unlabelled_category_is_not_void():
    """Rule: category 255 excuses no prediction and stays in the unions; it is in no mean."""
    case = Case((row("111122"), segments(0, 1), row("111333"), [
        {"id": 1, "category_id": 0}, {"id": 3, "category_id": 255},
    ]))  # fmt: skip
    overlaps = case.overlaps()
    assert panoptic_counts(overlaps.with_void(255)) == {"0": [1, 0, 0, 1.0]}
    release = panoptic_counts_release(overlaps)
    assert release == {"0": [1, 0, 0, 0.75], "1": [0, 1, 0, 0.0]}
    assert panoptic_quality_release(release) == pytest.approx(37.5)


def test_release_takes_the_area_that_the_file_states():
    """Rule: the union is computed with the stated area; an IoU above 1 matches nothing."""
    for area, expected in ((4, 1.0), (5, 0.8), (3, None), (None, 1.0)):
        labels = segments(0, **({} if area is None else {"area": area}))
        overlaps = Case((row("1111"), segments(0), row("1111"), labels)).overlaps()
        assert panoptic_counts(overlaps) == {"0": [1, 0, 0, 1.0]}
        release = {"0": [0, 1, 1, 0.0]} if expected is None else {"0": [1, 0, 0, expected]}
        assert panoptic_counts_release(overlaps) == release


def test_release_frame_with_nothing_to_count_is_zero():
    """Rule: such a frame stays in the mean over frames, as 0."""
    assert panoptic_quality_release({}) == 0.0
    nothing = {"panoptic_seg": {"standard": {}, "release": {}}}
    perfect = {"panoptic_seg": {key: {"0": [1, 0, 0, 1.0]} for key in ("standard", "release")}}
    scores = score([ScoredFrame("a", 0, nothing), ScoredFrame("a", 1, perfect)], INFO)
    assert scores["PQ_frame_release"] == 50.0
    assert scores["PQ"] == 100.0


@given(case=cases())
def test_without_crowds_and_unlabelled_segments_the_rules_agree(case):
    predicted, own, labelled, segs = case
    plain = [{**s, "iscrowd": 0} for s in segs]
    overlaps = Case((predicted, own, labelled, plain)).overlaps()
    assert panoptic_counts_release(overlaps) == panoptic_counts(overlaps.with_void(255))


@given(case=cases())
def test_a_perfect_prediction_is_perfect(case):
    _, _, labelled, segs = case
    there = [s for s in segs if s["area"] and not s["iscrowd"]]
    labelled = np.where(np.isin(labelled, [s["id"] for s in there]), labelled, 0)
    counts = panoptic_counts(Case((labelled, there, labelled, there)).overlaps())
    if there:
        assert panoptic_quality(counts) == (100.0, 100.0, 100.0)


def test_sums_are_exact_in_any_order_and_grouping():
    rng = np.random.default_rng(0)
    frames = [
        {str(k): [1, 0, 2, float(rng.uniform(0.5, 1))] for k in rng.permutation(5)[:3]}
        for _ in range(40)
    ]
    expected = add_panoptic_counts(frames)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(40)
        parts = [add_panoptic_counts(frames[i] for i in order[a::3]) for a in range(3)]
        assert add_panoptic_counts(parts) == expected
    assert panoptic_quality(add_panoptic_counts(parts)) == panoptic_quality(expected)


def test_predictions_that_contradict_themselves():
    with pytest.raises(ValueError, match="lacks"):
        Case((row("12"), segments(0), row("11"), segments(0))).overlaps()
    with pytest.raises(ValueError, match="without a pixel"):
        Case((row("11"), segments(0, 1), row("11"), segments(0))).overlaps()
    with pytest.raises(ValueError, match="shape"):
        Case((row("11"), segments(0), row("111"), segments(0))).overlaps()


def test_evaluator_names_the_file_that_does_not_fit(tmp_path):
    file = tmp_path / "labels.png"
    save_png(row("111"), file)
    frame = {"pan_seg_file_name": str(file), "segments_info": segments(0), "file_name": "x"}
    output = {"panoptic_seg": (torch.ones(1, 2, dtype=torch.int32), segments(0))}
    with pytest.raises(UserError, match=r"labels.png") as error:
        PanopticTask().record(frame, output)
    assert "\n" not in str(error.value)


def test_reading_labels(tmp_path):
    file = tmp_path / "labels.png"
    ids = IDS.reshape(2, 3)
    save_png(ids, file)
    assert read_segment_ids(str(file)).tolist() == ids.tolist()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(file)
    with pytest.raises(
        UserError, match=r"no label map of panoptic ids: it is 8-bit gray, 2x2.*8-bit RGB PNG"
    ):
        read_segment_ids(str(file))
    file.write_text("no image")
    with pytest.raises(UserError, match=r"labels\.png cannot be read"):
        read_segment_ids(str(file))
