"""Measures what it costs to save predictions, beside the frozen model's frame."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from costs.clock import measure, spread
from costs.comparison import FROZEN, Options
from costs.inputs import frozen_stream, model_of, write_video
from ttt_video.data.grey import open_videos
from ttt_video.data.sources import open_dataset
from ttt_video.errors import UserError
from ttt_video.stream import Results, Stream, VideoRun
from ttt_video.stream.saving import FORMAT_REGISTRY, SavedPredictions
from ttt_video.structures import FrameSource
from ttt_video.tasks import Shared

BLOCK = 5
"""Frames in a row, with the wait for the last file at their end: files are written behind."""


def savings(cfg: CfgNode, options: Options) -> dict[str, Any]:
    """Predicts frames of a video on disk with the frozen model, and saves them in each format.

    Args:
        cfg: of the model; ``INPUT.MIN_SIZE_TEST`` resizes frames, and predictions have the frames'
            own size.
        options: ``steps`` blocks of :data:`BLOCK` frames are measured after ``warmup`` others.

    Returns:
        ``cases``: ``runs`` of :data:`FROZEN` and of each format that the model can give, with the
        ``seconds`` of a frame, and ``speedup``: the ratio of a format's to the frozen model's.
    """
    model = model_of(cfg)
    cases = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            name = write_video(Path(folder), BLOCK, *size, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
            (source,) = open_videos(cfg, partial(open_dataset, name))
            stream = frozen_stream(model)
            works = {FROZEN: _block(stream, source, None)}
            for form in sorted(form.name for _, form in FORMAT_REGISTRY):
                # The data set of the frames names no class; those of the config do.
                sink = SavedPredictions(cfg, Path(folder), (form,), fps=10)
                try:
                    sink.check(model.outputs)
                except UserError:  # the model cannot give it
                    continue
                sink.start(VideoRun(source, Path(folder) / "unfinished"))
                works[form] = _block(stream, source, sink)
            runs = measure(works, model.device, steps=options.steps, warmup=options.warmup)
        for run in runs.values():
            run["seconds"] = spread([seconds / BLOCK for seconds in run["seconds"]["all"]])
            run["cpu_seconds_median"] /= BLOCK
        frozen = runs[FROZEN]["seconds"]["all"]
        ratios = {
            name: spread([a / b for a, b in zip(run["seconds"]["all"], frozen, strict=True)])
            for name, run in runs.items()
            if name != FROZEN
        }
        cases.append(
            {"size": list(size), "batch": 1, "precision": "fp32", "runs": runs, "speedup": ratios}
        )
    return {"cases": cases}


def _block(
    stream: Stream, source: FrameSource, sink: SavedPredictions | None
) -> Callable[[], object]:
    frames = list(source)

    @torch.no_grad()
    def run() -> None:
        for frame in frames:
            result = stream.step(frame)
            if sink is not None:
                result.output = Shared(result.output)
                sink.write(Results(result, None, {}))
        if sink is not None:
            sink.save()

    return run
