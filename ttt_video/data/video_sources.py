"""Frames from a video file (PyAV) and from a camera or network stream (OpenCV)."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from ttt_video.data.decoded_source import DecodedSource, OnBadFrame, Record
from ttt_video.data.fingerprint import Fingerprint, fingerprint_file
from ttt_video.data.images import BadFrame, FrameTransform
from ttt_video.errors import UserError

logger = logging.getLogger(__name__)


class VideoFileSource(DecodedSource):
    """A video file, decoded from start to end through PyAV, upright as its rotation tag says.

    Attributes:
        fps: average frame rate in 1/s; None where the file does not tell.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        transform: FrameTransform,
        *,
        on_bad_frame: OnBadFrame = "stop",
        prefetch: int = 2,
    ) -> None:
        """Opens the file to check it and to count its frames. Arguments as for `DatasetSource`.

        With ``on_bad_frame="skip"`` every packet that does not decode counts as one frame.
        """
        self.path = str(path)
        with self._open() as container:
            stream = container.streams.video[0]
            self.fps = float(stream.average_rate) if stream.average_rate else None
            # A container without a frame count (Matroska) has its packets counted, not decoded.
            num_frames = stream.frames
            if not num_frames:
                with suppress(av.error.FFmpegError):
                    num_frames = sum(packet.size > 0 for packet in container.demux(stream))
        super().__init__(
            Path(self.path).stem, num_frames or None, transform, on_bad_frame, prefetch
        )

    def fingerprint(self) -> Fingerprint | None:
        """Returns what the file is known by."""
        return fingerprint_file(self.path)

    def _open(self) -> av.container.InputContainer:
        if os.path.isdir(self.path):
            raise UserError(f"{self.path} is a folder, not a video file: use --video-dir for it")
        try:
            container = av.open(self.path)
        except FileNotFoundError as error:
            raise UserError(f"no such video file: {self.path}") from error
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(f"{self.path} is not a video that FFmpeg can read ({error})") from error
        # FFmpeg takes any text file for terminal output ("tty") and draws its letters.
        if container.format.name == "tty" or not container.streams.video:
            container.close()
            raise UserError(f"{self.path} has no video in it")
        return container

    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        index = 0
        try:
            with self._open() as container:
                # The last packet of demux() is empty: it flushes the frames the decoder holds back.
                for packet in container.demux(video=0):
                    try:
                        pictures = packet.decode()
                    except av.error.InvalidDataError as error:
                        # About: the decoder may hold back some frames of earlier packets.
                        reason = f"video {self.path} is damaged at about frame {index} ({error})"
                        if index > after:
                            yield self._record(index), BadFrame(reason)
                        index += 1
                        continue
                    for picture in pictures:
                        if index > after:
                            rgb = picture.to_ndarray(format="rgb24")
                            quarter_turns = round(picture.rotation / 90)  # counter-clockwise
                            yield self._record(index), np.rot90(rgb, quarter_turns)
                        index += 1
        except av.error.FFmpegError as error:
            raise UserError(
                f"video {self.path} cannot be read past frame {index}: {error}"
            ) from error
        if self.num_frames is not None and index < self.num_frames:
            logger.warning(
                "video %s ended after %d of the %d frames it announces: it may be cut off",
                self.path,
                index,
                self.num_frames,
            )

    def _record(self, index: int) -> Record:
        return {"file_name": f"{self.path}#{index}", "frame_index": index}


class WebcamSource(DecodedSource):
    """A camera or a network stream, through OpenCV; it ends when the device does.

    Always yields the newest picture: those that arrive while the consumer is busy are dropped, so
    that a slow model stays live. ``frame_index`` counts the camera's pictures, dropped ones too.
    """

    def __init__(self, device: int | str, transform: FrameTransform) -> None:
        """Remembers the device; every iteration opens it anew.

        Args:
            device: a camera's number (also as a string), or a URL or path that OpenCV opens.
            transform: makes the network's input of the decoded pixels.
        """
        number = str(device)
        self.device: int | str = int(number) if number.isdecimal() else number
        super().__init__(f"webcam {number}", None, transform, "stop", prefetch=0)

    def _decode(self, after: int) -> Generator[tuple[Record, np.ndarray | BadFrame], None, None]:
        try:
            import cv2
        except ImportError as error:
            raise UserError(
                "a webcam is read through OpenCV: pip install opencv-python-headless"
            ) from error

        capture = cv2.VideoCapture(self.device)
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
                newest.put((index, bgr))  # never blocks: only this thread puts
                index += 1
            while not stop.is_set():  # The end must not displace a picture nobody has seen.
                with suppress(queue.Full):
                    newest.put(None, timeout=0.05)
                    break
            capture.release()

        # A daemon, as a read from a dead network stream may hang and must not keep Python alive.
        thread = threading.Thread(target=grab, name="webcam", daemon=True)
        thread.start()
        try:
            while (item := newest.get()) is not None:
                index, bgr = item
                name = f"{self.device}#{index}"
                yield {"file_name": name, "frame_index": index}, bgr[:, :, ::-1]
        finally:
            stop.set()
            thread.join(timeout=2)
