"""What a frame source has if it says nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from ..errors import UserError
from ..structures import Frame, FrameSource


class BaseSource(ABC):
    """A video of your own: define ``video_id`` and ``__iter__``, and what else you know of it.

    See :class:`ttt_video.structures.FrameSource` for the members; ``tests/data/source_contract.py``
    checks what they promise.
    """

    video_id: str
    num_frames: int | None = None
    fps: float | None = None
    live: bool = False
    skipped: Sequence[str] = ()

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]:
        """Starts at the first frame, every time."""

    def frames_after(self, frame_index: int) -> Iterator[Frame]:
        """Returns the frames after this one; reads and drops those before.

        Those of a live source are gone: the ones to come are numbered on.

        Raises:
            UserError: there is no such frame.
        """
        return numbered_on(self, frame_index) if self.live else drop_until(self, frame_index)

    def fingerprint(self) -> list[list[Any]] | None:
        """Returns None: nothing is known of any files."""
        return None


def numbered_on(frames: Iterable[Frame], frame_index: int) -> Iterator[Frame]:
    """Yields frames, numbered from 0, with the numbers after this one."""
    for frame in frames:
        yield cast(Frame, {**frame, "frame_index": frame_index + 1 + frame["frame_index"]})


def drop_until(source: FrameSource, frame_index: int) -> Iterator[Frame]:
    """Returns the frames of a source that follow the one with this index; drops the others.

    Raises:
        UserError: there is no such frame.
    """
    frames = iter(source)
    if frame_index >= 0 and not any(frame["frame_index"] == frame_index for frame in frames):
        raise UserError(
            f"video {source.video_id} has no frame {frame_index} any more, after which the run "
            "would go on: restore it, or choose another --output"
        )
    return frames


@contextmanager
def closing_frames(frames: Iterator[Frame]) -> Iterator[None]:
    """Closes an iterator at the end of the block, if it can be closed.

    Otherwise an exception that somebody keeps, and with it the variables of the functions that it
    came through, would keep the thread that decodes ahead, or the connection to a camera.
    """
    try:
        yield
    finally:
        close = getattr(frames, "close", None)
        if close is not None:
            close()
