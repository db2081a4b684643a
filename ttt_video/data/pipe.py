"""Reads a named pipe for FFmpeg, so that waiting for data is reported and can be ended."""

from __future__ import annotations

import logging
import os
import select
import threading
import time

from ..errors import UserError

logger = logging.getLogger(__name__)

PATIENCE = 10.0
"""Seconds without data after which a source says that it waits, each time."""

_GLANCE = 0.1  # seconds between checks whether to stop


class Pipe:
    """A file object for ``av.open`` that can be read, but not sought in.

    FFmpeg itself would block in a system call, silently and deaf to Ctrl-C.
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
        """Waits for data and returns up to ``size`` bytes; none at the end or after `stop`."""
        try:
            return self._read(size)
        except BaseException as error:  # noqa: BLE001 - PyAV would drop it, even Ctrl-C
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
            # A pipe becomes ready with its first writer, and stays ready after its last one.
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
        """Ends the file for its readers, also in other threads."""
        self._stopped.set()

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
