"""The loop over a video, its frame budget, where results go, and runs on disk."""

from .budget import BudgetedStream
from .directory import RunDirectory
from .evaluation import StreamEvaluation
from .loop import Stream
from .on_time import OnTimeStream
from .overlay import OverlayVideos
from .parallel import evaluate_in_parallel
from .results import FrameResult, OnTime, Segment
from .run import Settings
from .sinks import Results, Sink, VideoRun
from .source_model import load_source_model

__all__ = [
    "BudgetedStream",
    "FrameResult",
    "OnTime",
    "OnTimeStream",
    "OverlayVideos",
    "Results",
    "RunDirectory",
    "Segment",
    "Settings",
    "Sink",
    "Stream",
    "StreamEvaluation",
    "VideoRun",
    "evaluate_in_parallel",
    "load_source_model",
]
