"""How processes end: signals as exceptions, children that do not outlive their parent, pipes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

_PARENT = "TTT_VIDEO_PARENT"
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
_GRACE = 60.0  # seconds for the end of a run, in which further signals do not count


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end: it stops as after Ctrl-C, and keeps what there is."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raises :class:`Interrupted` in the main thread for Ctrl-C, SIGTERM and SIGHUP.

    Further ones do not count for a minute, as the end of a run takes a moment; Ctrl-C always does.
    A signal that is ignored stays so (``nohup``), and forked children have what was there before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)
    }
    seen = float("-inf")

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if os.getpid() != owner:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        now = time.monotonic()
        if now < seen + _GRACE and number != signal.SIGINT:
            return
        seen = now
        raise Interrupted(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(parent: int) -> None:
    """Has the kernel kill this process once its parent has ended, however that ended.

    Args:
        parent: number of the process that started this one. If that is gone already, this one ends.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """Does :func:`end_with` in a process that :class:`Children` started."""
    parent = os.environ.pop(_PARENT, "")
    if parent.isdecimal():
        end_with(int(parent))


def kill_helpers() -> None:
    """Kills the processes that ``multiprocessing`` started here; it would wait for their end."""
    for process in multiprocessing.active_children():
        process.kill()


class Children:
    """Tools that run as processes of their own, from several threads, until :meth:`stop`."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], output: IO[str], variables: Mapping[str, str]) -> int:
        """Runs a command to its end and returns its exit code.

        Args:
            command: one that calls :func:`ttt_video.cli.run_tool`, so that it ends with this
                process.
            output: takes what it prints.
            variables: set besides those of this process.
        """
        environment = {**os.environ, **variables, _PARENT: str(os.getpid())}
        with self._lock:
            if self._stopped:
                return 128 + signal.SIGTERM
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment
            )
            self._running.add(process)
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    def stop(self) -> None:
        """Asks all that run to end, and starts no others."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def open_closed_streams() -> None:
    """Gives this process standard streams if it was started without (``2>&-``).

    Otherwise the next file that is opened is taken for one, and gets what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as it runs


def drop_broken_streams() -> bool:
    """Flushes what was printed; returns whether a reader is gone (``| head``).

    What is printed for it from here on goes nowhere, so that Python does not complain at its end.
    """
    broken = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            broken = True
            null = os.open(os.devnull, os.O_WRONLY)
            with suppress(OSError, ValueError):  # no file of the system
                os.dup2(null, stream.fileno())
            os.close(null)
    return broken
