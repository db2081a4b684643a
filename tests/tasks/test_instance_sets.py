"""AP of whole data sets, as pycocotools has it: stated areas, and more than 255 classes."""

from __future__ import annotations

import contextlib
import io
import json
import uuid

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ttt_video.data import register_custom_coco_video
from ttt_video.data.coco_videos import coco_videos_metadata, load_coco_video
from ttt_video.errors import UserError
from ttt_video.tasks import ScoredFrame, build_tasks, score
from ttt_video.tasks.instances import InstanceSetEvaluator
from ttt_video.tasks.stills import ThingEvaluator

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SIDE = 120
PLACES = [(0, 0), (0, 60), (60, 0), (60, 60)]


@pytest.fixture
def name():
    name = f"own_{uuid.uuid4().hex}"
    yield name
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)


def mask(place: int, side: int) -> np.ndarray:
    top, left = PLACES[place]
    pixels = np.zeros((SIDE, SIDE), np.uint8, order="F")
    pixels[top : top + side, left : left + side] = 1
    return pixels


def compressed(pixels: np.ndarray) -> dict:
    shape = rle.encode(pixels)
    return {"size": shape["size"], "counts": shape["counts"].decode()}


def polygon(place: int, side: int) -> list:
    top, left = PLACES[place]
    x, y = left + side, top + side
    return [[left, top, x, top, x, y, left, y]]


def object_of(number: int, image: int, category: int, place: int, side: int, area: float) -> dict:
    shape = polygon(place, side) if number % 2 else compressed(mask(place, side))
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "bbox": [PLACES[place][1], PLACES[place][0], side, side],
        "segmentation": shape,
        "area": area,
    }


def found(items: list[tuple[int, int, float, int]]) -> Instances:
    """Detections from (place, side, score, contiguous class)."""
    result = Instances((SIDE, SIDE))
    masks = [mask(place, side) for place, side, _, _ in items]
    result.pred_masks = torch.from_numpy(np.stack(masks)).float()
    result.pred_boxes = Boxes(torch.zeros(len(items), 4))
    result.scores = torch.tensor([item[2] for item in items])
    result.pred_classes = torch.tensor([item[3] for item in items])
    return result


STATED = [
    # image, category, place, side, stated area: masks of 400 and 2500 pixels in every size range
    (1, 3, 0, 20, 9999.0),
    (1, 3, 1, 20, 30.0),
    (1, 7, 2, 50, 2500.0),
    (2, 7, 0, 50, 1000.0),
    (2, 3, 3, 20, 1024.0),
    (2, 7, 1, 50, 9216.5),
]
DETECTED = {
    1: [(0, 20, 0.9, 0), (1, 18, 0.8, 0), (2, 50, 0.7, 1), (3, 40, 0.6, 1)],
    2: [(0, 47, 0.5, 1), (3, 20, 0.4, 0), (2, 20, 0.35, 0)],
}


def stated_content() -> dict:
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE, "video_id": 1,
             "frame_index": n - 1}
            for n in (1, 2)
        ],
        "annotations": [object_of(n, *values) for n, values in enumerate(STATED, start=1)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }  # fmt: skip


def pycocotools_says(content: dict, detected: dict, categories: list[int]) -> list[float]:
    results = [
        {
            "image_id": image,
            "category_id": categories[k],
            "score": float(np.float32(score)),
            "segmentation": compressed(mask(place, side)),
        }
        for image, items in detected.items()
        for place, side, score, k in items
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(content))
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value if value >= 0 else float("nan") for value in evaluation.stats[:6]]


def streamed(cfg, name: str, detected: dict) -> dict:
    """Numbers of a stream over the registered data set."""
    records = DatasetCatalog.get(name)
    evaluator, *_ = build_tasks(name)
    rows = []
    for record in records:
        frame = evaluator.record(record, {"instances": found(detected[record["image_id"]])})
        row = {"instances": json.loads(json.dumps(frame))}
        rows.append(ScoredFrame(record["video_id"], record["frame_index"], row))
    return score(rows, evaluator.info)


def test_sizes_of_objects_are_the_stated_areas(tmp_path, name, tiny_cfg):
    (tmp_path / "a.json").write_text(json.dumps(stated_content()))
    register_custom_coco_video(name, tmp_path / "a.json", tmp_path)
    expected = pycocotools_says(stated_content(), DETECTED, [3, 7])
    pixels = stated_content()
    for annotation in pixels["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    other = pycocotools_says(pixels, DETECTED, [3, 7])
    assert expected[0] == other[0]
    assert not np.isclose(expected[3:], other[3:]).any()  # so the areas decide
    ours = streamed(tiny_cfg, name, DETECTED)
    assert [ours[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9)
    trained = whole_set(InstanceSetEvaluator(name), DatasetCatalog.get(name), DETECTED)
    assert [trained[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9)
    assert {"AP-cat", "AP-dog"} == trained.keys() - set(METRICS)


def whole_set(evaluator, records, detected) -> dict:
    """detectron2's loop, whose mapper hands over no labels."""
    evaluator.reset()
    for record in records:
        given = {k: v for k, v in record.items() if k != "annotations"}
        evaluator.process([given], [{"instances": found(detected[record["image_id"]])}])
    return evaluator.evaluate()["segm"]


def test_coco_videos_in_a_stream_and_in_training(tmp_path, name, tiny_cfg):
    """Every frame is labelled; segments with a stated area, and one without."""
    content, labels = stated_content(), {"images": [], "annotations": []}
    (tmp_path / "raw_images" / "v").mkdir(parents=True)
    (tmp_path / "annotations" / "train").mkdir(parents=True)
    del content["annotations"][1]["area"]
    for n in (1, 2):
        (tmp_path / "raw_images" / "v" / f"{n}.png").touch()
        labels["images"].append({"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE})
        own = [dict(a) for a in content["annotations"] if a["image_id"] == n]
        labels["annotations"].append({"image_id": n, "file_name": f"{n}.png", "segments_info": own})
    file = tmp_path / "annotations" / "train" / "v.json"
    file.write_text(json.dumps(labels))
    # Categories 3 and 7 are COCO's car and train, classes 2 and 6.
    detected = {
        f"v/{image}": [(*item[:3], {0: 2, 1: 6}[item[3]]) for item in items]
        for image, items in DETECTED.items()
    }
    content["annotations"][1]["area"] = 400  # its pixels
    expected = pycocotools_says(content, DETECTED, [3, 7])
    DatasetCatalog.register(name, lambda: load_coco_video(tmp_path, "v", "instance"))
    MetadataCatalog.get(name).set(**coco_videos_metadata("instance"))
    ours = streamed(tiny_cfg, name, detected)
    assert [ours[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9)
    trained = whole_set(InstanceSetEvaluator(name), DatasetCatalog.get(name), detected)
    assert [trained[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9)


def test_class_255_is_a_class_like_any_other(tmp_path, name, tiny_cfg):
    """300 categories; half of the objects are of contiguous class 255, and are missed."""
    content = stated_content()
    content["categories"] = [{"id": 1000 + k, "name": f"class {k}"} for k in range(300)]
    for annotation in content["annotations"]:
        annotation["category_id"] = {3: 1255, 7: 1004}[annotation["category_id"]]
    detected = {1: [(2, 50, 0.9, 4)], 2: [(0, 50, 0.8, 4), (1, 50, 0.7, 4), (3, 20, 0.1, 256)]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_custom_coco_video(name, tmp_path / "a.json", tmp_path)
    expected = pycocotools_says(content, detected, [1000 + k for k in range(300)])
    assert expected[0] == pytest.approx(50.0)
    ours = streamed(tiny_cfg, name, detected)
    assert [ours[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert ours["per_class"]["AP"] == {"class 4": pytest.approx(100.0), "class 255": 0.0}
    trained = whole_set(InstanceSetEvaluator(name), DatasetCatalog.get(name), detected)
    assert trained["AP-class 255"] == 0.0


def test_frames_without_labels_are_not_scored_in_training(tmp_path, name):
    content = stated_content()
    for image in content["images"]:
        del image["video_id"], image["frame_index"]
    for n in (1, 2, 3):
        (tmp_path / f"{n}.png").touch()
    (tmp_path / "a.json").write_text(json.dumps(content))
    register_custom_coco_video(name, tmp_path / "a.json", tmp_path)
    records = DatasetCatalog.get(name)
    detected = {**DETECTED, f"{tmp_path.name}/3": DETECTED[1]}
    trained = whole_set(InstanceSetEvaluator(name), records, detected)
    expected = pycocotools_says(content, DETECTED, [3, 7])
    assert [trained[metric] for metric in METRICS] == pytest.approx(expected, abs=1e-9)


def test_json_files_of_detectron2s_own_evaluator(tmp_path, name):
    """Two images of one id would lose one, and crowds and areas that are not there are errors."""
    content = stated_content()
    areas = [annotation.pop("area") for annotation in content["annotations"]]
    assert areas != [400, 400, 2500, 2500, 400, 2500]
    for annotation in content["annotations"]:
        del annotation["iscrowd"]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(content))
    MetadataCatalog.get(name).set(
        json_file=str(file),
        thing_classes=["cat", "dog"],
        thing_dataset_id_to_contiguous_id={3: 0, 7: 1},
    )
    evaluator = ThingEvaluator(name)
    records = [{"image_id": n} for n in (1, 2)]
    trained = whole_set(evaluator, records, DETECTED)
    for annotation in content["annotations"]:
        annotation.update(iscrowd=0, area=annotation["bbox"][2] * annotation["bbox"][3])
    expected = pycocotools_says(content, DETECTED, [3, 7])
    assert [trained[m] for m in METRICS] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    content["images"][1]["id"] = 1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.json: image 1 \(1\.png\) and image 1 \(2\.png\) have"):
        ThingEvaluator(name)
