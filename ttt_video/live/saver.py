"""Saves predictions of a stream from one moment on, to another."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from detectron2.config import CfgNode

from ..errors import UserError
from ..stream import Results, VideoRun
from ..stream.saving import SavedPredictions
from ..structures import FrameSource

logger = logging.getLogger(__name__)

FORMATS = ("masks", "color", "coco")
"""What is saved: the first that the model can give."""


class Saver:
    """Writes predictions of both models while it is on, each time to a folder of its own.

    Attributes:
        folder: where they go; None while it is off.
    """

    def __init__(
        self, cfg: CfgNode, outputs: frozenset[str], parent: Path, tell: Callable[[str], None]
    ) -> None:
        """
        Args:
            cfg: resolved.
            outputs: of the model.
            parent: of the folders, ``saved_1`` and so on; nothing in it is overwritten.
            tell: is given one line where a file cannot be written; saving is off then.
        """
        self.cfg, self.outputs, self.parent, self._tell = cfg, outputs, parent, tell
        self._sink: SavedPredictions | None = None
        self._video: VideoRun | None = None

    @property
    def folder(self) -> Path | None:
        """See the class."""
        return None if self._sink is None else self._sink.folder

    def turn_on(self, source: FrameSource | None) -> None:
        """Starts with the frame that comes next, of this video.

        Raises:
            UserError: the model predicts nothing that can be saved, or no folder can be made.
        """
        if self._sink is None:
            self._sink = self._first_possible()
            if source is not None:
                try:
                    self._start(source)
                except UserError:
                    self._sink = None
                    raise

    def turn_off(self) -> None:
        """Completes the files; nothing if it is off.

        Raises:
            UserError: one of them cannot be written.
        """
        sink, self._sink = self._sink, None
        video, self._video = self._video, None
        if sink is not None and video is not None:
            sink.end(video)
            shutil.rmtree(video.folder, ignore_errors=True)

    def start_video(self, source: FrameSource) -> None:
        """Begins another video."""
        if self._sink is not None:
            with self._told():
                self._start(source)

    def write(self, results: Results) -> None:
        """Writes a frame."""
        if self._sink is not None:
            with self._told():
                self._sink.write(results)

    def end_video(self) -> None:
        """Completes the files of the video that has ended."""
        video, self._video = self._video, None
        if self._sink is not None and video is not None:
            with self._told():
                self._sink.end(video)

    def end(self) -> None:
        """Does as :meth:`turn_off`; a mistake is told."""
        with self._told():
            self.turn_off()

    def _start(self, source: FrameSource) -> None:
        assert self._sink is not None
        video = VideoRun(source, self._sink.folder / "unfinished")
        self._sink.start(video)
        self._video = video

    def _first_possible(self) -> SavedPredictions:
        number = 1
        while (folder := self.parent / f"saved_{number}").exists():
            number += 1
        refused = ""
        for name in FORMATS:
            sink = SavedPredictions(self.cfg, folder, (name,), compare=True)
            try:
                sink.check(self.outputs)
            except UserError as error:
                refused = str(error)
            else:
                return sink
        raise UserError(refused)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns itself off, and tells why, where a file cannot be written; the stream goes on."""
        try:
            yield
        except UserError as error:
            with suppress(UserError):
                self.turn_off()
            self._tell(f"no more is saved: {error}")
            logger.warning("no more is saved: %s", error)
