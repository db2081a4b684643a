"""A video file that grows in parts, so that it survives a kill and is the same file after one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..structures import FrameSource
from ..visualization.video import MAX_FPS, MIN_FPS, VideoWriter, check_part, join_videos, plays

logger = logging.getLogger(__name__)

DEFAULT_FPS = 10.0  # of a video that tells no frame rate


class VideoParts:
    """Encodes the frames of one video. Parts are finished one after the other by :meth:`save` and
    joined at last without encoding again, so a video that was interrupted and went on at a cut is
    the same file as any other.
    """

    def __init__(
        self,
        path: Path,
        fps: float,
        folder: Path,
        name: str,
        *,
        done: int = 0,
        parts: Sequence[str] = (),
        unsaved: int = 0,
    ) -> None:
        """
        Args:
            path: the file, which :meth:`end` writes.
            fps: frames per second.
            folder: of the parts; made with the first one.
            name: what the parts' names begin with.
            done: frames that were written before.
            parts: what :meth:`save` returned, where an interrupted video goes on.
            unsaved: how many frames were written after that and do not come again: of the parts
                that a kill left of them, what plays is kept.

        Raises:
            UserError: one of the parts is missing or damaged.
        """
        self.path, self.fps, self.folder, self.name = path, fps, folder, name
        self.frames, self.parts = done, list(parts)
        for part in self.parts:
            _check(folder, part)
        self.parts += [self._name(i) for i in range(done - unsaved, done) if self._plays(i)]
        self._writer: VideoWriter | None = None

    def write(self, image: np.ndarray | Callable[[], np.ndarray]) -> None:
        """Adds a frame, (H, W, 3) uint8 RGB or what draws it in the encoder's thread."""
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = VideoWriter(self.folder / self._name(self.frames), self.fps, part=True)
        self._writer.write(image)
        self.frames += 1

    def _name(self, first: int) -> str:
        """Returns the name of the part that begins with this frame."""
        return f"{self.name}-{first:08d}.mp4"

    def _plays(self, first: int) -> bool:
        part = self.folder / self._name(first)
        return part.exists() and plays(part)

    def save(self) -> list[str]:
        """Finishes the current part; returns the names of all."""
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()
            self.parts.append(writer.path.name)
        return list(self.parts)

    def end(self) -> None:
        """Writes the video file of what there is."""
        if self.save():
            join_videos([self.folder / name for name in self.parts], self.path, self.fps)


def _check(folder: Path, part: str) -> None:
    try:
        check_part(folder / part)
    except UserError as error:
        raise UserError(
            f"{error}: put it back, or remove {folder} to start the video anew"
        ) from error


def video_fps(asked: float | None, source: FrameSource) -> float:
    """Returns the frames per second: as asked, else the video's where an MP4 can have them."""
    if asked is not None:
        return asked
    own = source.fps or DEFAULT_FPS
    if MIN_FPS <= own <= MAX_FPS:
        return own
    logger.warning(
        "video %s has %g frames per second, which no MP4 can have: %g instead (--fps)",
        source.video_id,
        own,
        DEFAULT_FPS,
    )
    return DEFAULT_FPS
