"""The clock of a stream: that of the device's work, which can be stopped, or a simulated one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from .stage_times import StageTimes


class Clock:
    """Returns seconds when it is called, once the device has done all work so far.

    The work is that of the calling thread's CUDA stream; other threads have streams of their own.
    :class:`SimulatedClock` has the same interface, and its seconds come from a recorded profile.

    Attributes:
        repeats: whether another run reads the same seconds.
    """

    repeats: ClassVar[bool] = False

    def __init__(
        self,
        device: torch.device | str = "cpu",
        read: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``read`` gives the seconds, and ``sleep`` lets some pass."""
        self.device = torch.device(device)
        self._read, self._sleep = read, sleep
        self._paused = 0.0

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return self._read() - self._paused

    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        """Returns what a call returns, and the seconds that it took."""
        start = self()
        result = call(*arguments)
        return result, self() - start

    def follow(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, Callable[[], float]]:
        """Returns what a call returns, and a function that gives the seconds it took.

        The function waits for the device's work, and this method does not: of calls that follow one
        another only the last one's seconds cost a wait. They are then those from the device's end
        of the work before to its end of this call's.
        """
        if self.device.type != "cuda":
            result, seconds = self.time(call, *arguments)
            return result, lambda: seconds
        start, paused = self._mark(), self._paused
        result = call(*arguments)
        stop, paused = self._mark(), self._paused - paused

        def seconds_between() -> float:
            stop.synchronize()
            return start.elapsed_time(stop) / 1000 - paused

        return result, seconds_between

    def restart(self) -> None:
        """Is told that a video starts."""

    def spend(self, stage: str, frame: Mapping[str, Any], samples: int = 0) -> None:
        """Is told that a stage's work on a frame was done; this clock has seen it pass.

        Args:
            stage: one of :data:`.stage_times.STAGES`.
            frame: what was worked on.
            samples: of each step, for an update.
        """

    def wait_until(self, seconds: float) -> None:
        """Waits for what the clock shows to be ``seconds``, if that is to come."""
        self._sleep(max(seconds - self(), 0.0))

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for the block: for what measures a stream and is no part of it."""
        start = self()
        try:
            yield
        finally:
            self._paused += self() - start


class SimulatedClock(Clock):
    """Shows the seconds that work would have taken on the machine of a profile.

    They pass where :meth:`spend` and :meth:`wait_until` say so and nowhere else, so that they
    depend on the profile, the seed, the video and its frames alone, and on no other run.
    """

    repeats = True

    def __init__(self, times: StageTimes, seed: int) -> None:
        """``times`` are those of the method and model; ``seed`` decides which of them are drawn."""
        super().__init__("cpu", lambda: self._seconds, self._pass)
        self.times, self.seed = times, seed
        self._seconds = 0.0

    def _pass(self, seconds: float) -> None:
        self._seconds += seconds

    def restart(self) -> None:
        """Starts at 0, so that no video's seconds are rounded by what came before it."""
        self._seconds = self._paused = 0.0

    def spend(self, stage: str, frame: Mapping[str, Any], samples: int = 0) -> None:
        """Lets the seconds pass that a stage takes; see :class:`Clock`."""
        self._pass(self.times.draw(stage, frame, samples, self.seed))

    def state_dict(self) -> dict[str, float]:
        """Returns what it shows."""
        return {"seconds": self._seconds, "paused": self._paused}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Shows what it showed when ``state`` was taken."""
        self._seconds, self._paused = state["seconds"], state["paused"]
