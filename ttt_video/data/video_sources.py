"""Frames of a video file or a named pipe, decoded by PyAV."""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Generator
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition

from ..errors import UserError
from ..files import ffmpeg_name
from ..formats.images import BadFrame, FrameTransform
from .decoded_source import DecodedSource, Reading, Record
from .fingerprint import Fingerprint, fingerprint_file
from .pipe import Pipe

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

ANY_TITLE: dict[str, Any] = (
    {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
)
"""What `av.open` needs before PyAV 19 for a file whose title is not UTF-8; since then any opens."""


def _unknown_side_data(kinds: type[Enum], value: int) -> Enum:
    """Returns a member for a kind of side data that PyAV has no name for.

    Without it PyAV before 19 lists no side data of such a picture: it raises ValueError where a
    JPEG has EXIF, which FFmpeg hands on since its version 8.
    """
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"UNKNOWN_{value}", value
    return kind


SideDataType._missing_ = classmethod(_unknown_side_data)  # type: ignore[assignment]


class VideoFileSource(DecodedSource):
    """A video that PyAV decodes from start to end, turned upright by its display matrix.

    It is a file, or a named pipe, which can be read once. If there are several video streams, the
    first one marked as default is read; attached pictures do not count.

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
        self._seconds: tuple[float, float] | None = None  # that there are, and that are announced
        # Matroska and FLV have no frame count, so packets are counted. A pipe may never end.
        if not num_frames and self._pipe is None:
            num_frames, self._seconds = _count(container, stream)
        if self._pipe is None:
            container.close()
        else:
            self._unread = container
        super().__init__(Path(self.path).stem, num_frames or None, transform, **reading)

    def fingerprint(self) -> Fingerprint | None:
        """Returns the fingerprint of the file; None for a pipe."""
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
            return container, film(container, self.path)
        except UserError:
            container.close()
            raise

    def _open_container(self) -> av.container.InputContainer:
        try:
            mode = os.stat(self.path).st_mode
        except (OSError, ValueError) as error:
            raise UserError(f"no such video file: {self.path}{_flag(self.path)}") from error
        if stat.S_ISDIR(mode):
            raise UserError(f"{self.path} is a folder, not a video file: use --video-dir")
        if stat.S_ISCHR(mode):
            raise UserError(f"{self.path} is a device, not a video file: use --camera")
        if not stat.S_ISREG(mode):
            self._pipe = Pipe(self.path)
        elif _is_animated_webp(self.path):
            raise UserError(
                f"{self.path} is an animated WebP, which FFmpeg cannot decode: convert it to a "
                "GIF, an MP4 or a folder of frames"
            )
        try:
            return av.open(self._pipe or ffmpeg_name(self.path), "r", **ANY_TITLE)
        except (av.error.FFmpegError, OSError) as error:
            self._raise_interrupt()
            raise UserError(
                f"{self.path} is not a video that FFmpeg can read ({error.strerror})"
            ) from error

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
                            yield self._record(index), upright(picture)
                        index += 1
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
        elif self._seconds is not None:
            logger.warning(
                "video %s ended after %.1f of the %.1f seconds it announces: it may be cut off",
                self.path,
                *self._seconds,
            )

    def _record(self, index: int) -> Record:
        return {"file_name": f"{self.path}#{index}", "frame_index": index}


def _is_animated_webp(path: str) -> bool:
    """Returns whether a file is a WebP with the flag of an animation in its header (RFC 9649)."""
    try:
        with open(path, "rb") as file:
            head = file.read(21)
    except OSError:
        return False
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20:] and head[20] & 2)


def _flag(path: str) -> str:
    """Returns the flag for what is no file: a URL, or a camera's number."""
    if "://" in path:
        return "; use --source for a URL"
    return "; use --camera for a camera" if path.isdecimal() else ""


def film(container: av.container.InputContainer, path: str) -> av.video.stream.VideoStream:
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


def _count(
    container: av.container.InputContainer, stream: av.video.stream.VideoStream
) -> tuple[int, tuple[float, float] | None]:
    """Returns the number of a video's packets, each a frame, by reading the whole file.

    The seconds that there are of all streams and those that the file announces follow, if it ends a
    second and two frames or more too early.
    """
    frames, end = 0, 0.0
    with suppress(av.error.FFmpegError):
        for packet in container.demux():
            frames += packet.stream is stream and packet.size > 0
            if packet.pts is not None and packet.time_base is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    end -= (container.start_time or 0) / av.time_base
    announced = (container.duration or 0) / av.time_base
    rate = float(stream.average_rate or math.inf)
    return frames, (end, announced) if announced - end >= 1.0 + 2.0 / rate else None


def upright(picture: av.VideoFrame) -> np.ndarray:
    """Returns (H, W, 3) uint8 RGB pixels, mirrored and turned by quarters as they are to be shown.

    The display matrix maps a pixel (p, q), q downwards, to (a p + c q, b p + d q); 16.16 fixed
    point, row by row a b u, c d v, x y w (libavutil/display.h, ISO/IEC 14496-12).
    """
    rgb = picture.to_ndarray(format="rgb24")
    # Not `picture.side_data`, which keeps what it makes, and that keeps the picture: up to 180
    # pictures and twice as many threads stayed until Python looked for circles.
    side_data = SideDataContainer(picture).get("DISPLAYMATRIX")  # type: ignore[call-arg]
    if side_data is None:
        return rgb
    matrix = bytes(side_data)
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    if a * d - b * c < 0:
        rgb, a, b = rgb[:, ::-1], -a, -b
    quarters = round(math.atan2(b, a) / (math.pi / 2))  # clockwise
    return np.rot90(rgb, -quarters)
