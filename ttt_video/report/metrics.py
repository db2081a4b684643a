"""Names the metrics that tables and figures show; the tasks decide which these are."""

from __future__ import annotations

from .. import tasks
from ..tasks.metrics import PROTOCOLS

UNLABELLED = (
    "predicted_classes_min", "predicted_classes_last", "prediction_entropy_mean", "change"
)  # fmt: skip
"""Shown by a sweep's table if no source has labels: they tell whether a method collapsed."""


def headlines(protocol: str = "standard") -> list[str]:
    """Returns the metric that judges each task, in the order of columns.

    Those of predictions that came in time follow, which no frame has by itself.
    """
    suffix = PROTOCOLS[protocol]
    own = [metric + suffix for metric in tasks.headlines()]
    if protocol == "release":
        return own
    return [*own, *(metric + suffix for metric in tasks.streaming_headlines())]
