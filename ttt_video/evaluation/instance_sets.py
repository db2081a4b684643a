"""Average precision in detectron2's evaluation of whole data sets, as training does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from pycocotools.mask import area as mask_area

from ..data.coco_json import CocoError, instance_faults
from .evaluators import InstanceStreamEvaluator
from .protocols import LabelInfo, Record


class InstanceSetEvaluator(InstanceStreamEvaluator):
    """A stream's average precision in detectron2's loop, whose mappers drop the labels.

    Its ``segm`` metrics have the names of detectron2's ``COCOEvaluator``, which cannot score a data
    set without a json file by the areas that are stated.
    """

    def __init__(self, dataset_name: str) -> None:
        """Loads the data set, which must be registered."""
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
        return {"segm": {k: metrics[k] for k in metrics if k in wanted or k.startswith("AP-")}}


class ThingEvaluator(COCOEvaluator):
    """Average precision of a panoptic data set's things.

    detectron2's metadata of COCO panoptic lists all 133 classes as ``thing_classes``, of which its
    own evaluator can name no more than the 80 things that come first.
    """

    def __init__(self, dataset_name: str, **arguments: Any):
        super().__init__(dataset_name, **arguments)
        content = self._coco_api.dataset
        if not self._do_evaluation:
            return
        if faults := instance_faults(content):
            raise CocoError(self._metadata.json_file, faults)
        for annotation in content["annotations"]:  # as in a stream; pycocotools wants both
            annotation.setdefault("iscrowd", 0)
            if "area" not in annotation:
                annotation["area"] = int(mask_area(self._coco_api.annToRLE(annotation)))

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        things = len(self._metadata.thing_dataset_id_to_contiguous_id)
        names = None if class_names is None else class_names[:things]
        return super()._derive_coco_results(coco_eval, iou_type, names)
