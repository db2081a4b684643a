"""The evaluators of a stream: labels and outputs of one frame in, one record out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.structures import Instances
from torch import Tensor

from ..data.coco_masks import compress, mask_fault
from ..data.kitti_step import read_sem_seg
from ..data.labels import check_class_ids, present_ids, read_segment_ids
from ..errors import UserError
from .base import StreamingEvaluator
from .instances import frame_average_precision, mask_ious, mask_overlaps, match_class
from .panoptic import (
    add_panoptic_counts,
    measure_overlaps,
    panoptic_counts,
    panoptic_counts_release,
    panoptic_quality,
    panoptic_quality_release,
)
from .prediction import class_map, mean_entropy, predicted_classes, scores_are_finite
from .protocols import LabelInfo, Record, Row
from .sem_seg import class_counts, confusion_matrix, mean_iou, mean_iou_release
from .temporal import change_counts, change_shares

_DO_THEY_AGREE = "do the model's classes and the frame's size agree with its labels?"


class SemSegStreamEvaluator(StreamingEvaluator):
    """Confusion counts of label maps (``sem_seg_file_name``)."""

    name = "sem_seg"
    label_key = "sem_seg_file_name"
    output_keys = ("sem_seg",)

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        predicted, num_classes = class_map(output), len(output["sem_seg"])
        labels = read_sem_seg(dict(frame))
        assert predicted is not None
        file_name, ignore_label = frame["sem_seg_file_name"], self.info.ignore_label
        classes = len(self.info.classes)
        try:
            confusion = confusion_matrix(predicted, labels, num_classes, ignore_label)
        except ValueError as error:
            check_class_ids(present_ids(labels), classes, ignore_label, file_name)
            raise UserError(
                f"{file_name} does not fit the predictions ({error}): {_DO_THEY_AGREE}"
            ) from error
        check_class_ids(np.flatnonzero(confusion.any(1)).tolist(), classes, ignore_label, file_name)
        return class_counts(confusion)

    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        return {"mIoU": mean_iou(record), "mIoU_frame_release": mean_iou_release(record)}


class PanopticStreamEvaluator(StreamingEvaluator):
    """Matched, false and missed segments (``pan_seg_file_name``, ``segments_info``).

    The record has the counts by the field's rules (``standard``) and the release's.
    """

    name = "panoptic_seg"
    label_key = "pan_seg_file_name"
    output_keys = ("panoptic_seg",)

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        predicted_map, predicted = output["panoptic_seg"]
        file_name, ignore_label = frame["pan_seg_file_name"], self.info.ignore_label
        categories = [segment["category_id"] for segment in frame["segments_info"]]
        check_class_ids(categories, len(self.info.classes), ignore_label, file_name)
        try:
            overlaps = measure_overlaps(
                predicted_map.cpu().numpy(),
                predicted,
                read_segment_ids(file_name),
                frame["segments_info"],
            )
        except ValueError as error:
            raise UserError(
                f"{file_name} cannot be compared with the prediction ({error}): {_DO_THEY_AGREE}"
            ) from error
        unlabelled = self.info.unlabelled_category
        return {
            "standard": panoptic_counts(overlaps.with_void(unlabelled)),
            "release": panoptic_counts_release(overlaps, unlabelled),
        }

    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        quality = panoptic_quality(add_panoptic_counts([record["standard"]]))
        release = panoptic_quality_release(record["release"])
        return {"PQ": quality and quality[0], "PQ_frame_release": release}


class InstanceStreamEvaluator(StreamingEvaluator):
    """Matched detections (``annotations``).

    The record has each class that is labelled or detected (``things``), and how many other
    classes have a segment in the frame, which the release counts (``stuff``).
    """

    name = "instances"
    label_key = "annotations"
    output_keys = ("instances",)

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        instances: Instances = output["instances"]
        self._check_classes(frame)
        # Objects of a data set that does not name its classes are all of a class.
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
        # As in COCO, an object's size is what its file states; its IoU is that of its pixels.
        stated = zip(labels, labelled_areas, strict=True)
        sizes = np.array([float(a.get("area", pixels)) for a, pixels in stated])
        classes = np.array([a["category_id"] for a in labels], dtype=np.int64)
        scores = instances.scores.cpu().numpy()
        detected = instances.pred_classes.cpu().numpy()
        things: Record = {}
        for k in np.union1d(classes, detected).tolist():
            d, g = np.flatnonzero(detected == k), np.flatnonzero(classes == k)
            pairs = ious[np.ix_(d, g)]
            things[str(k)] = match_class(scores[d], areas[d], pairs, sizes[g], crowd[g])
        return {"things": things, "stuff": self._stuff(frame)}

    def _check_classes(self, frame: Mapping[str, Any]) -> None:
        things = self.info.things  # the first ids, where a data set has stuff too
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
                    + _DO_THEY_AGREE
                )
        return rles

    def _stuff(self, frame: Mapping[str, Any]) -> int:
        if self.info.things is None:
            return 0
        return len(
            {
                s["category_id"]
                for s in frame.get("segments_info", ())
                if s["category_id"] not in self.info.things
                and s["category_id"] != self.info.unlabelled_category
                and not s.get("iscrowd", 0)
            }
        )

    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        return dict(zip(("AP", "AP_frame_release"), frame_average_precision(record), strict=True))


class TemporalStreamEvaluator(StreamingEvaluator):
    """Pixels that change their predicted class from one frame to the next of a video.

    Of every frame but a video's first, and labels or not; with labels (``sem_seg_file_name``) of
    both frames also pixels that change where the label does not. Models that predict instances
    alone have no such record.
    """

    name = "temporal"
    label_key = None
    output_keys = ("sem_seg", "panoptic_seg")

    def reset(self) -> None:
        super().reset()
        self._previous: dict[str, Any] = {}

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        current: dict[str, Any] = {
            "video_id": str(frame.get("video_id", "")),
            "frame_index": int(frame.get("frame_index", 0)),
            "classes": class_map(output),
            "labels": read_sem_seg(dict(frame)) if "sem_seg_file_name" in frame else None,
        }
        previous, self._previous = self._previous, current
        adjacent = (
            previous.get("video_id") == current["video_id"]
            and previous["frame_index"] + 1 == current["frame_index"]
            and previous["classes"].shape == current["classes"].shape
        )
        if not adjacent:
            return None
        return change_counts(
            previous["classes"],
            current["classes"],
            previous["labels"],
            current["labels"],
            self.info.ignore_label,
        )

    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        return change_shares(record)

    def state_dict(self) -> dict[str, Any]:
        return {
            k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
            for k, v in self._previous.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._previous = {k: v.numpy() if isinstance(v, Tensor) else v for k, v in state.items()}


class PredictionEvaluator(StreamingEvaluator):
    """Number of predicted classes, mean entropy and finiteness of each frame, labels or not."""

    name = "prediction"
    label_key = None
    output_keys = ("sem_seg", "panoptic_seg", "instances")

    def _record(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record:
        return {
            "classes": len(predicted_classes(output)),
            "entropy": mean_entropy(output),
            "finite": scores_are_finite(output),
        }

    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        return {"predicted_classes": record["classes"], "prediction_entropy": record["entropy"]}


def score_frame(
    evaluators: Sequence[StreamingEvaluator],
    frame: Mapping[str, Any],
    output: Mapping[str, Any],
) -> Row:
    """``records`` and ``metrics`` of one frame's row; empty where nothing can be scored."""
    shared = {**output}
    if (classes := class_map(output)) is not None:
        shared["class_map"] = classes  # which several evaluators need
    records: Row = {}
    metrics: Row = {}
    for evaluator in evaluators:
        record = evaluator.record(frame, shared)
        if record is not None:
            records[evaluator.name] = record
            metrics.update(evaluator.frame_metrics(record))
    return {"records": records, "metrics": metrics} if records else {}


EVALUATORS: dict[str, type[StreamingEvaluator]] = {
    "sem_seg": SemSegStreamEvaluator,
    "video_sem_seg": SemSegStreamEvaluator,
    "video_panoptic": PanopticStreamEvaluator,
    "video_instance": InstanceStreamEvaluator,
}
"""``evaluator_type`` of a data set's metadata to the evaluator of its labels."""


def build_evaluators(cfg: CfgNode, dataset_name: str | None) -> list[StreamingEvaluator]:
    """The evaluators of one model on one data set; a second model needs a list of its own.

    Args:
        cfg: resolved.
        dataset_name: registered; its ``evaluator_type`` says what is scored. Without a data set,
            or without that, every frame is scored on whatever labels it has.
    """
    info = LabelInfo.of(dataset_name)
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type") if dataset_name else None
    labelled: list[StreamingEvaluator]
    if kind in EVALUATORS:
        labelled = [EVALUATORS[kind](info, required=True)]
    else:
        labelled = [evaluator(info) for evaluator in dict.fromkeys(EVALUATORS.values())]
    return [*labelled, TemporalStreamEvaluator(info), PredictionEvaluator(info)]
