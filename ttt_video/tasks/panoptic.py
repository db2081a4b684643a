"""Panoptic segmentation: segments of things and stuff, scored by panoptic quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from ..errors import UserError, require
from ..formats.labels import check_class_ids, read_segment_colors, read_segment_ids
from ..visualization.overlay import SegmentPainter, class_palette, legend_entries, shade
from .base import DO_THEY_AGREE, OTHER_CLASS, Augmented, Painter, Target, Task
from .labels import LabelInfo
from .metrics import FRAMES, FrameMean, Metric, Record, Tally
from .outputs import other_classes
from .panoptic_quality import (
    add_panoptic_counts,
    class_quality,
    measure_overlaps,
    panoptic_counts,
    panoptic_counts_release,
    panoptic_quality,
    panoptic_quality_release,
)
from .registry import TASK_REGISTRY
from .stills import CheckedPanopticEvaluator, ThingEvaluator


class _SegmentTally(Tally):
    sum = staticmethod(add_panoptic_counts)

    def add(self, frame_index: int, record: Record) -> None:
        super().add(frame_index, record["standard"])

    @classmethod
    def joined(cls, videos: Sequence[Tally], info: LabelInfo) -> dict[str, Any]:
        things = {} if info.things is None else {"things": info.things}
        return {"counts": super().joined(videos, info), **things}


@TASK_REGISTRY.register()
class PanopticTask(Task):
    """Reads segment maps (``pan_seg_file_name``, ``segments_info``).

    A record has the ``PanopticCounts`` by the field's rules (``standard``) and the release's.
    """

    name = "panoptic_seg"
    kind = "panoptic"
    label_keys = ("pan_seg_file_name", "segments_info")
    output_keys = ("panoptic_seg",)
    evaluator_types = ("coco_panoptic_seg", "video_panoptic")
    headline = "PQ"
    streaming = True
    tally = _SegmentTally
    switch = "MODEL.MASK_FORMER.TEST.PANOPTIC_ON"
    picture_rank = 1  # it shows all that the other outputs show
    difference = OTHER_CLASS
    objects_key = "segments_info"
    mappers = {"mask_former_panoptic": "crop", "coco_panoptic_lsj": "lsj"}  # noqa: RUF012

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
                f"{file_name} cannot be compared with the prediction ({error}): {DO_THEY_AGREE}"
            ) from error
        unlabelled = self.info.unlabelled_category
        return {
            "standard": panoptic_counts(overlaps.with_void(unlabelled)),
            "release": panoptic_counts_release(overlaps, unlabelled),
        }

    def missed(self, frame: Mapping[str, Any], output: Mapping[str, Any]) -> Record | None:
        """Scores a map without segments."""
        if "panoptic_seg" not in output:
            return self.record(frame, output)
        ids = torch.zeros_like(output["panoptic_seg"][0])
        return self.record(frame, {"panoptic_seg": (ids, [])})

    @classmethod
    def painter(cls, output: Mapping[str, Any], metadata: Any) -> Painter:
        """Colours segments, each thing in a shade of its class's colour, outlined and named."""
        ids, segments = output["panoptic_seg"]
        colors = np.zeros((1 + max((s["id"] for s in segments), default=0), 3), np.uint8)
        count = 1 + max((s["category_id"] for s in segments), default=0)
        stuff = class_palette(metadata, count)
        things = class_palette(metadata, count, things=True)
        for segment in segments:
            k, number = segment["category_id"], segment["id"]
            colors[number] = shade(things[k], number) if segment["isthing"] else stuff[k]
        names = cls.drawn_names(metadata, count)
        named = {s["id"]: names[s["category_id"]] for s in segments if names and s["isthing"]}
        seen = {s["category_id"] for s in segments}
        entries = legend_entries(names, class_palette(metadata, len(names)), seen)
        return SegmentPainter(ids.cpu().numpy(), colors, named, entries)

    @classmethod
    def differing(cls, output: Mapping[str, Any], other: Mapping[str, Any]) -> float:
        """Returns the percentage of pixels whose segments have another class."""
        maps = ({"panoptic_seg": each["panoptic_seg"]} for each in (output, other))
        return other_classes(*maps)

    @classmethod
    def label_map(cls, record: Mapping[str, Any]) -> np.ndarray:
        """Returns the (H, W) segment ids."""
        return read_segment_ids(record["pan_seg_file_name"])

    @classmethod
    def draw_labels(cls, canvas: Any, record: Mapping[str, Any], metadata: Any) -> Any:
        """Draws the segments that have a class, numbered from 1 as the drawing wants them."""
        labels, classes = cls.label_map(record), len(cls.class_names(metadata))
        things = set(metadata.thing_dataset_id_to_contiguous_id.values())
        segments = [s for s in record["segments_info"] if s["category_id"] < classes]
        ids = torch.zeros(labels.shape, dtype=torch.int32)
        drawn = []
        for number, segment in enumerate(segments, start=1):
            ids[torch.from_numpy(labels == segment["id"])] = number
            k = segment["category_id"]
            drawn.append({"id": number, "category_id": k, "isthing": k in things})
        return canvas.draw_panoptic_seg(ids, drawn)

    @classmethod
    def training_labels(cls, record: Mapping[str, Any]) -> np.ndarray:
        """Reads the (H, W, 3) uint8 colours, which are augmented faster than ids."""
        return read_segment_colors(record["pan_seg_file_name"])

    @classmethod
    def training_target(cls, labels: Any, record: Mapping[str, Any], image: Augmented) -> Target:
        """Makes one mask per segment of the (H, W, 3) uint8 COCO panoptic map.

        A pixel's segment is ``R + 256 G + 65536 B``; crowds and unlisted segments are left out.
        """
        ids = labels.astype(np.int64) @ np.array([1, 256, 256**2])
        segments = [s for s in record["segments_info"] if not s.get("iscrowd", 0)]
        classes = np.array([segment["category_id"] for segment in segments], np.int64)
        segment_ids = np.array([segment["id"] for segment in segments], np.int64)
        return classes, ids[None] == segment_ids[:, None, None]

    @classmethod
    def still_evaluator(cls, cfg: CfgNode, dataset_name: str, output_dir: str) -> DatasetEvaluator:
        """Scores segments as panopticapi does, and the AP of instances if the model has them."""
        # --no-deps, because it pins numpy<2 without need.
        require("panopticapi", "--no-deps panopticapi-lite", "panoptic evaluation")
        metadata = MetadataCatalog.get(dataset_name)
        if metadata.get("evaluator_type") != "coco_panoptic_seg":
            raise UserError(
                f"data set {dataset_name!r} has evaluator_type {metadata.get('evaluator_type')!r}; "
                "panoptic evaluation in training supports coco_panoptic_seg"
            )
        evaluators: list[DatasetEvaluator] = [CheckedPanopticEvaluator(dataset_name, output_dir)]
        json_file = metadata.get("json_file")
        if cfg.MODEL.MASK_FORMER.TEST.INSTANCE_ON and json_file:
            evaluators.append(ThingEvaluator(dataset_name, output_dir))
        return DatasetEvaluators(evaluators)


_EXAMPLE = [
    {"standard": {"0": [1, 0, 1, 0.75], "1": [1, 1, 0, 0.9]}, "release": {"0": [1, 0, 1, 0.75]}},
    {"standard": {"0": [1, 0, 0, 0.75]}, "release": {"0": [1, 0, 0, 0.75]}},
]


class _Quality(Metric):
    place = 0  # among PQ, SQ, RQ

    def value(self, total: Mapping[str, Any]) -> float | None:
        quality = panoptic_quality(total["counts"])
        return quality and quality[self.place]

    def by_class(self, total: Mapping[str, Any]) -> dict[int, float]:
        return {k: values[self.place] for k, values in class_quality(total["counts"]).items()}


@PanopticTask.add_metric
class PanopticQuality(_Quality):
    """Panoptic quality of all frames."""

    name = "PQ"
    rule = (
        "sum of IoUs above 1/2 over TP + FP/2 + FN/2 of each class, all frames pooled; "
        "mean over the classes that are labelled or predicted; void pixels (and the unlabelled "
        "category) count for no union, crowds are never missed, predictions of which more than "
        "half is void or crowd of their class are not false"
    )
    example = (_EXAMPLE, 100 * (1.5 / 2.5 + 0.9 / 1.5) / 2)

    @staticmethod
    def frame(record: Record) -> float | None:
        quality = panoptic_quality(add_panoptic_counts([record["standard"]]))
        return quality and quality[0]


@PanopticTask.add_metric
class SegmentationQuality(_Quality):
    """Mean IoU of matched segments."""

    name = "SQ"
    rule = "as PQ, but the mean IoU of the matched segments; 0 where none is matched"
    place = 1
    example = (_EXAMPLE, 100 * (0.75 + 0.9) / 2)


@PanopticTask.add_metric
class RecognitionQuality(_Quality):
    """F1 of segments."""

    name = "RQ"
    rule = "as PQ, but TP over TP + FP/2 + FN/2"
    place = 2
    example = (_EXAMPLE, 100 * (2 / 2.5 + 1 / 1.5) / 2)


@PanopticTask.add_metric
class ThingQuality(Metric):
    """PQ of the things, where the data set says which they are."""

    name = "PQ_things"
    rule = "PQ, mean over the thing classes"
    needs = "things"
    things = True
    example = (_EXAMPLE, 100 * 1.5 / 2.5)

    def value(self, total: Mapping[str, Any]) -> float | None:
        quality = panoptic_quality(total["counts"], lambda k: (k in total["things"]) == self.things)
        return quality and quality[0]


@PanopticTask.add_metric
class StuffQuality(ThingQuality):
    """PQ of the stuff."""

    name = "PQ_stuff"
    rule = "PQ, mean over the stuff classes"
    things = False
    example = (_EXAMPLE, 100 * 0.9 / 1.5)


@PanopticTask.add_metric
class PanopticQualityOfFrames(FrameMean):
    """Mean over frames of each frame's PQ, by the release's rule."""

    name = "PQ_frame_release"
    rule = (
        "PQ of each single frame; crowds are ordinary segments; the "
        "unlabelled category is not void; areas of labelled segments as their file states "
        "them; a frame without any segment counts as 0" + FRAMES
    )
    example = (_EXAMPLE, 100 * (0.75 / 1.5 + 0.75) / 2)

    @staticmethod
    def frame(record: Record) -> float:
        return panoptic_quality_release(record["release"])
