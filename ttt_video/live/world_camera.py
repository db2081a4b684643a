"""The street world as a camera, so that there is something to look at without one."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator

import numpy as np

from ..data.decoded_source import DecodedSource, Record
from ..formats.images import BadFrame, FrameTransform
from ..world.shifts import Shift, ShiftedVideo
from ..world.video import FRAMES_PER_SECOND, WorldVideo

SEED = 1000
"""A world for validation; the test worlds stay unseen."""

SHIFT = Shift(("none", "colour_shift", "fog", "darkness"), 3.0, "switch")
"""Weather that turns, of the families for validation."""

FRAMES = 30 * FRAMES_PER_SECOND * len(SHIFT.corruptions)


class WorldCamera(DecodedSource):
    """A drive along a drawn street as a camera gives it: the newest picture, ten a second.

    Pictures that would have come while the consumer was busy are dropped, and ``frame_index``
    counts them. After two minutes the drive begins anew, within the same video.
    """

    live = True

    def __init__(
        self,
        transform: FrameTransform,
        *,
        seed: int = SEED,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            transform: converts pixels to the network's input.
            seed: of the world.
            clock: gives seconds.
            sleep: waits for so many seconds.
        """
        super().__init__(f"world_{seed}", None, transform, prefetch=0)
        self.fps = float(FRAMES_PER_SECOND)
        self._drive = ShiftedVideo(WorldVideo(seed, FRAMES), SHIFT)
        self._clock, self._sleep = clock, sleep

    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        start, last = self._clock() - (after + 1) / FRAMES_PER_SECOND, after
        while True:
            index = int((self._clock() - start) * FRAMES_PER_SECOND)
            if index <= last:
                index = last + 1
                self._sleep(max(0.0, start + index / FRAMES_PER_SECOND - self._clock()))
            record = {
                "file_name": f"{self.video_id}#{index}",
                "frame_index": index,
                "dropped": index - last - 1,
            }
            last = index
            yield record, self._drive[index % FRAMES].image
