"""Measures each stage of a frame, for the profiles from which streams simulate time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from costs.clock import spread
from costs.comparison import Options
from costs.inputs import write_video
from costs.loop import Size, cases_of, evaluating
from ttt_video.errors import UserError
from ttt_video.files import read_json_object, write_atomically
from ttt_video.stream import Results, Sink, StreamEvaluation
from ttt_video.stream.clock import Clock
from ttt_video.stream.stage_times import PARTS, cost_settings, read_cases, told_settings
from ttt_video.structures import Frame

STEP = "step of "
DIGITS = 6  # a microsecond


def stages(cfg: CfgNode, options: Options, *, cpu_seconds: bool = False) -> dict[str, Any]:
    """Runs frames of a labelled video on disk through the tool's loop, and times their stages.

    Args:
        cfg: of the method and model; ``INPUT.MIN_SIZE_TEST`` resizes frames, as everywhere.
        options: ``steps`` frames are measured after ``warmup`` others, with steps of
            ``TTT.BATCH_SIZE`` samples and, if that is more, of one.
        cpu_seconds: count the seconds that the cores worked for this process, which are those of
            the wall if it has one thread and the machine for itself.

    Returns:
        ``cases``, one for each size of files, with ``size`` of the frames at the network's
        resolution, ``method``, ``settings`` (``cost_settings`` and ``told_settings``) and ``runs``:
        the seconds of every part, and of steps by their number of samples ("step of 4").

    Raises:
        UserError: CPU seconds are asked for with several threads.
    """
    if cpu_seconds and torch.get_num_threads() > 1:
        raise UserError("--cpu-seconds counts all threads together: set OMP_NUM_THREADS=1")
    read = time.process_time if cpu_seconds else time.perf_counter
    return cases_of(options, partial(_case, cfg, options, read))


def _case(
    cfg: CfgNode, options: Options, read: Callable[[], float], size: Size, folder: Path
) -> dict[str, Any]:
    name = write_video(
        folder, options.warmup + options.steps, *size, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    )
    runs: dict[str, Any] = {}
    method = cfg.TTT.METHOD
    for batch in sorted({1, cfg.TTT.BATCH_SIZE}):
        own = cfg.clone()
        own.defrost()
        own.TTT.BATCH_SIZE = batch
        noted = _frames(own, name, folder / f"run{batch}", read)
        rows = noted.rows[options.warmup :]
        for part in PARTS:
            runs[part] = {"seconds": spread([row[part] for row in rows])}
        for samples in sorted({row["samples"] for row in rows if row["updated"]}):
            steps = [row["step"] for row in rows if row["updated"] and row["samples"] == samples]
            runs[f"{STEP}{samples}"] = {"seconds": spread(steps)}
        if method == "none":
            break
    return {
        "size": list(noted.size),
        "batch": cfg.TTT.BATCH_SIZE,
        "precision": cfg.TTT.PRECISION,
        "method": method,
        "settings": {**cost_settings(cfg, method), **told_settings(cfg, method)},
        "runs": runs,
    }


def _frames(cfg: CfgNode, dataset: str, folder: Path, read: Callable[[], float]) -> _Stages:
    """Runs the video and returns what was noted of it."""
    with evaluating(cfg, dataset, folder, behind=False) as (evaluation, source):
        evaluation.stream.clock = Clock(evaluation.device, read=read)
        noted = _Stages(evaluation)
        evaluation.run_video(source, noted, through=noted.decoding)
    return noted


class _Stages(Sink):
    """Notes the seconds of the stages of each frame."""

    def __init__(self, evaluation: StreamEvaluation) -> None:
        self.evaluation, self.clock = evaluation, evaluation.stream.clock
        self.rows: list[dict[str, Any]] = []
        self.size = (0, 0)
        self._decode = self._push = 0.0
        self._last = self.clock()
        stream: Any = evaluation.stream
        self.window = stream.window
        push = self.window.push

        def timed(frame: Any) -> Any:
            sample, self._push = self.clock.time(push, frame)
            return sample

        self.window.push = timed

    def decoding(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Hands frames on and notes how long each takes to come."""
        self._last = self.clock()
        while True:
            frame, self._decode = self.clock.time(next, frames, None)
            if frame is None:
                return
            yield frame

    def write(self, results: Results) -> None:
        now, result = self.clock(), results.adapted
        model = result.adapt_seconds + result.predict_seconds
        height, width = result.frame["image"].shape[-2:]
        self.size = (height, width)
        self.rows.append(
            {
                "decode": self._decode,
                "push": self._push,
                "predict": result.predict_seconds,
                "others": max(now - self._last - self._decode - model, 0.0),
                "step": max(result.adapt_seconds - self._push, 0.0),
                "updated": bool(result.record),
                "samples": self.window.drawn,
            }
        )
        self.window.drawn = 0
        self._last = now


def add_to_profile(file: Path, machine: str, result: Mapping[str, Any]) -> None:
    """Writes a profile, or adds to one; a case of the same method, settings and size is replaced.

    Args:
        file: JSON.
        machine: in words; "" leaves that of the file, or else of ``result``.
        result: of ``tools/measure_costs.py stages``.

    Raises:
        UserError: the file is there and no profile, or of another machine.
    """
    there: dict[str, Any] = read_json_object(file) if file.exists() else {}
    cases = read_cases(file, there) if there else []
    environment = result["environment"]
    measured_on = f"{environment['device']}, {environment['threads']} threads"
    machine = machine or there.get("machine", measured_on)
    if there and there["machine"] != machine:
        raise UserError(f"{file} is of {there['machine']}, not {machine}: give another file")
    for case in result["results"]["stages"]["cases"]:
        seconds: dict[str, Any] = {"step": {}}
        for name, run in case["runs"].items():
            values = [round(value, DIGITS) for value in run["seconds"]["all"]]
            if name.startswith(STEP):
                seconds["step"][name.removeprefix(STEP)] = values
            else:
                seconds[name] = values
        new = {key: case[key] for key in ("method", "size", "settings")}
        new |= {"date": environment["date"], "load": environment["load"], "seconds": seconds}
        cases = [c for c in cases if any(c[k] != new[k] for k in ("method", "size", "settings"))]
        cases.append(new)
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = f'{{"machine": {json.dumps(machine)}, "cases": [\n{lines}\n]}}\n'
    write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))
