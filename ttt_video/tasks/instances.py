"""Instance segmentation: scored masks of objects, by average precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.structures import Instances
from detectron2.structures.masks import polygons_to_bitmask

from ..errors import UserError
from ..formats.coco_masks import check_annotations, compress, mask_fault
from ..formats.labels import check_class_ids
from ..visualization.overlay import SegmentPainter, class_palette, legend_entries, shade
from .average_precision import (
    ClassPrecision,
    Detections,
    class_average_precision,
    frame_average_precision,
    mask_ious,
    mask_overlaps,
    match_class,
    mean_precision,
)
from .base import DO_THEY_AGREE, OTHER_CLASS, Augmented, Painter, Target, Task, once
from .labels import LabelInfo
from .metrics import FRAMES, FrameMean, Metric, Record, Tally
from .outputs import CONFIDENT, finite_scores
from .registry import TASK_REGISTRY
from .stills import ThingEvaluator


class _DetectionTally(Tally):
    """Keeps all detections, about 30 bytes each; the total is the precision of each class."""

    def __init__(self) -> None:
        self.classes: dict[int, Detections] = {}

    def add(self, frame_index: int, record: Record) -> None:
        for k, own in record["things"].items():
            self.classes.setdefault(int(k), Detections()).add(frame_index, own)

    @classmethod
    def joined(cls, videos: Sequence[_DetectionTally], info: LabelInfo) -> ClassPrecision:
        return class_average_precision(video.classes for video in videos)


@TASK_REGISTRY.register()
class InstanceTask(Task):
    """Reads objects (``annotations``).

    A record has each class that is labelled or detected (``things``), and the number of other
    classes with a segment in the frame, which the release counts (``stuff``).
    """

    name = "instances"
    kind = "instance"
    label_keys = ("annotations",)
    output_keys = ("instances",)
    evaluator_types = ("coco", "video_instance")
    headline = "AP"
    streaming = True
    tally = _DetectionTally
    switch = "MODEL.MASK_FORMER.TEST.INSTANCE_ON"
    picture_rank = 0
    difference = OTHER_CLASS
    class_keys = ("thing_classes",)
    objects_key = "annotations"
    mappers = {"mask_former_instance": "crop", "coco_instance_lsj": "lsj"}  # noqa: RUF012
    still_name = "segm"

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        instances: Instances = output["instances"]
        self._check_classes(frame)
        # A data set without names of classes has no unlabelled category.
        unlabelled = self.info.unlabelled_category if self.info.classes else None
        labels = [a for a in frame["annotations"] if a["category_id"] != unlabelled]
        rles = self._rles(frame, labels, instances.image_size)
        labelled_areas = np.array([int(mask_util.area(rle)) for rle in rles])
        masks = np.zeros((0, *instances.image_size), dtype=np.uint8)
        if rles:
            masks = np.ascontiguousarray(mask_util.decode(rles).transpose(2, 0, 1))
        predicted = instances.pred_masks
        areas, shared = mask_overlaps(predicted, torch.from_numpy(masks).to(predicted.device))
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in labels], dtype=bool)
        ious = mask_ious(shared, areas, labelled_areas, crowd)
        # The file states an object's size, as in COCO, and its pixels decide the IoU.
        stated = zip(labels, labelled_areas, strict=True)
        sizes = np.array([float(a.get("area", pixels)) for a, pixels in stated])
        classes = np.array([a["category_id"] for a in labels], dtype=np.int64)
        scores = finite_scores(instances).cpu().numpy()
        detected = instances.pred_classes.cpu().numpy()
        things: Record = {}
        for k in np.union1d(classes, detected).tolist():
            d, g = np.flatnonzero(detected == k), np.flatnonzero(classes == k)
            pairs = ious[np.ix_(d, g)]
            things[str(k)] = match_class(scores[d], areas[d], pairs, sizes[g], crowd[g])
        return {"things": things, "stuff": self._stuff(frame)}

    def _check_classes(self, frame: Mapping[str, Any]) -> None:
        things = self.info.things  # they are the first ids of a data set with stuff
        number = len(self.info.classes) if things is None else max(things, default=-1) + 1
        categories = [label["category_id"] for label in frame["annotations"]]
        check_class_ids(categories, number, self.info.ignore_label, frame.get("file_name"))

    @staticmethod
    def _rles(
        frame: Mapping[str, Any], labels: Sequence[Mapping[str, Any]], size: tuple[int, int]
    ) -> list[dict[str, Any]]:
        for label in labels:
            if fault := mask_fault(label.get("segmentation"), None, None):
                raise UserError(f"an object in the labels of {frame.get('file_name')} {fault}")
        rles = [compress(label["segmentation"], *size) for label in labels]
        for rle in rles:
            if tuple(rle["size"]) != tuple(size):
                raise UserError(
                    f"the labels of {frame.get('file_name')} are of {rle['size'][0]}x"
                    f"{rle['size'][1]} (height x width), the predictions of {size[0]}x{size[1]}: "
                    + DO_THEY_AGREE
                )
        return rles

    def _stuff(self, frame: Mapping[str, Any]) -> int:
        if self.info.things is None:
            return 0
        segments = [s for s in frame.get("segments_info", ()) if not s.get("iscrowd", 0)]
        categories = {s["category_id"] for s in segments}
        return len(categories - self.info.things - {self.info.unlabelled_category})

    def missed(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Scores no instances."""
        if "instances" not in output:
            return self.record(frame, output)
        return self.record(frame, {"instances": output["instances"][:0]})

    @classmethod
    def painter(cls, output: Mapping[str, Any], metadata: Any) -> Painter:
        """Colours instances in shades of their class's colour, outlined and named, best on top."""
        ids, classes = once(confident_instances, output)
        count = 1 + int(max(output["instances"].pred_classes.tolist(), default=0))
        palette = class_palette(metadata, count, things=True)
        colors = np.zeros((len(classes), 3), np.uint8)
        for place, k in enumerate(classes[1:], start=1):
            rank = len(classes) - 1 - place  # from the best, whose shade is then always the same
            colors[place] = shade(palette[k], rank)
        names = cls.drawn_names(metadata, count)
        named = {place: names[k] for place, k in enumerate(classes) if names and place}
        legend_palette = class_palette(metadata, len(names), things=True)
        return SegmentPainter(
            ids, colors, named, legend_entries(names, legend_palette, set(classes[1:]))
        )

    @classmethod
    def differing(cls, output: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Returns the percentage of pixels on which confident instances of other classes lie."""
        maps = []
        for one in (output, other):
            ids, classes = once(confident_instances, one)
            maps.append(np.array(classes)[ids])
        return 100 * float(np.mean(maps[0] != maps[1]))

    @classmethod
    def draw_labels(cls, canvas: Any, record: Mapping[str, Any], metadata: Any) -> Any:
        return canvas.draw_dataset_dict({"annotations": record["annotations"]})

    @classmethod
    def predicted_classes(cls, cfg: CfgNode) -> tuple[int, str]:
        """Returns the number of classes; a panoptic model's instances have only things."""
        if cfg.MODEL.MASK_FORMER.TEST.PANOPTIC_ON and cfg.DATASETS.TRAIN:
            source = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
            things = source.get("thing_dataset_id_to_contiguous_id")
            if things:
                return len(things), "things"
        return super().predicted_classes(cfg)

    @classmethod
    def check_records(
        cls, records: Iterable[Mapping[str, Any]], *, everywhere: bool = False
    ) -> None:
        records = list(records)
        check_annotations(records, everywhere=everywhere)
        for record in records if everywhere else ():
            cls.require_labels(record)

    @classmethod
    def training_labels(cls, record: Mapping[str, Any]) -> Any:
        return record["annotations"]

    @classmethod
    def training_target(cls, labels: Any, record: Mapping[str, Any], image: Augmented) -> Target:
        """Makes one mask per object of ``labels``, without crowds.

        Objects are polygons, compressed RLE or bitmaps, in coordinates of the original image.
        """
        objects = [annotation for annotation in labels if not annotation.get("iscrowd", 0)]
        masks = np.zeros((len(objects), *image.shape), bool)
        for mask, annotation in zip(masks, objects, strict=True):
            outline = annotation["segmentation"]
            if isinstance(outline, list):
                # Points move, and the rasteriser clips. transforms.apply_polygons would clip with
                # shapely, one more dependency for the same mask.
                polygons = [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in outline]
                moved = [image.transforms.apply_coords(polygon).reshape(-1) for polygon in polygons]
                mask[:] = polygons_to_bitmask(moved, *image.shape)
            else:
                bitmap = mask_util.decode(outline) if isinstance(outline, dict) else outline
                mask[:] = image.transforms.apply_segmentation(bitmap.astype(np.uint8))
        return np.array([annotation["category_id"] for annotation in objects], np.int64), masks

    @classmethod
    def still_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """Scores COCO's json files as pycocotools does, other objects as a stream does."""
        if MetadataCatalog.get(dataset_name).get("evaluator_type") == "video_instance":
            return InstanceSetEvaluator(dataset_name)
        return DatasetEvaluators([ThingEvaluator(dataset_name, output_dir)])


def confident_instances(output: Mapping[str, Any]) -> tuple[np.ndarray, list[int]]:
    """Returns the instances that score at least 0.5 as a map, the best on top.

    Returns:
        (H, W) int32, 0 where there is none; and the class by number in the map, of 0 -1.
    """
    instances = output["instances"]
    scores = instances.scores.tolist()
    order = sorted(
        (i for i, score in enumerate(scores) if score >= CONFIDENT), key=scores.__getitem__
    )
    categories = instances.pred_classes.tolist()
    # Masks are painted on their device, so that one map leaves it; the best last, on top.
    masks = instances.pred_masks
    ids = torch.zeros(instances.image_size, dtype=torch.int32, device=masks.device)
    for place, index in enumerate(order, start=1):
        ids.masked_fill_(masks[index] > 0, place)
    return ids.cpu().numpy(), [-1, *(categories[index] for index in order)]


class InstanceSetEvaluator(InstanceTask):
    """Computes a stream's AP in detectron2's loop, whose mappers drop the labels.

    Its ``segm`` metrics have the names of detectron2's ``COCOEvaluator``, which cannot use the
    areas that a data set without a json file states.
    """

    def __init__(self, dataset_name: str) -> None:
        records = DatasetCatalog.get(dataset_name)
        self._labels = {r["image_id"]: r["annotations"] for r in records if "annotations" in r}
        super().__init__(LabelInfo.of(dataset_name), required=True)

    def record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        labels = self._labels.get(frame["image_id"])
        return None if labels is None else super().record({**frame, "annotations": labels}, output)

    def evaluate(self) -> dict[str, dict[str, float]]:
        wanted = ("AP", "AP50", "AP75", "APs", "APm", "APl")
        results = super().evaluate()
        if not results:  # not the first process
            return {}
        metrics = results[self.name]
        return {
            self.still_name: {k: metrics[k] for k in metrics if k in wanted or k.startswith("AP-")}
        }


_AP = (
    "mean over 101 levels of recall of the precision of each class's masks, all frames pooled; at "
    "most 100 detections of a class per frame; crowds are ignored; mean over the labelled classes; "
)
_BITS = 2**10 - 1  # all thresholds of one area range
_EXAMPLE = [
    {
        "things": {
            # One of two small objects is found at all thresholds; none is medium or large.
            "0": {
                "labelled": [2, 2, 0, 0],
                "scores": [0.9],
                "right": [_BITS | _BITS << 10],
                "ignored": [_BITS << 20 | _BITS << 30],
            }
        },
        "stuff": 1,
    }
]
_HALF = 100 * 51 / 101  # full precision at the recalls 0, 0.01, ..., 0.5


class _Precision(Metric):
    area = 0  # position in AREA_RANGES
    threshold: int | None = None  # position in IOU_THRESHOLDS; None for the mean
    example: ClassVar[Any] = (_EXAMPLE, _HALF)

    def value(self, total: ClassPrecision) -> float | None:
        return mean_precision(total, self.area, self.threshold)


@InstanceTask.add_metric
class AveragePrecision(_Precision):
    """AP over all IoU thresholds and sizes."""

    name = "AP"
    rule = _AP + "mean over IoU thresholds 0.50, 0.55, ..., 0.95"

    @staticmethod
    def by_class(total: ClassPrecision) -> dict[int, float]:
        values = {k: mean_precision({k: own}, 0) for k, own in total.items()}
        return {k: value for k, value in values.items() if value is not None}

    @staticmethod
    def frame(record: Record) -> float | None:
        return frame_average_precision(record)[0]


@InstanceTask.add_metric
class AveragePrecision50(_Precision):
    """AP at the IoU threshold 0.50."""

    name = "AP50"
    rule = _AP + "IoU threshold 0.50"
    threshold = 0


@InstanceTask.add_metric
class AveragePrecision75(_Precision):
    """AP at the IoU threshold 0.75."""

    name = "AP75"
    rule = _AP + "IoU threshold 0.75"
    threshold = 5


@InstanceTask.add_metric
class SmallPrecision(_Precision):
    """AP of small objects."""

    name = "APs"
    rule = _AP + "as AP, objects of up to 32^2 pixels"
    area = 1


@InstanceTask.add_metric
class MediumPrecision(_Precision):
    """AP of medium objects."""

    name = "APm"
    rule = _AP + "as AP, objects of 32^2 to 96^2 pixels"
    area = 2
    example = (_EXAMPLE, None)


@InstanceTask.add_metric
class LargePrecision(_Precision):
    """AP of large objects."""

    name = "APl"
    rule = _AP + "as AP, objects of 96^2 pixels and more"
    area = 3
    example = (_EXAMPLE, None)


@InstanceTask.add_metric
class AveragePrecisionOfFrames(FrameMean):
    """Mean over frames of each frame's AP, by the release's rule."""

    name = "AP_frame_release"
    rule = (
        "AP of each single frame; mean over the classes labelled there, "
        "where all segments are objects: a labelled stuff class counts as 0, and so does a frame "
        "without predictions" + FRAMES
    )
    example = (_EXAMPLE, _HALF / 2)

    @staticmethod
    def frame(record: Record) -> float | None:
        return frame_average_precision(record)[1]
