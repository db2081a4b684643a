"""Measures what a method's frames cost beside the frozen model's, on a video."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from costs.clock import measure
from costs.comparison import FROZEN, Options
from costs.inputs import frozen_stream, model_of
from ttt_video.data.grey import open_videos
from ttt_video.data.sources import open_folder, open_video
from ttt_video.errors import UserError
from ttt_video.stream import Stream


def methods(cfg: CfgNode, options: Options, *, video: Path) -> dict[str, Any]:
    """Predicts each frame with the frozen model and then with the method.

    Args:
        cfg: of the method and model.
        options: ``steps`` frames are measured after ``warmup`` others.
        video: a video file, or a folder of frames.

    Returns:
        ``methods``, one entry: ``method``, ``runs`` of it, of :data:`FROZEN` and of decoding, and
        ``cost``, the sum of its CPU seconds over the frozen model's. Methods that record a
        ``state`` have ``states``: by its number the ``share`` of frames, and their ``cost``.

    Raises:
        UserError: the video has too few frames.
    """
    opened = open_videos(cfg, partial(open_folder if video.is_dir() else open_video, video))
    if len(opened) > 1:
        raise UserError(f"{video} holds {len(opened)} videos; give one of them")
    method, frames = cfg.TTT.METHOD, iter(opened[0])
    frozen = frozen_stream(model_of(cfg))
    ours = Stream.from_config(cfg, model_of(cfg))
    current: list[Any] = []
    states: list[float] = []

    def decode() -> None:
        current[:] = [next(frames, None)]
        if current[0] is None:
            raise UserError(
                f"{video} has {len(states)} frames, and --warmup and --steps ask for "
                f"{options.warmup + options.steps}: lower --steps"
            )

    def predict() -> None:
        frozen.step(current[0])

    def adapt() -> None:
        states.append(ours.step(current[0]).record.get("state", math.nan))

    works = {"decode": decode, FROZEN: predict, method: adapt}
    runs = measure(
        works, torch.device(cfg.MODEL.DEVICE), steps=options.steps, warmup=options.warmup
    )
    theirs, own = runs[FROZEN]["cpu_seconds"], runs[method]["cpu_seconds"]
    measured = states[options.warmup :]
    found: dict[str, Any] = {"method": method, "runs": runs, "cost": sum(own) / sum(theirs)}
    by_state = {}
    for state in sorted({state for state in measured if not math.isnan(state)}):
        here = [i for i, other in enumerate(measured) if other == state]
        cost = sum(own[i] for i in here) / sum(theirs[i] for i in here)
        by_state[str(int(state))] = {"share": len(here) / len(measured), "cost": cost}
    if by_state:
        found["states"] = by_state
    return {"methods": [found]}
