"""Adaptation methods and the memory they work on."""

import pkgutil
from importlib import import_module

from .augmentation import RandomCrop
from .auto_window import AutoWindow, build_window
from .base import ADAPTER_REGISTRY, Adapter, build_adapter, find_method, method_names, timed_as
from .gradient import GradientAdapter
from .no_adaptation import NoAdaptation
from .online_ttt_mae import ReconstructionAdapter
from .window import LimitedWindow, Sample, SlidingWindow
from .wrappers import ClassBalance, MajorityVote, TemporalSmoothing, Wrapper

for _module in pkgutil.iter_modules(__path__):  # a method registers itself: its file is enough
    import_module(f"{__name__}.{_module.name}")

__all__ = [
    "ADAPTER_REGISTRY",
    "Adapter",
    "AutoWindow",
    "ClassBalance",
    "GradientAdapter",
    "LimitedWindow",
    "MajorityVote",
    "NoAdaptation",
    "RandomCrop",
    "ReconstructionAdapter",
    "Sample",
    "SlidingWindow",
    "TemporalSmoothing",
    "Wrapper",
    "build_adapter",
    "build_window",
    "find_method",
    "method_names",
    "timed_as",
]
