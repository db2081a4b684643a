"""Open cameras (OpenCV) and network streams (PyAV), which give pictures until they end or break."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

from ..errors import UserError, require
from .video_sources import ANY_TITLE, film, upright

logger = logging.getLogger(__name__)

UNTIMED = ("mpjpeg", "mjpeg", "jpeg_pipe")
"""Formats of pictures without a time, of which FFmpeg says 25 a second whatever comes."""

SILENCE = 10.0
"""Seconds without data after which a network stream counts as broken."""


class Capture(ABC):
    """An open camera or stream.

    Attributes:
        fps: frame rate in 1/s; None if it does not tell.
        recorded: it is a recording, which ends.
    """

    fps: float | None = None
    recorded: bool = False

    @abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """Yields pictures until there are no more.

        Raises:
            UserError: it broke off.
        """

    @abstractmethod
    def pixels(self, picture: Any) -> np.ndarray:
        """Returns a picture's (H, W, 3) uint8 RGB pixels."""

    @abstractmethod
    def close(self) -> None:
        """Releases it."""


class Camera(Capture):
    """A camera of this machine."""

    def __init__(self, device: int | str) -> None:
        """Opens a camera by its number or, on Linux, its file."""
        cv2 = require("cv2", "opencv-python-headless", "a camera")
        cv2.setLogLevel(0)  # its own lines, several for each try, would hide ours
        self._capture = cv2.VideoCapture(device)
        if not self._capture.isOpened():
            self.close()
            raise UserError(f"camera {device} cannot be opened: is it there and free?")
        self.fps = self._capture.get(cv2.CAP_PROP_FPS) or None

    def __iter__(self) -> Iterator[Any]:
        while True:
            there, bgr = self._capture.read()
            if not there:
                return
            yield bgr

    def pixels(self, picture: Any) -> np.ndarray:
        rgb: np.ndarray = picture[:, :, ::-1]
        return rgb

    def close(self) -> None:
        self._capture.release()


class NetworkStream(Capture):
    """A stream that FFmpeg opens by its URL."""

    def __init__(self, url: str) -> None:
        """Connects, and reads until the stream has said what it is."""
        self.name = public_name(url)
        # FFmpeg tries UDP first, over which pictures lose parts.
        options = {"rtsp_flags": "prefer_tcp"} if url.startswith("rtsp://") else {}
        try:
            self._container = av.open(url, "r", options=options, timeout=SILENCE, **ANY_TITLE)
        except (av.error.FFmpegError, OSError) as error:
            raise self._lost(error) from error
        try:
            self._stream = film(self._container, self.name)
        except UserError:
            self.close()
            raise
        told = self._container.format.name not in UNTIMED
        self.fps = float(self._stream.guessed_rate or 0) or None if told else None
        self.recorded = bool(self._container.duration)

    def _lost(self, error: av.error.FFmpegError | OSError) -> UserError:
        if isinstance(error, av.error.ExitError):
            return UserError(
                f"nothing came from {self.name} for {SILENCE:g} seconds: is it sending?"
            )
        return UserError(f"{self.name} cannot be read ({error.strerror})")

    def __iter__(self) -> Iterator[Any]:
        damaged = 0
        try:
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except av.error.InvalidDataError as error:
                    damaged += 1
                    if str(damaged).strip("0") == "1":  # 1, 10, 100, ...
                        logger.warning(
                            "%s: a damaged picture is left out (%s), the %d. of this connection",
                            self.name,
                            error.strerror,
                            damaged,
                        )
        except (av.error.FFmpegError, OSError) as error:
            raise self._lost(error) from error

    def pixels(self, picture: Any) -> np.ndarray:
        return upright(picture)

    def close(self) -> None:
        self._container.close()


def public_name(url: str) -> str:
    """Returns a URL without user and password, as it may stand in files and on a console."""
    scheme, mark, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{mark}{host.rpartition('@')[2]}{slash}{path}"
