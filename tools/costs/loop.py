"""Measures the whole loop with decoding, scoring and writing, and one that rebuilds everything."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from torch.utils.data import DataLoader, Dataset

from costs.clock import peak_memory, reset_peak_memory, resident_memory, spread, synchronize
from costs.comparison import OURS, Options
from costs.inputs import model_of, write_video
from ttt_video.adaptation import build_window
from ttt_video.adaptation.gradient import GradientAdapter
from ttt_video.adaptation.settings import OptimizerSettings
from ttt_video.data.grey import open_videos
from ttt_video.data.sources import open_dataset
from ttt_video.errors import UserError
from ttt_video.formats.images import FrameTransform, read_rgb
from ttt_video.stream import (
    OverlayVideos,
    Results,
    RunDirectory,
    Settings,
    Sink,
    Stream,
    StreamEvaluation,
)
from ttt_video.structures import FrameSource, video_seed
from ttt_video.tasks import build_tasks, score_frame

PLAIN = "plain"

Size = tuple[int, int]
"""Height and width of frames in px."""


def loops(cfg: CfgNode, options: Options, *, overlay: bool = False) -> dict[str, Any]:
    """Runs frames of a labelled video on disk through the tool's loop and through a plain one.

    Args:
        cfg: of the method and model. Frames are PNG files of each size; ``INPUT.MIN_SIZE_TEST``
            resizes them, as everywhere.
        options: ``steps`` frames are measured after ``warmup`` others; batch and precision are
            those of ``TTT.*``.
        overlay: also write ``overlay.mp4``.

    Returns:
        ``cases``: ``runs`` of :data:`OURS` and, with peers, of :data:`PLAIN`; each with the
        ``seconds`` of a frame, of its ``step`` and its ``prediction``, and ``overhead``: the share
        of the frame outside both.
    """
    return cases_of(options, partial(_case, cfg, options, overlay))


def cases_of(options: Options, case: Callable[[Size, Path], Any]) -> dict[str, Any]:
    """Returns as ``cases`` what a function measures of each size of files, in an empty folder."""
    cases = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            cases.append(case(size, Path(folder)))
    return {"cases": cases}


def _case(
    cfg: CfgNode, options: Options, overlay: bool, size: Size, folder: Path
) -> dict[str, Any]:
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    count = options.warmup + options.steps
    name = write_video(folder, count, *size, classes)
    device = torch.device(cfg.MODEL.DEVICE)
    runs: dict[str, Any] = {}
    loops: dict[str, Callable[[], list[dict[str, float]]]] = {
        OURS: lambda: tool_loop(cfg, name, folder / "run", overlay=overlay)
    }
    if options.peers:
        loops[PLAIN] = lambda: plain_loop(cfg, name)
    for who, loop in loops.items():
        before = reset_peak_memory(device)
        rows = loop()[options.warmup :]
        peak = peak_memory(device)
        frame = [row["frame"] for row in rows]
        model = [row["step"] + row["prediction"] for row in rows]
        runs[who] = {
            "seconds": spread(frame),
            "step": spread([row["step"] for row in rows]),
            "prediction": spread([row["prediction"] for row in rows]),
            "overhead": spread([(f - m) / f for f, m in zip(frame, model, strict=True)]),
            "overhead_seconds": spread([f - m for f, m in zip(frame, model, strict=True)]),
            "peak_memory_bytes": peak,
            "working_memory_bytes": peak - before,
            "resident_bytes": resident_memory(),
        }
    case = {
        "size": list(size),
        "batch": cfg.TTT.BATCH_SIZE,
        "precision": cfg.TTT.PRECISION,
        "predict_precision": cfg.TTT.PREDICT_PRECISION,
        "method": cfg.TTT.METHOD,
        "overlay": overlay,
        "runs": runs,
    }
    if options.peers:
        medians = {who: run["seconds"]["median"] for who, run in runs.items()}
        case["speedup"] = {PLAIN: {"median": medians[PLAIN] / medians[OURS]}}
    return case


def tool_loop(
    cfg: CfgNode, dataset: str, folder: Path, *, overlay: bool = False
) -> list[dict[str, float]]:
    """Runs one video as ``tools/stream_eval.py``; returns the seconds of frames and their parts."""
    videos = [OverlayVideos(cfg, folder, fps=10.0, single=True)] if overlay else []
    with evaluating(cfg, dataset, folder, sinks=videos) as (evaluation, source):
        times = _Times()
        evaluation.run_video(source, times)
    return times.rows


@contextmanager
def evaluating(
    cfg: CfgNode, dataset: str, folder: Path, **settings: Any
) -> Iterator[tuple[StreamEvaluation, FrameSource]]:
    """Gives the tool's loop into a folder, and the one video of a data set.

    ``settings`` are further ones of :class:`Settings`.
    """
    with closing(RunDirectory(folder)) as run:
        (source,) = open_videos(cfg, partial(open_dataset, dataset))
        yield StreamEvaluation(Settings(cfg, run, dataset, **settings), model_of(cfg)), source


class _Times(Sink):
    """Notes the seconds of each frame."""

    behind = True

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.last = time.perf_counter()

    def write(self, results: Results) -> None:
        now, result = time.perf_counter(), results.adapted
        seconds = result.adapt_seconds, result.predict_seconds
        self.rows.append(_row(now - self.last, *seconds, result.record))
        self.last = now


def plain_loop(cfg: CfgNode, dataset: str, *, workers: int = 2) -> list[dict[str, float]]:
    """Runs the same frames as the authors' release does.

    For every frame it builds a data loader with worker processes, reads and resizes all frames of
    the window again, builds the optimizer and the evaluators, and reads the frame once more through
    a second loader to predict it. Model, loss, masks and random draws are ours, so the numbers are
    those of our loop with ``TTT.OPTIMIZER.RESTART``.
    """
    model = model_of(cfg)
    device = torch.device(cfg.MODEL.DEVICE)
    adapter = Stream.from_config(cfg, model).adapter
    if not isinstance(adapter, GradientAdapter):
        raise UserError(f"--method {cfg.TTT.METHOD} takes no gradient steps: add --no-peers")
    records = DatasetCatalog.get(dataset)
    transform = FrameTransform.from_config(cfg)
    generator = torch.Generator().manual_seed(video_seed(max(cfg.SEED, 0), records[0]["video_id"]))
    rows = []
    last = time.perf_counter()
    for index, record in enumerate(records):
        window = build_window(cfg, device)
        first = max(index + 1 - window.size, 0) if window.size else 0
        recent = _Files(records[first : index + 1], transform)
        for frame in DataLoader(recent, batch_size=None, num_workers=workers):
            window.push(frame)
        adapter.optimizer = OptimizerSettings.from_config(cfg).build(model)
        scorers = build_tasks(dataset)
        start = time.perf_counter()
        losses = adapter.adapt(window, generator)
        synchronize(device)
        adapted = time.perf_counter()
        again = DataLoader(_Files([record], transform), batch_size=None, num_workers=workers)
        (frame,) = again
        loaded = time.perf_counter()
        output = adapter.predict(frame)
        synchronize(device)
        predicted = time.perf_counter()
        score_frame(scorers, frame, output)
        now = time.perf_counter()
        rows.append(_row(now - last, adapted - start, predicted - loaded, losses))
        last = now
    return rows


def _row(
    frame: float, step: float, prediction: float, record: dict[str, float]
) -> dict[str, float]:
    loss = record.get("loss_recon", float("nan"))
    return {"frame": frame, "step": step, "prediction": prediction, "loss_recon": loss}


class _Files(Dataset):
    """Frames of a data set, decoded and resized at every access."""

    def __init__(self, records: list[dict[str, Any]], transform: FrameTransform) -> None:
        self.records = records
        self.transform = transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return {**record, "image": self.transform(read_rgb(record["file_name"]))}
