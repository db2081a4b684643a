"""This module has what processes do with memory and signals, and how they and children end."""

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
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

_PARENT = "TTT_VIDEO_PARENT"
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # from <malloc.h>
_MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_")
_GRACE = 60.0  # seconds that the end of a run may take; signals other than Ctrl-C are ignored then


class Interrupted(KeyboardInterrupt):
    """A signal that asks this process to end, which is handled like Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@dataclass
class _Step:
    """Says whether the main thread is in :func:`whole`, and which signal waits for its end."""

    entered: bool = False
    waiting: Interrupted | None = None


_step = _Step()
_replaced: list[dict[int, Any]] = []
"""Handlers by signal that :func:`signals_interrupt` has replaced, in the order of its calls."""


def _restore_handlers() -> None:
    """Gives a forked child the handlers from before, at once.

    A handler of Python's own runs when the interpreter comes to it. A child that waits for a lock
    never does, and a pool that ends its children waits for ever.
    """
    _step.entered, _step.waiting = False, None
    while _replaced:
        for number, handler in _replaced.pop().items():
            signal.signal(number, handler)


os.register_at_fork(after_in_child=_restore_handlers)


@contextmanager
def whole() -> Iterator[None]:
    """Has the first signal of :func:`signals_interrupt` wait until the block has ended.

    A second Ctrl-C does not wait, and an error of the block is raised in place of the signal. In
    threads other than the main one, which get no signals, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread() or _step.entered:
        yield
        return
    _step.waiting = None
    try:
        _step.entered = True
        yield
    finally:
        _step.entered = False  # first: a signal that comes now is raised where it comes
        waiting, _step.waiting = _step.waiting, None
    if waiting is not None:
        raise waiting


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raises :class:`Interrupted` in the main thread for Ctrl-C, SIGTERM and SIGHUP.

    After the first one SIGTERM and SIGHUP are ignored for a minute, so that the run can finish its
    files; :func:`whole` lets a step of it end first. Signals that were ignored before stay ignored
    (``nohup``), and forked children get the handlers from before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)
    }
    seen = float("-inf")

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        now = time.monotonic()
        again = now < seen + _GRACE
        if again and number != signal.SIGINT:
            return
        seen = now
        if _step.entered and _step.waiting is None and not again:
            _step.waiting = Interrupted(number)
            return
        raise Interrupted(number)

    for number in before:
        signal.signal(number, handle)
    _replaced.append(before)
    try:
        yield
    finally:
        if before in _replaced:  # not in a forked child
            _replaced.remove(before)
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with(parent: int) -> None:
    """Makes the kernel kill this process when process ``parent``, which started it, has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """Calls :func:`end_with` in a process that :class:`Children` started."""
    parent = os.environ.pop(_PARENT, "")
    if parent.isdecimal():
        end_with(int(parent))


def kill_helpers() -> None:
    """Kills the processes that ``multiprocessing`` started; Python would wait for them at exit."""
    for process in multiprocessing.active_children():
        process.kill()


class Children:
    """Runs tools as processes, from several threads, until :meth:`stop`."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: Sequence[str], output: IO[str], variables: Mapping[str, str]) -> int:
        """Runs a command to its end and returns its exit code.

        Args:
            command: calls :func:`ttt_video.cli.run_tool`, so that it ends with this process.
            output: the file for what it prints.
            variables: environment variables in addition to this process' own.
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
        """Asks all running processes to end, and starts no more."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def keep_freed_memory() -> bool:
    """Has glibc keep the memory that a frame frees, for the next one; returns whether it does.

    By default it gives hundreds of megabytes back at every frame, and the kernel fills as many with
    zeros for the next (docs/PERFORMANCE.md). The most that is held at once stays the same. Settings
    of the environment are left alone; other C libraries do as they do.
    """
    given = any(name in os.environ for name in _MALLOC_VARIABLES)
    if given or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # A larger block is mapped, and so given back. Before version 2.35 the most is 32 MiB.
    mapped = any(mallopt(_M_MMAP_THRESHOLD, size) for size in (1 << 30, 1 << 25))
    return mapped and all(
        mallopt(setting, size)
        for setting, size in ((_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 1 << 26))
    )


def open_closed_streams() -> None:
    """Opens the standard streams that this process was started without (``2>&-``).

    Otherwise the next file that is opened would take their place and get what is printed.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as it runs


def drop_broken_streams() -> bool:
    """Flushes the standard streams; returns whether a reader is gone (``| head``).

    Later output for that reader is dropped, so that Python does not complain at exit.
    """
    broken = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            broken = True
            null = os.open(os.devnull, os.O_WRONLY)
            with suppress(OSError, ValueError):  # a stream without a file descriptor
                os.dup2(null, stream.fileno())
            os.close(null)
    return broken
