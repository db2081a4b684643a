"""Adaptation methods and the memory they work on."""

import pkgutil
from importlib import import_module

from .augmentation import RandomCrop
from .base import ADAPTER_REGISTRY, Adapter, build_adapter, find_method
from .gradient import GradientAdapter
from .majority_vote import MajorityVote
from .no_adaptation import NoAdaptation
from .online_ttt_mae import ReconstructionAdapter
from .temporal_smoothing import TemporalSmoothing
from .window import Sample, SlidingWindow

for _module in pkgutil.iter_modules(__path__):  # a method registers itself: its file is enough
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ADAPTER_REGISTRY",
    "Adapter",
    "GradientAdapter",
    "MajorityVote",
    "NoAdaptation",
    "RandomCrop",
    "ReconstructionAdapter",
    "Sample",
    "SlidingWindow",
    "TemporalSmoothing",
    "build_adapter",
    "find_method",
]
