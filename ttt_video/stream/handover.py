"""How the results of frames come to the sinks: in the loop, or in a thread behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from ..files import WriteBehind
from ..processes import whole
from .clock import Clock
from .sinks import Results, Sink, VideoRun

DEPTH = 2
"""Frames whose results may be unwritten while the model works on the next one.

One is enough for frames of equal length; the second one hides a slow file. The outputs of that many
frames stay in the device's memory: 35 MB each for 19 classes of 375x1242 pixels.
"""


class Handover:
    """Hands the results of each frame to the sinks in turn, before the next frame is taken up."""

    def __init__(self, sinks: Sequence[Sink], video: VideoRun, clock: Clock) -> None:
        """
        Args:
            sinks: take the results in this order.
            video: its frames are counted as their results come to the first sink.
            clock: of the stream; stands still for sinks that measure.
        """
        self.sinks, self.video, self.clock = sinks, video, clock

    def write(self, make: Callable[[], Results]) -> None:
        """Hands over the results of a frame, which ``make`` returns; raises what a sink raises."""
        results = make()
        with whole():  # a frame has all of its results, or none
            self.video.done += 1
            for sink in self.sinks:
                with self.clock.paused() if sink.measures else nullcontext():
                    sink.write(results)

    def flush(self) -> None:
        """Waits until all results are written; raises what went wrong with one."""

    def close(self) -> None:
        """Waits as :meth:`flush` does; nothing is written afterwards."""


class HandoverBehind(Handover):
    """Hands the results over in a thread of its own, in the same order, while the loop goes on.

    No frame waits for another one: its results are written as soon as the thread is free. What a
    sink raises comes out of the next call; the frames after it are not written. The loop's clock
    runs on, and shows only what the loop waits for.

    On a GPU the thread works on a CUDA stream of its own, so that what it asks the device for, such
    as the classes of pixels, does not wait for the work on later frames.
    """

    def __init__(self, sinks: Sequence[Sink], video: VideoRun, clock: Clock) -> None:
        """See the base class; the thread starts with the first results."""
        super().__init__(sinks, video, clock)
        cuda = clock.device.type == "cuda"
        self._stream = torch.cuda.Stream(clock.device) if cuda else None
        self._thread = WriteBehind("sinks", DEPTH)

    def write(self, make: Callable[[], Results]) -> None:
        """Queues the results of a frame; waits where :data:`DEPTH` frames are not yet written.

        ``make`` is called in the thread and waits for the device's work, which the loop does not.
        """
        self._thread.check()  # before more is computed that would not be written
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self.clock.device).record_event()
        self._thread.submit(partial(self._write, make, ready))

    def flush(self) -> None:
        """See the base class."""
        self._thread.flush()

    def close(self) -> None:
        """See the base class."""
        self._thread.close()

    def _write(self, make: Callable[[], Results], ready: torch.cuda.Event | None) -> None:
        results = make()
        self.video.done += 1
        if self._stream is None or ready is None:
            self._hand_round(results)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            try:
                self._hand_round(results)
            finally:
                # Else the loop could get the output's memory while a kernel still reads it.
                self._stream.synchronize()

    def _hand_round(self, results: Results) -> None:
        for sink in self.sinks:
            sink.write(results)
