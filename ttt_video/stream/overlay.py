"""Predictions over their frames as a video, which grows in parts that survive a kill."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch import Tensor

from ..files import file_stem
from ..structures import Frame
from ..tasks import Painter, drawn_task, overlay_painter
from ..tasks.labels import class_metadata
from ..visualization.legend import LegendEntry
from ..visualization.overlay import side_by_side, split_picture, to_rgb
from ..visualization.video import check_fps
from .sinks import Results, Sink, VideoRun
from .video_parts import VideoParts, video_fps

Panels = dict[str, np.ndarray]
"""(height, width, 3) uint8 RGB pictures by their titles."""

Pictures = dict[str, Callable[[], np.ndarray]]
"""Functions that give such pictures, by their titles: the frame's first, then its labels'."""

SIDES = (480, 3840)
"""Pixels: narrower pictures are enlarged, so that their words can be read; and decoders have limits
for the sides of a whole video."""

SWEEP = 80
"""Frames in which the bar moves to and fro once."""


class OverlayVideos(Sink):
    """Writes a video file for each video: the frame, the frozen model if there, the adapted one.

    Labels that are pictures (original colours) come last. Titles, the frame's number and time stand
    above, the classes below. What is drawn depends on the frame and its results alone.
    """

    behind = True

    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        *,
        fps: float | None = None,
        single: bool,
        dataset_name: str = "",
        split: bool = False,
    ) -> None:
        """
        Args:
            cfg: gives the channel order.
            folder: of the video files.
            fps: frames per second; None takes each video's own, or 10 where it tells none.
            single: there is one video; its file is ``overlay.mp4``, not ``overlay-VIDEO.mp4``.
            dataset_name: of the videos; "" for others. Colours and names are those of
                :func:`class_metadata`, as in ``--save``.
            split: show both models in one picture, with a bar between them that moves to and fro;
                frames without a frozen prediction are shown as without it.
        """
        if fps is not None:
            check_fps(fps)
        self.format = cfg.INPUT.FORMAT
        self.method = cfg.TTT.METHOD
        self.metadata = class_metadata(cfg, dataset_name)
        self.folder = folder
        self.asked_fps = fps
        self.single = single
        self.split = split
        given = {"--view": "split" if split else None, "--fps": fps}
        self.flags = {flag: value for flag, value in given.items() if value is not None}
        self._parts: list[str] = []

    def load(self, state: dict[str, Any]) -> None:
        """Goes on after the parts that are finished."""
        self._parts = list(state["parts"])

    def start(self, video: VideoRun) -> None:
        """Begins a video, or goes on with it.

        Raises:
            UserError: one of its parts is missing or damaged.
        """
        fps = video_fps(self.asked_fps, video.source)
        self.seconds = 1 / known if (known := video.source.fps or self.asked_fps) else None
        name = "overlay.mp4" if self.single else f"overlay-{file_stem(video.video_id)}.mp4"
        parts = self._parts if video.done else []
        counts = {"done": video.done, "unsaved": video.unsaved}
        self.video = VideoParts(
            self.folder / name, fps, video.folder, "overlay", parts=parts, **counts
        )

    def write(self, results: Results) -> None:
        """Adds one frame, which is drawn in the encoder's thread."""
        draw = partial(_draw, *self.pictures(results), self._note(results), self._bar(results))
        self.video.write(draw)

    def save(self) -> dict[str, Any]:
        """Finishes the current part; returns the names of all."""
        return {"parts": self.video.save()}

    def end(self, video: VideoRun) -> None:
        """Writes the video file of what there is."""
        self.video.end()

    def panels(self, results: Results) -> Panels:
        """Returns titled (height, width, 3) uint8 pictures of one frame."""
        return _panels(*self.pictures(results), self._bar(results))[0]

    def _bar(self, results: Results) -> float | None:
        """Returns where the bar is, as a share of the width; None where there is none."""
        if not self.split or results.frozen is None:
            return None
        return 0.5 - 0.45 * math.cos(2 * math.pi * results.adapted.frame["frame_index"] / SWEEP)

    def _note(self, results: Results) -> str:
        """Returns the number of a frame and, where it is known, its time."""
        frame = results.adapted.frame
        index = frame["frame_index"]
        # Where pictures are dropped, the video's rate does not say when the others came.
        untimed = self.seconds is None or "dropped" in frame
        return f"frame {index}" if untimed else f"frame {index}   {index * self.seconds:.2f} s"

    def pictures(self, results: Results) -> tuple[Pictures, dict[str, Painter]]:
        """Returns the functions that draw a frame's panels, also in another thread."""
        frame = results.adapted.frame
        models = {"frozen": results.frozen, self.method: results.adapted}
        painters = {
            title: overlay_painter(shown.output, self.metadata)
            for title, shown in models.items()
            if shown is not None
        }
        task = drawn_task(results.adapted.output)
        shown = {task.input_title: self._input(frame), **task.label_pictures(frame)}
        return shown, painters

    def _input(self, frame: Frame) -> Callable[[], np.ndarray]:
        """Returns what makes the frame's picture, at its own size where that is known."""
        if "grey" in frame:
            return partial(_of_grey, frame["grey"])
        if "picture" in frame:
            return partial(np.ascontiguousarray, frame["picture"])
        return partial(to_rgb, frame["image"], self.format, (frame["height"], frame["width"]))


def _of_grey(grey: Tensor) -> np.ndarray:
    return np.repeat(grey[0].cpu().numpy()[:, :, None], 3, axis=2)


def _panels(
    shown: Pictures, painters: dict[str, Painter], bar: float | None
) -> tuple[Panels, dict[str, Painter]]:
    """Draws the frame, the predictions over it, and the labels; says who drew which panel."""
    (title, picture), *labels = shown.items()
    image = picture()
    panels = {title: image, **{name: paint(image) for name, paint in painters.items()}}
    if bar is not None:
        left, right = painters
        both = f"{left} | {right}"
        panels = {both: split_picture(panels[left], panels[right], bar)}
        painters = {both: painters[right]}
    return panels | {name: picture() for name, picture in labels}, painters


def _draw(
    shown: Pictures, painters: dict[str, Painter], note: str, bar: float | None
) -> np.ndarray:
    panels, painters = _panels(shown, painters, bar)
    legends = [_legend_of(painters.get(title)) for title in panels]
    pictures = list(panels.values())
    return side_by_side(pictures, list(panels), legends=legends, note=note, sides=SIDES)


def _legend_of(painter: Painter | None) -> tuple[LegendEntry, ...]:
    """Returns the legend of a painter that has one; a task of another file may have a function."""
    entries: tuple[LegendEntry, ...] = getattr(painter, "legend", tuple)()
    return entries
