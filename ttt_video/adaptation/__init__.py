"""Adaptation methods and the memory they work on."""

from .augmentation import RandomCrop
from .base import ADAPTER_REGISTRY, Adapter, GradientAdapter, build_adapter, find_method
from .no_adaptation import NoAdaptation
from .online_ttt_mae import ReconstructionAdapter
from .window import Sample, SlidingWindow

__all__ = [
    "ADAPTER_REGISTRY",
    "Adapter",
    "GradientAdapter",
    "NoAdaptation",
    "RandomCrop",
    "ReconstructionAdapter",
    "Sample",
    "SlidingWindow",
    "build_adapter",
    "find_method",
]
