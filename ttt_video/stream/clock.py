"""A clock that waits for the device's work, and that can be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Returns seconds when it is called, once the device has done all work so far."""

    def __init__(
        self, device: torch.device | str = "cpu", read: Callable[[], float] = time.perf_counter
    ) -> None:
        """``read`` gives the seconds."""
        self.device = torch.device(device)
        self._read = read
        self._paused = 0.0

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._read() - self._paused

    def time(self, call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        """Returns what a call returns, and the seconds that it took."""
        start = self()
        result = call(*arguments)
        return result, self() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock for the block: for what measures a stream and is no part of it."""
        start = self()
        try:
            yield
        finally:
            self._paused += self() - start
