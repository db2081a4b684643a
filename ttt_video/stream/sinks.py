"""Where the results of streams go: one protocol for rows, scores, progress, pictures, and yours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from torch import nn
from tqdm import tqdm

from ..structures import Frame, FrameSource
from ..tasks import Task, build_tasks, differences, score_frame
from .directory import Row, RunDirectory
from .records import finite
from .results import FrameResult
from .saved_state import UnusableState


@dataclass
class VideoRun:
    """A video on its way through a run.

    Attributes:
        source: its frames, as many as are to be run, in the order in which they are.
        folder: what an interrupted video goes on from is kept there; it may not exist.
        done: number of its frames that were run, by an earlier run too.
        skipped_before: unreadable files that an earlier run met.
        unsaved: how many of ``done`` were run after the state was saved that sinks have loaded.
            Only a live source has any: they do not come again, so what was written of them stays.
        complete: whether it came to its end.
        size: of its frames (:func:`ttt_video.stream.gaps.size_of`), once one has come.
    """

    source: FrameSource
    folder: Path
    done: int = 0
    skipped_before: Sequence[str] = ()
    unsaved: int = 0
    complete: bool = False
    size: Sequence[int] | None = None

    @property
    def video_id(self) -> str:
        """The video's name."""
        return self.source.video_id

    @property
    def skipped(self) -> list[str]:
        """Unreadable files so far; some may have been met by both runs."""
        return list(dict.fromkeys([*self.skipped_before, *self.source.skipped]))


@dataclass
class Results:
    """What one frame gave.

    Attributes:
        adapted: the stream's result.
        frozen: that of the frozen model beside it, for the same frame; None where there is none.
        row: of ``frames.jsonl``; scores are in it once :class:`Scores` has written.
    """

    adapted: FrameResult
    frozen: FrameResult | None
    row: Row


class Sink:
    """Takes what streams give. A run calls each of its sinks like this::

        sink.check(model.outputs)    # once, before the first video; then sink.attach(model)
        sink.load(state)             # only where an interrupted video goes on: what save() gave
        sink.start(video)            # video.done of its frames were written before
        for results in streams:
            sink.write(results)      # the frame's row is on disk
            state = sink.save()      # now and then (--save-every), for the resumed run's load()
        sink.end(video)              # also of a video that was stopped: see video.complete

    All methods do nothing unless a subclass says what. A run with several workers gives each of
    them a copy of the sink, which must be picklable then.

    Attributes:
        measures: whether it would not be there without a measurement of the stream, so that a frame
            budget does not pay for it.
        behind: whether ``write`` needs nothing but its argument, such as the model, which may have
            adapted to later frames by then. If all sinks of a run say so, ``write`` may be called
            in a thread behind the loop (``Settings.behind``), frame by frame; all other methods are
            called in the loop, after every earlier ``write`` has ended.
        flags: what a user asked for, by flag; a run goes on only with the same.
    """

    measures: ClassVar[bool] = False
    behind: ClassVar[bool] = False
    flags: Mapping[str, Any] = MappingProxyType({})

    def check(self, outputs: frozenset[str]) -> None:
        """Is told the outputs of the model before the first video.

        Raises:
            UserError: the sink cannot do with them what it is for.
        """

    def attach(self, model: nn.Module) -> None:
        """Is given the model with its source weights, once, after :meth:`check`.

        In :meth:`write` of a sink that is not :attr:`behind`, it has the weights that the frame's
        update left.
        """

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Args:
            state: what :meth:`save` gave, read from disk.

        Raises:
            UnusableState, KeyError, ValueError, TypeError: it cannot be; the video starts anew.
        """

    def start(self, video: VideoRun) -> None:
        """Begins a video; where ``video.done`` is 0, nothing that was loaded counts."""

    def write(self, results: Results) -> None:
        """Takes the results of one frame, also of one whose row an earlier run has written."""

    def save(self) -> dict[str, Any]:
        """Returns what later frames depend on: plain values and tensors, not copied."""
        return {}

    def end(self, video: VideoRun) -> None:
        """Ends a video that was started; sinks end in the opposite order."""


class Scores(Sink):
    """Scores each prediction by the tasks of the data set, and adds the numbers to the row."""

    measures = True
    behind = True

    def __init__(self, cfg: CfgNode, dataset_name: str, *, compare: bool) -> None:
        """``cfg`` is resolved; ``compare``: there are results of the frozen model, too."""
        self.cfg = cfg
        self.dataset_name = dataset_name
        self.names = ("adapted", "frozen") if compare else ("adapted",)
        self.record_steps = cfg.TTT.RECORD_STEPS

    def start(self, video: VideoRun) -> None:
        """Forgets the video before."""
        if not video.done:
            self.tasks = {name: build_tasks(self.dataset_name, self.cfg) for name in self.names}

    def write(self, results: Results) -> None:
        """Adds ``records`` and ``metrics`` to the row, and the same of the frozen model to that.

        The frozen model's part has ``differences``, too: how far it is from the adapted one, with
        labels or without.
        """
        frame, row = results.adapted.frame, results.row
        row.update(score_frame(self.tasks["adapted"], frame, results.adapted.output))
        if self.record_steps:
            records = row.get("records", {})
            row.update(steps_of(self.tasks["adapted"], records, results.adapted.steps))
        if results.frozen is not None:
            scores = score_frame(self.tasks["frozen"], frame, results.frozen.output)
            frozen = {"predict_seconds": results.frozen.predict_seconds, **scores}
            apart = differences(results.adapted.output, results.frozen.output)
            row["frozen"] = {**frozen, **({"differences": apart} if apart else {})}

    def save(self) -> dict[str, Any]:
        """Returns the states of all tasks by model and name."""
        return {
            name: {task.name: task.state_dict() for task in tasks}
            for name, tasks in self.tasks.items()
        }

    def load(self, state: dict[str, Any]) -> None:
        """See :class:`Sink`."""
        self.tasks = {name: build_tasks(self.dataset_name, self.cfg) for name in self.names}
        for name, tasks in self.tasks.items():
            for task in tasks:
                task.load_state_dict(state[name][task.name])


class StepScores:
    """Scores the prediction after each gradient step of a labelled frame.

    It has tasks of its own, so that those of the stream see each frame once.
    """

    def __init__(self, cfg: CfgNode, dataset_name: str) -> None:
        """``cfg`` is resolved."""
        self.tasks = build_tasks(dataset_name, cfg)

    def __call__(self, frame: Frame, output: Mapping[str, Any], record: dict[str, float]) -> Row:
        """Returns the step's scalars, and ``records`` and ``metrics`` of the frame's labels."""
        labelled = [task for task in self.tasks if task.labels(frame)]
        return {**finite(record), **score_frame(labelled, frame, output)}


def steps_of(tasks: Sequence[Task], records: Row, steps: Sequence[Row]) -> Row:
    """Returns ``records`` and ``steps`` of a row with what is kept of a frame's gradient steps.

    Args:
        tasks: of the stream.
        records: of the frame, by task.
        steps: of :class:`StepScores`.
    """
    kept = {
        task.name: task.with_steps(records[task.name], [s["records"][task.name] for s in steps])
        for task in tasks
        if task.name in records and all(task.name in s.get("records", {}) for s in steps)
    }
    rows = [{key: value for key, value in step.items() if key != "records"} for step in steps]
    return {"records": {**records, **kept}, "steps": rows}


class Rows(Sink):
    """Writes each row to the run's folder, once; there it survives the process."""

    behind = True

    def __init__(self, run: RunDirectory) -> None:
        """``run``: the folder."""
        self.run = run

    def start(self, video: VideoRun) -> None:
        """Notes the video."""
        self.video_id = video.video_id

    def write(self, results: Results) -> None:
        """Appends the row."""
        row = results.row
        if not self.run.has(row["video_id"], row["frame_index"]):
            self.run.append(row)

    def save(self) -> dict[str, Any]:
        """Returns which rows of the video are on disk."""
        ranges = torch.tensor(self.run.recorded(self.video_id).ranges()).view(-1, 2)
        return {"video_id": self.video_id, "rows": ranges}

    def load(self, state: dict[str, Any]) -> None:
        """Checks that those rows still are."""
        if not self.run.recorded(state["video_id"]).covers(state["rows"].tolist()):
            raise UnusableState(f"{self.run.frames_file} lacks rows that were there")

    def end(self, video: VideoRun) -> None:
        """Records how far the video came."""
        self.run.end_video(
            video.video_id,
            frames=video.done,
            total=video.source.num_frames,
            skipped=video.skipped,
            complete=video.complete,
        )


class Progress(Sink):
    """Shows a bar for each video."""

    behind = True

    def start(self, video: VideoRun) -> None:
        """Opens the bar; frames of an earlier run say nothing about the speed of this one."""
        total = video.source.num_frames
        self.bar = tqdm(total=total, initial=video.done, desc=video.video_id, unit="frame")

    def write(self, results: Results) -> None:
        """Moves the bar by a frame."""
        if results.row.get("loss_recon") is not None:
            self.bar.set_postfix(loss_recon=f"{results.row['loss_recon']:.4f}", refresh=False)
        self.bar.update()

    def end(self, video: VideoRun) -> None:
        """Closes the bar."""
        self.bar.close()
