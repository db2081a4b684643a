"""The loop over a video, its frame budget, where results go, and runs on disk."""

from ..structures import FrameResult
from .budget import BudgetedStream
from .directory import RunDirectory
from .evaluation import StreamEvaluation, load_source_model
from .loop import Stream
from .overlay import OverlayVideos
from .parallel import evaluate_in_parallel
from .run import Settings
from .sinks import Results, Sink, VideoRun

__all__ = [
    "BudgetedStream",
    "FrameResult",
    "OverlayVideos",
    "Results",
    "RunDirectory",
    "Settings",
    "Sink",
    "Stream",
    "StreamEvaluation",
    "VideoRun",
    "evaluate_in_parallel",
    "load_source_model",
]
