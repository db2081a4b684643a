"""Tasks: what a prediction means. One file per task; another one comes with ``--register FILE``.

The order of the files below is that of tasks in rows, tables and figures.
"""

from . import semantic, panoptic, instances, steadiness, prediction  # noqa: F401, I001
from . import colorization, color_statistics  # noqa: F401
from .base import (
    Augmented,
    Painter,
    Shared,
    Target,
    Task,
    build_tasks,
    once,
    overlay_painter,
    score_frame,
)
from .color_statistics import ColorStatistics
from .colorization import ColorizationTask
from .instances import InstanceTask
from .labels import LabelInfo
from .metrics import FRAMES, FrameMean, Metric, Record, Tally
from .panoptic import PanopticTask
from .prediction import PredictionStatistics
from .registry import (
    TASK_REGISTRY,
    arrow,
    digits,
    headlines,
    metrics,
    rules,
    sign,
    tasks,
    tasks_of,
)
from .scores import Row, ScoredFrame, Scores, score
from .semantic import SemanticTask
from .steadiness import Steadiness

__all__ = [
    "FRAMES",
    "TASK_REGISTRY",
    "Augmented",
    "ColorStatistics",
    "ColorizationTask",
    "FrameMean",
    "InstanceTask",
    "LabelInfo",
    "Metric",
    "Painter",
    "PanopticTask",
    "PredictionStatistics",
    "Record",
    "Row",
    "ScoredFrame",
    "Scores",
    "SemanticTask",
    "Shared",
    "Steadiness",
    "Tally",
    "Target",
    "Task",
    "arrow",
    "build_tasks",
    "digits",
    "headlines",
    "metrics",
    "once",
    "overlay_painter",
    "rules",
    "score",
    "score_frame",
    "sign",
    "tasks",
    "tasks_of",
]
