"""The evaluators of a stream: labels and outputs of one frame in, one record out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from ..data.kitti_step import read_sem_seg
from ..errors import UserError
from .base import StreamingEvaluator
from .protocols import LabelInfo, Record
from .sem_seg import class_counts, confusion_matrix, mean_iou, mean_iou_release


class SemSegStreamEvaluator(StreamingEvaluator):
    """Confusion counts of label maps (``sem_seg_file_name``)."""

    name = "sem_seg"
    label_key = "sem_seg_file_name"
    output_keys = ("sem_seg",)

    def _record(self, frame: Mapping[str, Any], output: Tensor) -> Record:
        predicted = output.argmax(0).cpu().numpy()
        try:
            confusion = confusion_matrix(
                predicted, read_sem_seg(dict(frame)), len(output), self.info.ignore_label
            )
        except ValueError as error:
            raise UserError(
                f"{frame['sem_seg_file_name']} does not fit the predictions ({error}): "
                "do the model's classes and the frame's size agree with its labels?"
            ) from error
        return class_counts(confusion)

    def frame_metrics(self, record: Record) -> dict[str, float | None]:
        return {"mIoU": mean_iou(record), "mIoU_frame_release": mean_iou_release(record)}


EVALUATORS = {
    "sem_seg": SemSegStreamEvaluator,
    "video_sem_seg": SemSegStreamEvaluator,
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
    if kind in EVALUATORS:
        return [EVALUATORS[kind](info, required=True)]
    return [evaluator(info) for evaluator in dict.fromkeys(EVALUATORS.values())]
