"""Predictions as files that other programs read, one format in each file of this folder."""

from . import masks, coco, cityscapes, kitti_step, confidence, color  # noqa: I001
from .base import FORMAT_REGISTRY, VOID, Format, Job, Place, Predicted, Stems
from .sink import SavedPredictions, format_names

__all__ = [
    "FORMAT_REGISTRY",
    "VOID",
    "Format",
    "Job",
    "Place",
    "Predicted",
    "SavedPredictions",
    "Stems",
    "format_names",
]
