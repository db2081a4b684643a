"""The base of all frame sources: one size per video, bad frames, decoding ahead in a thread."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Literal, TypedDict, TypeVar, cast

import numpy as np

from ..errors import UserError
from ..files import path_text
from ..formats.images import BadFrame, FrameTransform
from ..structures import Frame
from .base import BaseSource
from .fingerprint import Fingerprint

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]
Item = TypeVar("Item")


class Reading(TypedDict, total=False):
    """Keyword arguments of sources that read files.

    on_bad_frame: "stop" (default) raises `BadFrame` at an unreadable frame, "skip" leaves it out.
    prefetch: frames to decode ahead in a background thread, by default 2; 0 decodes on demand.
    """

    on_bad_frame: Literal["stop", "skip"]
    prefetch: int


def run_ahead(
    items: Generator[Item, None, None], depth: int, stop: Callable[[], None] = lambda: None
) -> Generator[Item, None, None]:
    """Runs a generator in a background thread, at most ``depth`` items ahead of the consumer.

    An exception is raised in the place of its item. The thread ends when this generator is
    exhausted, raises, is closed, or is garbage. ``stop`` is called before the thread is joined, to
    end a wait in ``items``.
    """
    end = object()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="frames")
    try:
        pending: deque[Future[Any]] = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := pending.popleft().result()) is not end:
            pending.append(pool.submit(next, items, end))
            yield item
    finally:
        stop()
        pool.shutdown(wait=True, cancel_futures=True)
        items.close()


class DecodedSource(BaseSource):
    """Base of all sources; a subclass decodes.

    Attributes:
        skipped: files of the frames that the current or last iteration has skipped so far.
    """

    def __init__(
        self,
        video_id: str,
        num_frames: int | None,
        transform: FrameTransform,
        on_bad_frame: str = "stop",
        prefetch: int = 2,
    ) -> None:
        if on_bad_frame not in ("stop", "skip"):
            raise UserError(f'on_bad_frame must be "stop" or "skip", not "{on_bad_frame}"')
        if prefetch < 0:
            raise ValueError(f"prefetch must be 0 or more frames, not {prefetch}")
        self.video_id = path_text(video_id)  # it becomes part of file names and pages
        self.num_frames = num_frames
        self.transform = transform
        self.on_bad_frame = on_bad_frame
        self.prefetch = prefetch
        self.skipped: list[str] = []

    @abstractmethod
    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        """Yields record and (H, W, 3) uint8 RGB pixels, or an error, of frames after ``after``."""

    def fingerprint(self) -> Fingerprint | None:
        """Returns the fingerprint of the video's files; None for a camera, which has none."""
        return None

    def __iter__(self) -> Iterator[Frame]:
        return self.frames_after(-1)

    def frames_after(self, frame_index: int) -> Iterator[Frame]:
        """The frames beyond this index; those before are not decoded where the format allows it."""
        self.skipped = []
        return self._hand_over(self.skipped, frame_index)

    def _stop_waiting(self) -> None:
        """Ends a read that waits for data, before the background thread is joined."""

    def _hand_over(self, skipped: list[str], after: int) -> Generator[Frame, None, None]:
        items = self._frames(after)
        if self.prefetch:
            items = run_ahead(items, self.prefetch, self._stop_waiting)
        with closing(items):
            for passed, frame in items:
                skipped += passed
                if frame is not None:
                    yield frame

    def _frames(self, after: int) -> Generator[tuple[list[str], Frame | None], None, None]:
        """Yields each frame with the files skipped before it; the last item may have no frame."""
        first: tuple[str, int, int] | None = None
        passed: list[str] = []
        num_skipped = 0
        with closing(self._decode(after)) as decoded:
            for record, pixels in decoded:
                name = path_text(record["file_name"])
                if isinstance(pixels, BadFrame):
                    if self.on_bad_frame == "stop":
                        raise BadFrame(
                            f"{pixels}: replace it, or go on without it with "
                            'on_bad_frame="skip" (--on-bad-frame skip)'
                        ) from pixels
                    passed.append(name)
                    num_skipped += 1
                    logger.warning(
                        "skipped: %s (%d so far in video %s)", pixels, num_skipped, self.video_id
                    )
                    continue
                height, width = pixels.shape[:2]
                labelled = (record.get("height", height), record.get("width", width))
                if labelled != (height, width):
                    raise UserError(
                        f"frame {name} is {height}x{width} (height x width), but its data set "
                        f"says {labelled[0]}x{labelled[1]}: register it with its true size"
                    )
                pixels = self.transform.view(pixels)
                height, width = pixels.shape[:2]
                first = first or (name, height, width)
                if (height, width) != first[1:]:
                    raise UserError(
                        f"frame {name} is {height}x{width} (height x width), but video "
                        f"{self.video_id} began with {first[1]}x{first[2]} ({first[0]}): "
                        "frames of one video must have one size"
                    )
                frame = {
                    **record,
                    "file_name": name,
                    "image": self.transform(pixels),
                    "picture": pixels,
                    "height": height,
                    "width": width,
                    "video_id": self.video_id,
                }
                yield passed, cast(Frame, frame)
                passed = []
        if passed:
            yield passed, None
        if first is None and after < 0:
            self._end_without_frames(
                f"all {num_skipped} were skipped" if num_skipped else "it is empty"
            )

    def _end_without_frames(self, why: str) -> None:
        """Refuses a video that gave no frame at all.

        Raises:
            UserError: always, but a subclass may know better.
        """
        raise UserError(f"video {self.video_id} has no readable frame: {why}")
