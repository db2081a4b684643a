"""A clock of the device's work that can be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Returns seconds when it is called, once the device has done all work so far.

    The work is that of the calling thread's CUDA stream; other threads have streams of their own.
    """

    def __init__(
        self, device: torch.device | str = "cpu", read: Callable[[], float] = time.perf_counter
    ) -> None:
        """``read`` gives the seconds."""
        self.device = torch.device(device)
        self._read = read
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
