"""Tasks, one file each, say what a prediction means; ``--register FILE`` adds others.

The order of the imports is that of tasks in rows, tables and figures.
"""

from . import semantic, panoptic, instances, steadiness, consistency, prediction  # noqa: I001
from . import colorization, color_statistics, image_classes
from .base import (
    Augmented,
    Difference,
    Painter,
    Shared,
    Target,
    Task,
    build_tasks,
    differences,
    drawn_task,
    once,
    overlay_painter,
    score_frame,
)
from .color_statistics import ColorStatistics
from .colorization import ColorizationTask
from .consistency import Consistency
from .image_classes import ImageClassTask
from .instances import InstanceTask
from .labels import LabelInfo
from .metrics import FRAMES, FrameMean, Metric, Record, Tally
from .panoptic import PanopticTask
from .prediction import PredictionStatistics
from .registry import (
    STREAMING,
    TASK_REGISTRY,
    arrow,
    digits,
    headlines,
    metrics,
    rules,
    sign,
    streaming_headlines,
    tasks,
    tasks_of,
)
from .scores import Row, ScoredFrame, Scores, score
from .semantic import SemanticTask
from .steadiness import Steadiness
