"""Which metrics tables and figures show: the tasks say, nothing here lists them."""

from __future__ import annotations

from .. import tasks
from ..tasks.metrics import PROTOCOLS

UNLABELLED = (
    "predicted_classes_min", "predicted_classes_last", "prediction_entropy_mean", "change"
)  # fmt: skip
"""What a sweep's table shows where no source has labels: whether a method collapsed."""


def headlines(protocol: str = "standard") -> list[str]:
    """Returns the metric that each task is judged by, in percent, in the order of columns."""
    return [metric + PROTOCOLS[protocol] for metric in tasks.headlines()]
