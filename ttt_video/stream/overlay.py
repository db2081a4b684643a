"""Predictions over their frames as a video, which grows in parts that survive a kill."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..files import file_stem
from ..tasks import overlay_painter
from ..visualization.overlay import side_by_side, to_rgb
from ..visualization.video import check_fps
from .sinks import Results, Sink, VideoRun
from .video_parts import VideoParts

Panels = dict[str, np.ndarray]
"""(height, width, 3) uint8 RGB pictures by their titles."""


class OverlayVideos(Sink):
    """Writes a video file for each video: the frame, the frozen model if there, the adapted one."""

    def __init__(
        self, cfg: CfgNode, folder: Path, *, fps: float, single: bool, dataset_name: str = ""
    ) -> None:
        """
        Args:
            cfg: gives the channel order.
            folder: of the video files.
            fps: frames per second.
            single: there is one video; its file is ``overlay.mp4``, not ``overlay-VIDEO.mp4``.
            dataset_name: of the videos, whose metadata has the colours; where there is none, the
                first test set of the config has them.
        """
        check_fps(fps)
        self.format = cfg.INPUT.FORMAT
        self.method = cfg.TTT.METHOD
        named = dataset_name or next(iter(cfg.DATASETS.TEST), None)
        self.metadata = MetadataCatalog.get(named) if named else None
        self.folder = folder
        self.fps = fps
        self.single = single
        self._parts: list[str] = []

    def load(self, state: dict[str, Any]) -> None:
        """Goes on after the parts that are finished."""
        self._parts = list(state["parts"])

    def start(self, video: VideoRun) -> None:
        """Begins a video, or goes on with it.

        Raises:
            UserError: one of its parts is missing or damaged.
        """
        name = "overlay.mp4" if self.single else f"overlay-{file_stem(video.video_id)}.mp4"
        parts = self._parts if video.done else []
        self.video = VideoParts(
            self.folder / name, self.fps, video.folder, "overlay", done=video.done, parts=parts
        )

    def write(self, results: Results) -> None:
        """Adds one frame, which is drawn in the encoder's thread."""
        self.video.write(partial(_draw, self._painter(results)))

    def save(self) -> dict[str, Any]:
        """Finishes the current part; returns the names of all."""
        return {"parts": self.video.save()}

    def end(self, video: VideoRun) -> None:
        """Writes the video file of what there is."""
        self.video.end()

    def panels(self, results: Results) -> Panels:
        """Returns titled (height, width, 3) uint8 pictures of one frame."""
        return self._painter(results)()

    def _painter(self, results: Results) -> Callable[[], Panels]:
        """:meth:`panels` but for the drawing: a function that does it, also in another thread."""
        frame = results.adapted.frame
        painters = {"frozen": results.frozen, self.method: results.adapted}
        return partial(
            _paint,
            partial(to_rgb, frame["image"], self.format, (frame["height"], frame["width"])),
            {
                title: overlay_painter(shown.output, self.metadata)
                for title, shown in painters.items()
                if shown is not None
            },
        )


def _paint(
    picture: Callable[[], np.ndarray], painters: dict[str, Callable[[np.ndarray], np.ndarray]]
) -> Panels:
    image = picture()
    return {"original": image, **{title: paint(image) for title, paint in painters.items()}}


def _draw(paint: Callable[[], Panels]) -> np.ndarray:
    panels = paint()
    return side_by_side(list(panels.values()), list(panels))
