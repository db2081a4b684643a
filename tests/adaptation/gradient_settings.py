"""The settings of gradient methods, written in one row as tests vary them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ttt_video.adaptation.settings import OptimizerSettings, StepSettings


def grouped(**settings: Any) -> dict[str, Any]:
    """Returns ``optimizer`` and ``step`` of their fields among ``settings``, and all others."""
    groups: dict[str, dict[str, Any]] = {"optimizer": {}, "step": {}}
    for name, kind in (("optimizer", OptimizerSettings), ("step", StepSettings)):
        for own in {field.name for field in fields(kind)} & settings.keys():
            groups[name][own] = settings.pop(own)
    return {
        **settings,
        "optimizer": OptimizerSettings(**groups["optimizer"]),
        "step": StepSettings(**groups["step"]),
    }
