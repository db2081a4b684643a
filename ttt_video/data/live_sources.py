"""Frames of cameras and network streams, as they come, until they are stopped."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..formats.images import BadFrame, FrameTransform
from ..structures import FrameSource
from .captures import Camera, Capture, NetworkStream, public_name
from .decoded_source import DecodedSource, Record
from .pipe import PATIENCE

logger = logging.getLogger(__name__)

PAUSES = (1.0, 30.0)
"""Seconds from a break to the next try: at first, and at most; each pause is twice the last."""

WAITING = 4
"""Pictures that wait for a busy model, at most."""

RATES = (1.0, 240.0)
"""Frames per second that are believed; some streams tell their clock's rate, such as 90000."""

_GLANCE = 0.1  # seconds between looks whether to stop

Waiting = tuple[int, Callable[[], np.ndarray]]
"""Number of a picture, and what gives its (H, W, 3) uint8 RGB pixels."""


class LiveSource(DecodedSource):
    """A camera or a network stream: pictures as they come, until the consumer stops.

    When it breaks off, it is opened again after a pause that grows. A recording that is sent over
    the network, of a known duration, ends as a file does.

    ``frame_index`` counts the pictures that came, also those that were dropped. ``frames_after``
    gives those to come, and goes on counting.

    Attributes:
        fps: frame rate in 1/s; None if it does not tell one that a camera can have, and with
            ``latest``, because what is left after dropping has no rate.
    """

    live = True

    def __init__(
        self,
        address: int | str,
        transform: FrameTransform,
        *,
        latest: bool = False,
        seconds: float | None = None,
    ) -> None:
        """Opens it, because what cannot be opened at first is likely to be misspelt.

        Args:
            address: a camera's number, also as a string, or its file under /dev, or a URL.
            transform: converts decoded pixels to the network's input.
            latest: give the newest picture and drop those that came before it while the consumer
                was busy; their number is the frame's ``dropped``. Otherwise the sender waits, or
                drops by its own rule.
            seconds: end after this time; None: never.

        Raises:
            UserError: it cannot be opened, has no video in it, or is no address.
        """
        self.address = _address(address)
        self.latest = latest
        self.seconds = seconds
        self._connect: Callable[[], Capture] = partial(Camera, self.address)
        if isinstance(self.address, str) and "://" in self.address:
            self._connect = partial(NetworkStream, self.address)
        self._capture: Capture | None = _interruptible(self._connect)
        rate = self._capture.fps or 0.0
        self.fps = rate if RATES[0] <= rate <= RATES[1] and not latest else None
        self._timed_out = False
        super().__init__(_name(self.address), None, transform, prefetch=0)

    def __getstate__(self) -> dict[str, object]:
        """Leaves the connection out: another process opens its own."""
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        return self.__dict__

    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        capture, self._capture = self._capture, None
        reader = _Reader(self.video_id, self._connect, capture, latest=self.latest)
        self._timed_out = False
        end = None if self.seconds is None else time.monotonic() + self.seconds
        seen, dropped, first = after, 0, after + 1
        try:
            while (waiting := self._next(reader, end)) is not None:
                index, pixels = first + waiting[0], waiting[1]
                record = {"file_name": f"{self.video_id}#{index}", "frame_index": index}
                if self.latest:
                    record["dropped"] = index - seen - 1
                    dropped += index - seen - 1
                seen = index
                yield record, pixels()
        finally:
            reader.stop()
            if dropped:
                logger.warning(
                    "%s: %d of %d pictures were dropped, which came while the model was busy",
                    self.video_id,
                    dropped,
                    seen - after,
                )

    def _next(self, reader: _Reader, end: float | None) -> Waiting | None:
        """Waits for a picture, and says so now and then; None at the end."""
        while True:
            left = PATIENCE if end is None else min(PATIENCE, end - time.monotonic())
            if left <= 0:
                self._timed_out = True
                return None
            try:
                return reader.get(left)
            except queue.Empty:
                if left == PATIENCE:
                    logger.warning("%s: still waiting for a picture", self.video_id)

    def _end_without_frames(self, why: str) -> None:
        """Warns where the time is out, because streams beside this one may be well."""
        if self._timed_out:
            logger.warning("%s: no picture came in %g s", self.video_id, self.seconds)
        else:
            super()._end_without_frames(why)


class _Reader:
    """Reads a source in a thread and opens it again when it breaks; keeps a few pictures."""

    def __init__(
        self, name: str, connect: Callable[[], Capture], capture: Capture | None, *, latest: bool
    ) -> None:
        """Starts the thread, with an open ``capture`` if there is one."""
        self.name, self.connect, self.latest = name, connect, latest
        self.waiting: queue.Queue[Waiting | BaseException | None]
        self.waiting = queue.Queue(maxsize=1 if latest else WAITING)
        self._stopped = threading.Event()
        # A daemon, because a read may hang until its time is out, and would keep Python alive.
        self._thread = threading.Thread(
            target=self._run, args=(capture,), name="live source", daemon=True
        )
        self._thread.start()

    def get(self, seconds: float) -> Waiting | None:
        """Returns the next picture, or None at the end.

        Raises:
            queue.Empty: none came in time.
        """
        item = self.waiting.get(timeout=seconds)
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        """Ends the thread; one that hangs in a read ends after it."""
        self._stopped.set()
        self._thread.join(timeout=1)

    def _run(self, capture: Capture | None) -> None:
        try:
            self._read(capture)
        except BaseException as error:  # noqa: BLE001 - raised by get()
            self._put(error)
        else:
            self._put(None)

    def _read(self, capture: Capture | None) -> None:
        index, tries, (pause, longest) = 0, 0, PAUSES
        while not self._stopped.is_set():
            try:
                capture = capture or self.connect()
                with closing(capture):
                    for picture in capture:
                        if tries:
                            word = "try" if tries == 1 else "tries"
                            logger.warning("%s is back, after %d %s", self.name, tries, word)
                        self._put((index, partial(capture.pixels, picture)))
                        index, tries, pause = index + 1, 0, PAUSES[0]
                        if self._stopped.is_set():
                            return
                if capture.recorded:
                    return
                why = f"{self.name} ended"
            except UserError as error:
                if capture is not None and capture.recorded:
                    raise UserError(f"{error}, past picture {index}") from error
                why = str(error)
            capture = None
            if not self._stopped.is_set():
                logger.warning("%s; it is opened again in %g s", why, pause)
                self._stopped.wait(pause)
                pause, tries = min(2 * pause, longest), tries + 1

    def _put(self, item: Waiting | BaseException | None) -> None:
        """Waits for room, or drops the picture that waits, but not for the end."""
        displace = self.latest and isinstance(item, tuple)
        while not self._stopped.is_set():
            try:
                self.waiting.put(item, block=not displace, timeout=_GLANCE)
            except queue.Full:
                if displace:
                    with suppress(queue.Empty):
                        self.waiting.get_nowait()
            else:
                return


def _interruptible(connect: Callable[[], Capture]) -> Capture:
    """Opens a source in a thread, because FFmpeg is deaf to Ctrl-C while it waits."""
    answer: queue.SimpleQueue[Capture | BaseException] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(connect())
        except BaseException as error:  # noqa: BLE001 - raised below
            answer.put(error)

    threading.Thread(target=ask, name="opening a live source", daemon=True).start()
    opened = answer.get()
    if isinstance(opened, BaseException):
        raise opened
    return opened


def _address(address: int | str) -> int | str:
    """Returns a camera's number, or its file, or a URL.

    Raises:
        UserError: it is something else.
    """
    text = str(address)
    if text.isdecimal():
        return int(text)
    if "://" in text or text.startswith("/dev/"):
        return text
    raise UserError(
        f"{text!r} is neither a URL, such as rtsp://host/path, nor a camera, such as 0 or "
        "/dev/video0" + (": use --video for a file" if Path(text).exists() else "")
    )


def _name(address: int | str) -> str:
    """Returns the video id of an address, as `_address` returns it."""
    if isinstance(address, str) and "://" in address:
        return public_name(address)
    return f"camera {address}"


def open_live(
    address: str,
    transform: FrameTransform,
    *,
    latest: bool = False,
    seconds: float | None = None,
) -> list[FrameSource]:
    """Opens a camera, a URL, or each of those in a text file, one a line.

    In the file empty lines and those that begin with # do not count. Other arguments as for
    `LiveSource`.

    Raises:
        UserError: the file cannot be read or names nothing, or two of one name (only user and
            password differ, or 0 and 00); or as for `LiveSource`.
    """
    addresses = [address]
    if "://" not in address and Path(address).suffix == ".txt":
        addresses = _read_list(Path(address))
    return [LiveSource(each, transform, latest=latest, seconds=seconds) for each in addresses]


def _read_list(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UserError(f"the list of sources {file} cannot be read: {reason}") from error
    found = {n: line for n, line in enumerate(lines, 1) if line and not line.startswith("#")}
    if not found:
        raise UserError(f"{file} names no source: write a URL or a camera's number on each line")
    places: dict[str, int] = {}  # of names, because files are named by them
    for number, line in found.items():
        name = _name(_address(line))
        if name in places:
            raise UserError(
                f"{file} names {name} in lines {places[name]} and {number}, which would write the "
                "same files: remove one"
            )
        places[name] = number
    return list(found.values())
