"""Writing videos that play in a browser."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import TracebackType

import av
import numpy as np
import torch

from ..errors import UserError
from ..files import WriteBehind, ffmpeg_name, write_atomically, writing
from .overlay import BACKGROUND, resize

MIN_FPS, MAX_FPS = 1e-4, 1e5
"""Frames per second that an MP4 can have: a slower one's times overflow in FFmpeg."""

# One thread of x264, and so no slices: no race and no number of cores decides the bytes. On two
# idle cores four threads are no faster (ms per frame, one and four threads, best of four: 5.6 and
# 6.1 at 1242x375, 26 and 27 at 2048x1024); where other processes keep both busy, they get a larger
# share of them (17 and 12, 70 and 56). Their files are 1 to 3 % larger.
_THREADS = 1
# Not x264's AVX-512 code: it reads memory that nothing has written. On an AMD EPYC with AVX-512, 2
# to 25 of 1,000 four-frame videos, each encoded again and again from the same pictures, differed by
# some bytes (x264 build 165 in PyAV 18.1's wheel); none of 10,000 did without it. It is no slower
# (4.5 ms a frame at 1248x376, and 4.8). x264 takes these names without asking the CPU, so they are
# given only where it has them.
_AVX2 = "MMX2,SSE2Fast,SSSE3,SSE4.2,AVX,FMA3,AVX2"
# No bit rates in the file: FFmpeg estimates them when it opens the parts, and on a busy machine two
# runs with the same packets have had different ones.
_MP4 = {"write_btrt": "0"}
_BT709 = 1  # ISO/IEC 23091-2 code of BT.709's primaries, transfer and matrix
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG


class VideoWriter:
    """Encodes frames to an H.264 MP4 (yuv420p, BT.709) in a background thread.

    The first frame sets the size; later ones of another size are scaled to fit and framed.

    While it is written the file is a fragmented MP4 without an index, which plays up to its last
    fragment (two seconds) when the process is killed. A clean `close`, also by way of an exception
    inside ``with``, copies the packets into an ordinary MP4 with its index in front, which every
    browser can seek in. (Writing that at once would leave nothing playable behind after a kill.)
    A part of a longer video, for :func:`join_videos`, stays as it is.

    >>> with VideoWriter("overlay.mp4", fps=10) as video:
    ...     video.write(image)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        *,
        crf: int = 23,
        max_side: int = 3840,
        part: bool = False,
    ) -> None:
        """Writes no file before the first frame.

        Args:
            path: the file, replaced if it exists.
            fps: frames per second.
            crf: x264's constant quality, 0 (lossless) to 51.
            max_side: longer frames are scaled down to this many pixels, as decoders have limits.
            part: leave the fragmented file, for :func:`join_videos`.
        """
        check_fps(fps)
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise UserError(f"no such folder for the video: {self.path.parent}")
        self.num_frames = 0
        self._rate = _rate(fps)
        self._part = part
        self._crf = crf
        self._max_side = max_side
        self._thread = WriteBehind("video")
        self._container: av.container.OutputContainer | None = None
        self._size = (0, 0)
        self._encoded = 0
        self._closed = False

    def write(self, image: np.ndarray | Callable[[], np.ndarray]) -> None:
        """Queues one frame; raises what went wrong with earlier ones.

        Args:
            image: (H, W, 3) uint8 RGB; or a function that draws it, in the background thread.
        """
        if self._closed:
            raise ValueError(f"{self.path} is closed")
        if isinstance(image, np.ndarray):
            _check(image)
            image = image.copy()  # the caller may draw the next frame into the same array
        self._thread.submit(partial(self._encode, image))
        self.num_frames += 1

    def close(self) -> None:
        """Finishes the file; raises what went wrong in encoding. Further calls do nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._thread.close()
        finally:
            if self._container is not None:
                try:
                    self._mux(None)
                finally:
                    with writing(self.path):
                        self._container.close()
        if self._container is not None and not self._part:
            join_videos([self.path], self.path, self._rate)

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, image: np.ndarray | Callable[[], np.ndarray]) -> None:
        if not isinstance(image, np.ndarray):
            image = image()
            _check(image)
        if self._container is None:
            self._open(*image.shape[:2])
        frame = av.VideoFrame.from_ndarray(_letterbox(image, *self._size), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
        frame.pts, frame.time_base = self._encoded, 1 / self._rate
        self._encoded += 1
        self._mux(frame)

    def _mux(self, frame: av.VideoFrame | None) -> None:
        assert self._container is not None
        for packet in self._stream.encode(frame):
            with writing(self.path):
                self._container.mux(packet)

    def _open(self, height: int, width: int) -> None:
        scale = min(1.0, self._max_side / max(height, width))
        # 4:2:0 chroma needs even sides.
        self._size = (_even(height * scale), _even(width * scale))
        flags = "frag_keyframe+empty_moov+default_base_moof"
        # flush_packets: else finished fragments would wait in FFmpeg's buffer for the close.
        options = _MP4 | {"movflags": flags, "flush_packets": "1"}
        with writing(self.path):
            container = av.open(ffmpeg_name(self.path), "w", format="mp4", options=options)
        try:
            stream = container.add_stream(
                "libx264",
                rate=self._rate,
                # Without B-frames ("bf"): in a fragmented file they would delay the first picture.
                options={
                    "crf": str(self._crf),
                    "preset": "veryfast",
                    "bf": "0",
                    "x264-params": f"asm={_instructions()}",
                },
            )
        except ValueError as error:  # av's UnknownCodecError
            container.close()
            raise UserError(
                "this PyAV has no H.264 encoder (libx264): install the one from PyPI, "
                "pip install --force-reinstall av"
            ) from error
        stream.height, stream.width = self._size
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = _THREADS
        context.gop_size = max(1, round(2 * self._rate))
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        self._container, self._stream = container, stream


def _instructions() -> str:
    """x264's instruction sets: up to AVX2, so that the same pictures are the same bytes."""
    return _AVX2 if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else "auto"


def check_fps(fps: float) -> None:
    """Raises UserError where a video cannot have this frame rate."""
    if not MIN_FPS <= fps <= MAX_FPS:
        raise UserError(
            f"a video's frame rate must be between {MIN_FPS:g} and {MAX_FPS:g} frames per second, "
            f"not {fps:g}"
        )


def check_part(part: Path) -> None:
    """Raises UserError where a part of a video, for :func:`join_videos`, is missing or damaged."""
    try:
        with av.open(ffmpeg_name(part)) as container:
            if container.streams.video:
                return
            reason = "there is no video in it"
    except (av.error.FFmpegError, OSError) as error:
        reason = str(error.strerror)
    raise UserError(f"{part}, a part of an overlay video, cannot be read: {reason}")


def plays(part: Path) -> bool:
    """Returns whether any picture of a part is whole; a kill may have torn all of them."""
    try:
        with av.open(ffmpeg_name(part)) as container:
            return next(_whole_packets(container), None) is not None
    except (av.error.FFmpegError, OSError):
        return False


def _whole_packets(source: av.container.InputContainer) -> Iterator[av.Packet]:
    """Yields the packets of a part; one that a kill tore is left out, and so are those after it."""
    for packet in source.demux(source.streams.video[0]):
        if packet.dts is None or packet.is_corrupt:  # demux()'s closing packet is empty
            return
        yield packet


def join_videos(parts: Sequence[Path], path: Path, fps: float | Fraction) -> None:
    """Copies files of :class:`VideoWriter`, one after the other, into one with its index in front.

    Nothing is encoded again: the result has the same packets as the parts.

    Args:
        parts: of one size and frame rate, at least one; ``path`` may be among them.
        path: the file, replaced whole.
        fps: frames per second of them all.

    Raises:
        UserError: a part is missing or damaged, or has another size; ``path`` stays as it was.
    """
    write_atomically(path, lambda file: _copy_packets(parts, file, _rate(fps)))


def _copy_packets(parts: Sequence[Path], path: Path, rate: Fraction) -> None:
    index = 0
    for part in parts:
        check_part(part)
    options = _MP4 | {"movflags": "faststart"}
    with av.open(ffmpeg_name(path), "w", format="mp4", options=options) as target:
        copy = None
        for part in parts:
            with av.open(ffmpeg_name(part)) as source:
                stream = source.streams.video[0]
                copy = copy or target.add_stream_from_template(stream)
                if (stream.height, stream.width) != (copy.height, copy.width):
                    raise UserError(
                        f"{part} has pictures of {stream.height}x{stream.width} (height x width), "
                        f"but {parts[0]} has {copy.height}x{copy.width}: join videos of one size"
                    )
                for packet in _whole_packets(source):
                    # Without B-frames, packets are in the order of their frames.
                    packet.stream = copy
                    packet.time_base = 1 / rate
                    packet.pts = packet.dts = index
                    packet.duration = 1
                    target.mux(packet)
                    index += 1


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a frame is (H, W, 3) uint8, not {image.shape} {image.dtype}")


def _rate(fps: float | Fraction) -> Fraction:
    """The rate as a fraction of small numbers; of a slow video its inverse, the period, is one."""
    exact = Fraction(fps)
    return exact.limit_denominator(1001) if exact >= 1 else 1 / (1 / exact).limit_denominator(1001)


def _even(length: float) -> int:
    return 2 * max(1, -int(-length // 2))


def _letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fits an image into the size: scaled as a whole, the rest filled.

    A side that is one pixel short, as odd ones are, repeats its last line.
    """
    scale = min(height / image.shape[0], width / image.shape[1])
    if image.shape[0] not in (height, height - 1) or image.shape[1] not in (width, width - 1):
        fitted = (
            max(1, min(height, round(image.shape[0] * scale))),
            max(1, min(width, round(image.shape[1] * scale))),
        )
        image = resize(image, fitted)
    missing = (height - image.shape[0], width - image.shape[1])
    if missing == (0, 0):
        return image
    if max(missing) == 1:
        return np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    canvas = np.full((height, width, 3), BACKGROUND, np.uint8)
    top, left = missing[0] // 2, missing[1] // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas
