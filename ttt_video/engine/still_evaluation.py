"""Labels for detectron2's evaluators of stills, read and checked as everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOPanopticEvaluator

from ttt_video.data.classes import class_names
from ttt_video.data.kitti_step import read_sem_seg
from ttt_video.data.labels import check_class_ids, present_ids, read_segment_colors


class CheckedLabels:
    """Reads the label maps of one data set: ``SemSegEvaluator``'s ``sem_seg_loading_fn``.

    detectron2's own function fails on numpy 2 (``np.array(..., copy=False)`` there refuses to
    convert), reads pixels of other than 8 bits as Pillow gives them, and lets a label that is no
    class count as another one.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        self.num_classes = len(class_names("semantic", metadata))
        self.ignore_label = metadata.get("ignore_label", 255)
        self.records = {r["sem_seg_file_name"]: r for r in DatasetCatalog.get(dataset_name)}

    def __call__(self, file_name: str, dtype: Any = np.uint8) -> np.ndarray:
        """Returns a file's (H, W) class ids in an array of its own.

        Raises:
            UserError: the file cannot be read, or has a label that is no class.
        """
        labels = read_sem_seg(self.records[file_name])
        check_class_ids(present_ids(labels), self.num_classes, self.ignore_label, file_name)
        return labels.astype(dtype)


class CheckedPanopticEvaluator(COCOPanopticEvaluator):
    """``COCOPanopticEvaluator``, which leaves it to Pillow how a label map is read.

    So each map is read here too, and refused where Pillow would change its ids.
    """

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[Any]) -> None:
        """detectron2's interface: a batch of records and predictions.

        Raises:
            UserError: a label map cannot be read, or a segment's category is no class.
        """
        number = len(class_names("panoptic", self._metadata))
        ignore_label = self._metadata.get("ignore_label", 255)
        for record in inputs:
            file_name = record["pan_seg_file_name"]
            read_segment_colors(file_name)
            categories = [segment["category_id"] for segment in record["segments_info"]]
            check_class_ids(categories, number, ignore_label, file_name)
        super().process(inputs, outputs)
