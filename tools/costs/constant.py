"""Measures whether a frame costs the same for any window and anywhere in a video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from costs.clock import measure, resident_memory, spread
from costs.comparison import Options
from costs.inputs import frames, model_of
from ttt_video.errors import UserError
from ttt_video.stream import BudgetedStream, OnTimeStream, Stream

AnyStream = Stream | BudgetedStream | OnTimeStream

REPORTS = 10
"""Number of times that memory is read on the way to a position."""


def constancy(
    cfg: CfgNode, options: Options, *, windows: Sequence[int], positions: Sequence[int]
) -> dict[str, Any]:
    """Brings a stream to each position with each window, and measures them in turn from there.

    All take the steps of ``TTT.*``, also on the way to the position, so that whatever grows has
    grown.

    Args:
        cfg: of the method and model.
        options: the first size counts; ``steps`` frames of each stream are measured.
        windows: sizes k to compare with the first.
        positions: numbers of frames before the measured ones, to compare with the first.

    Returns:
        ``streams``, one for each window and position: ``seconds``, their ratios, round by round, to
        the first window's at the same position and to the first position's with the same window,
        and the process's memory on the way.
    """
    if min(windows) < 1 or min(positions) < 0:
        raise UserError(
            f"--windows {list(windows)} and --positions {list(positions)}: windows hold at least "
            "1 frame, and positions count from 0"
        )
    device = torch.device(cfg.MODEL.DEVICE)
    video = frames(16, *options.sizes[0])
    runners: dict[str, AnyStream] = {}
    streams: dict[str, dict[str, Any]] = {}
    for window in windows:
        for position in positions:
            own = cfg.clone()
            own.defrost()
            own.TTT.WINDOW_SIZE = window
            runner = Stream.from_config(own, model_of(own))
            name = f"window {window}, frame {position}"
            runners[name] = runner
            streams[name] = {"window": window, "position": position}
            streams[name]["memory"] = _advance(runner, video, position)
    works = {
        name: _frames(runner, video, streams[name]["position"]) for name, runner in runners.items()
    }
    for name, run in measure(works, device, steps=options.steps, warmup=options.warmup).items():
        streams[name].update(run)
    for stream in streams.values():
        first_window = streams[f"window {windows[0]}, frame {stream['position']}"]
        first_position = streams[f"window {stream['window']}, frame {positions[0]}"]
        stream["to_first_window"] = _ratio(stream, first_window)
        stream["to_first_position"] = _ratio(stream, first_position)
    return {"size": list(options.sizes[0]), "batch": cfg.TTT.BATCH_SIZE, "streams": streams}


def _advance(runner: AnyStream, video: Callable[[int], Any], position: int) -> list[dict[str, int]]:
    """Runs a stream up to a frame; returns the process's memory at some places on the way."""
    memory = []
    for index in range(position):
        runner.step(video(index))
        if (index + 1) % max(position // REPORTS, 1) == 0:
            memory.append({"frames": index + 1, "resident_bytes": resident_memory()})
    return memory


def _frames(runner: AnyStream, video: Callable[[int], Any], position: int) -> Callable[[], object]:
    indices = iter(range(position, 2**62))
    return lambda: runner.step(video(next(indices)))


def _ratio(stream: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Returns the ratios of a stream's seconds to another's, round by round, and of CPU time."""
    pairs = zip(stream["seconds"]["all"], first["seconds"]["all"], strict=True)
    ratios = spread([a / b for a, b in pairs])
    del ratios["all"]
    medians = stream["seconds"]["median"] / first["seconds"]["median"]
    cpu = stream["cpu_seconds_median"] / first["cpu_seconds_median"]
    return {**ratios, "of_medians": medians, "of_cpu_medians": cpu}
