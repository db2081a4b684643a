"""A named pipe that FFmpeg reads through us, so that waiting for it can be told and be ended."""

from __future__ import annotations

import logging
import os
import select
import threading
import time

from ..errors import UserError

logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds without data after which a source says that it waits, and again after as many."""

_GLANCE = 0.1  # seconds from one look at the stop sign to the next


class Pipe:
    """What ``av.open`` takes for a file that it can read, but not seek in.

    FFmpeg itself would block in a system call, silently and beyond Ctrl-C.
    """

    def __init__(self, path: str) -> None:
        """Opens the pipe without waiting for its writer."""
        self.name = path
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise UserError(f"{path} cannot be opened: {error.strerror}") from error

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes, once there are any; none at the end, or after :meth:`stop`."""
        try:
            return self._read(size)
        except BaseException as error:  # noqa: BLE001 - PyAV would drop it, Ctrl-C too
            self._error = error
            self.stop()
            return b""

    def raise_error(self) -> None:
        """Raises what ended :meth:`read`, if anything did."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _read(self, size: int) -> bytes:
        told = time.monotonic()
        while not self._stopped.is_set():
            # Before the first writer came a pipe is not ready, and after the last one it is.
            if select.select([self._descriptor], [], [], _GLANCE)[0]:
                try:
                    return os.read(self._descriptor, size)
                except BlockingIOError:
                    continue
            if time.monotonic() - told >= PATIENCE:
                told = time.monotonic()
                logger.warning("%s: still waiting for data", self.name)
        return b""

    def stop(self) -> None:
        """Ends the file for whoever reads it, also in another thread."""
        self._stopped.set()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
