"""detectron2's evaluators of stills, which read and check labels as a stream does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator
from pycocotools.mask import area as mask_area

from ..formats.coco_json import CocoError, instance_faults
from ..formats.labels import check_class_ids, present_ids, read_segment_colors, read_sem_seg


class CheckedLabels:
    """Reads the label maps of one data set, as ``sem_seg_loading_fn`` of ``SemSegEvaluator``.

    detectron2's own function fails on numpy 2, whose ``np.array(..., copy=False)`` refuses to
    convert, takes pixels of other than 8 bits as Pillow gives them, and lets a label that is no
    class count as another one.
    """

    def __init__(self, dataset_name: str):
        metadata = MetadataCatalog.get(dataset_name)
        self.num_classes = len(metadata.get("stuff_classes") or ())
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
    """``COCOPanopticEvaluator`` that refuses label maps whose ids Pillow would change."""

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[Any]) -> None:
        """Collects a batch of records and predictions.

        Raises:
            UserError: a label map cannot be read, or a segment's category is no class.
        """
        number = len(self._metadata.get("stuff_classes") or ())
        ignore_label = self._metadata.get("ignore_label", 255)
        for record in inputs:
            file_name = record["pan_seg_file_name"]
            read_segment_colors(file_name)
            categories = [segment["category_id"] for segment in record["segments_info"]]
            check_class_ids(categories, number, ignore_label, file_name)
        super().process(inputs, outputs)


class ThingEvaluator(COCOEvaluator):
    """Computes the AP of things, for a data set with a ``json_file``.

    detectron2 lists all 133 classes of COCO panoptic as ``thing_classes``. This class names the 80
    things, which come first.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        # The fast implementation needs detectron2's compiled part.
        super().__init__(dataset_name, ("segm",), output_dir=output_dir, use_fast_impl=False)
        content = self._coco_api.dataset
        if not self._do_evaluation:
            return
        if faults := instance_faults(content):
            raise CocoError(self._metadata.json_file, faults)
        for annotation in content["annotations"]:  # pycocotools needs both; a stream does the same
            annotation.setdefault("iscrowd", 0)
            if "area" not in annotation:
                annotation["area"] = int(mask_area(self._coco_api.annToRLE(annotation)))

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        things = len(self._metadata.thing_dataset_id_to_contiguous_id)
        names = None if class_names is None else class_names[:things]
        return super()._derive_coco_results(coco_eval, iou_type, names)
