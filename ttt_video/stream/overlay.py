"""Predictions over their frames as a video, which grows in parts that survive a kill."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import UserError
from ..files import file_stem
from ..tasks import overlay_painter
from ..visualization.overlay import side_by_side, to_rgb
from ..visualization.video import VideoWriter, check_fps, check_part, join_videos
from .sinks import Results, Sink, VideoRun

Panels = dict[str, np.ndarray]
"""(height, width, 3) uint8 RGB pictures by their titles."""


class OverlayVideos(Sink):
    """Writes a video file for each video: the frame, the frozen model if there, the adapted one.

    Parts are finished one after the other by :meth:`save` and joined at last without encoding
    again, so a video that was interrupted and went on at a cut is the same file as any other.
    """

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
        self.parts: list[str] = []
        self._writer: VideoWriter | None = None

    def load(self, state: dict[str, Any]) -> None:
        """Goes on after the parts that are finished."""
        self.parts = list(state["parts"])

    def start(self, video: VideoRun) -> None:
        """Begins a video, or goes on with it.

        Raises:
            UserError: one of its parts is missing or damaged.
        """
        self.parts = self.parts if video.done else []
        for part in self.parts:
            _check_part(video.folder, part)
        name = "overlay.mp4" if self.single else f"overlay-{file_stem(video.video_id)}.mp4"
        self.path = self.folder / name
        self.parts_folder = video.folder
        self.frames = video.done

    def write(self, results: Results) -> None:
        """Adds one frame, which is drawn in the encoder's thread."""
        if self._writer is None:
            self.parts_folder.mkdir(parents=True, exist_ok=True)
            name = f"overlay-{self.frames:08d}.mp4"
            self._writer = VideoWriter(self.parts_folder / name, self.fps, part=True)
        self._writer.write(partial(_draw, self._painter(results)))
        self.frames += 1

    def save(self) -> dict[str, Any]:
        """Finishes the current part; returns the names of all."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            self.parts.append(writer.path.name)
        return {"parts": list(self.parts)}

    def end(self, video: VideoRun) -> None:
        """Writes the video file of what there is."""
        if self.save()["parts"]:
            join_videos([self.parts_folder / name for name in self.parts], self.path, self.fps)

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


def _check_part(folder: Path, part: str) -> None:
    try:
        check_part(folder / part)
    except UserError as error:
        raise UserError(
            f"{error}: put it back, or remove {folder} to start the video anew"
        ) from error


def _paint(
    picture: Callable[[], np.ndarray], painters: dict[str, Callable[[np.ndarray], np.ndarray]]
) -> Panels:
    image = picture()
    return {"original": image, **{title: paint(image) for title, paint in painters.items()}}


def _draw(paint: Callable[[], Panels]) -> np.ndarray:
    panels = paint()
    return side_by_side(list(panels.values()), list(panels))
