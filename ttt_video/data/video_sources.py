"""Frames from a video file (PyAV) and from a camera or network stream (OpenCV)."""

from __future__ import annotations

import logging
import math
import os
import queue
import stat
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import av
import numpy as np
from av.stream import Disposition

from ..errors import UserError, require
from ..files import ffmpeg_name, path_text
from ..formats.images import BadFrame, FrameTransform
from .decoded_source import DecodedSource, Reading, Record
from .fingerprint import Fingerprint, fingerprint_file
from .pipe import PATIENCE, Pipe

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

# Before PyAV 19 a file whose title is not UTF-8 opens only with this; since then any does.
_ANY_TITLE: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)

SILENCE = 30.0
"""Seconds without data after which a network stream counts as dead."""


class VideoFileSource(DecodedSource):
    """A video that PyAV decodes from start to end, turned upright by its display matrix.

    It is a file, a named pipe, which can be read once, or a URL that FFmpeg opens. If there are
    several video streams, the first one marked as default is read; attached pictures do not count.

    Attributes:
        fps: average frame rate in 1/s; None if the file does not tell.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: FrameTransform,
        **reading: Unpack[Reading],
    ) -> None:
        """Opens the file to check it and to count its frames. Arguments as for `DatasetSource`.

        With ``on_bad_frame="skip"`` each packet that cannot be decoded counts as one frame.
        """
        self.path = os.fsdecode(path)
        self._pipe: Pipe | None = None
        self._unread: av.container.InputContainer | None = None  # of the pipe, before its first use
        container, stream = self._open()
        self.fps = float(stream.average_rate) if stream.average_rate else None
        if (count := len(_films(container))) > 1:
            logger.warning(
                "%s holds %d videos: stream %d is read alone", self.path, count, stream.index
            )
        num_frames = stream.frames
        # Matroska has no frame count, so packets are counted. Pipes and URLs may never end.
        if not num_frames and os.path.isfile(self.path):
            with suppress(av.error.FFmpegError):
                num_frames = sum(packet.size > 0 for packet in container.demux(stream))
        if self._pipe is None:
            container.close()
        else:
            self._unread = container
        super().__init__(Path(self.path).stem, num_frames or None, transform, **reading)

    def fingerprint(self) -> Fingerprint | None:
        """Returns the fingerprint of the file; None for a pipe or URL."""
        return fingerprint_file(self.path)

    def __getstate__(self) -> dict[str, object]:
        if self._pipe is not None:
            raise UserError(f"{self.path} is a pipe, which cannot be handed on: use one worker")
        return self.__dict__

    def _open(self) -> tuple[av.container.InputContainer, av.video.stream.VideoStream]:
        """Opens the video; returns it with the stream to read."""
        if self._pipe is not None:
            if self._unread is None:
                raise UserError(
                    f"{self.path} is a pipe, which can be read only once: write it to a file, and "
                    "give that"
                )
            container, self._unread = self._unread, None
        else:
            container = self._open_container()
        try:
            return container, _film(container, self.path)
        except UserError:
            container.close()
            raise

    def _open_container(self) -> av.container.InputContainer:
        try:
            mode = os.stat(self.path).st_mode
        except (OSError, ValueError) as error:
            if "://" not in self.path:
                raise UserError(f"no such video file: {self.path}") from error
            name = self.path
        else:
            name = ffmpeg_name(self.path)
            if stat.S_ISDIR(mode):
                raise UserError(f"{self.path} is a folder, not a video file: use --video-dir")
            if not stat.S_ISREG(mode):
                self._pipe = Pipe(self.path)
        try:
            timeout = SILENCE if name == self.path else None
            return av.open(self._pipe or name, "r", **_ANY_TITLE, timeout=timeout)
        except av.error.ExitError as error:
            raise self._silent() from error
        except (av.error.FFmpegError, OSError) as error:
            self._raise_interrupt()
            raise UserError(
                f"{self.path} is not a video that FFmpeg can read ({error.strerror})"
            ) from error

    def _silent(self) -> UserError:
        return UserError(f"nothing came from {self.path} for {SILENCE:g} seconds: is it sending?")

    def _raise_interrupt(self) -> None:
        if self._pipe is not None:
            self._pipe.raise_error()

    def _stop_waiting(self) -> None:
        if self._pipe is not None:
            self._pipe.stop()

    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        index = 0
        container, stream = self._open()
        try:
            with container:
                # The last packet of demux() is empty: it flushes the frames the decoder holds back.
                for packet in container.demux(stream):
                    try:
                        pictures = packet.decode()
                    except av.error.InvalidDataError as error:
                        # "About", because the decoder may hold back frames of earlier packets.
                        reason = f"video {self.path} is damaged at about frame {index} ({error})"
                        if index > after:
                            yield self._record(index), BadFrame(reason)
                        index += 1
                        continue
                    for picture in pictures:
                        if index > after:
                            yield self._record(index), _upright(picture)
                        index += 1
        except av.error.ExitError as error:
            raise self._silent() from error
        except av.error.FFmpegError as error:
            self._raise_interrupt()
            raise UserError(
                f"video {self.path} cannot be read past frame {index}: {error}"
            ) from error
        self._raise_interrupt()
        if self.num_frames is not None and index < self.num_frames:
            logger.warning(
                "video %s ended after %d of the %d frames it announces: it may be cut off",
                self.path,
                index,
                self.num_frames,
            )

    def _record(self, index: int) -> Record:
        return {"file_name": f"{self.path}#{index}", "frame_index": index}


def _film(container: av.container.InputContainer, path: str) -> av.video.stream.VideoStream:
    """Returns the first readable stream that is marked as default, or else the first one."""
    films = _films(container)
    # FFmpeg takes a text file for terminal output ("tty") and draws its letters.
    if container.format.name == "tty" or not films:
        raise UserError(f"{path} has no video in it")
    readable = [stream for stream in films if stream.codec_context is not None]
    if not readable:
        raise UserError(f"the video in {path} is in a format that this FFmpeg cannot decode")
    return next((s for s in readable if s.disposition & Disposition.default), readable[0])


def _films(container: av.container.InputContainer) -> list[av.video.stream.VideoStream]:
    """Returns all video streams except attached pictures, such as covers."""
    return [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]


def _upright(picture: av.VideoFrame) -> np.ndarray:
    """Returns (H, W, 3) uint8 RGB pixels, mirrored and turned by quarters as they are to be shown.

    The display matrix maps a pixel (p, q), q downwards, to (a p + c q, b p + d q); 16.16 fixed
    point, row by row a b u, c d v, x y w (libavutil/display.h, ISO/IEC 14496-12).
    """
    rgb = picture.to_ndarray(format="rgb24")
    side_data = picture.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return rgb
    matrix = bytes(side_data)  # type: ignore[call-overload]
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if a * d - b * c < 0:
        rgb, a, b = rgb[:, ::-1], -a, -b
    quarters = round(math.atan2(b, a) / (math.pi / 2))  # clockwise
    return np.rot90(rgb, -quarters)


class WebcamSource(DecodedSource):
    """A camera or network stream that OpenCV reads until it ends.

    It always yields the newest picture and drops those that arrive while the consumer is busy, so
    that a slow model stays live. ``frame_index`` counts dropped pictures, too, and ``dropped`` says
    how many were dropped since the frame before.
    """

    def __init__(self, device: int | str, transform: FrameTransform) -> None:
        """Remembers the device, which every iteration opens again.

        Args:
            device: a camera's number (also as a string), or a URL or path that OpenCV opens.
            transform: converts decoded pixels to the network's input.
        """
        number = str(device)
        self.device: int | str = int(number) if number.isdecimal() else number
        super().__init__(f"webcam {number}", None, transform, prefetch=0)

    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        cv2 = require("cv2", "opencv-python-headless", "a webcam")
        address = self.device
        if isinstance(address, str):
            if path_text(address) != address:  # OpenCV would crash
                raise UserError(f"OpenCV takes no name that is no UTF-8: {path_text(address)}")
            if os.path.isfile(address):
                address = ffmpeg_name(address)
        capture = cv2.VideoCapture(address)
        if not capture.isOpened():
            capture.release()
            raise UserError(f"cannot open camera or stream {self.device!r}: is it there and free?")
        newest: queue.Queue[tuple[int, np.ndarray] | None] = queue.Queue(maxsize=1)
        stop = threading.Event()

        def grab() -> None:
            index = 0
            while not stop.is_set():
                there, bgr = capture.read()
                if not there:
                    break
                with suppress(queue.Empty):
                    newest.get_nowait()
                newest.put((index, bgr))  # never blocks, because only this thread puts
                index += 1
            while not stop.is_set():  # the end must not displace an unseen picture
                with suppress(queue.Full):
                    newest.put(None, timeout=0.05)
                    break
            capture.release()

        # A daemon, because a read from a dead network stream may hang and keep Python alive.
        thread = threading.Thread(target=grab, name="webcam", daemon=True)
        thread.start()
        seen = -1
        try:
            while (item := self._newest(newest)) is not None:
                index, bgr = item
                name, dropped = f"{self.device}#{index}", index - seen - 1
                seen = index
                record = {"file_name": name, "frame_index": index, "dropped": dropped}
                yield record, bgr[:, :, ::-1]
        finally:
            stop.set()
            thread.join(timeout=2)

    def _newest(self, pictures: queue.Queue[Item]) -> Item:
        """Waits for the newest picture; logs a warning while none comes."""
        while True:
            try:
                return pictures.get(timeout=PATIENCE)
            except queue.Empty:
                logger.warning("%s: still waiting for a picture", self.video_id)
