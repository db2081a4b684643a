"""The two shapes that cross every boundary of the package: a frame, and a source of frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from torch import Tensor


class _Labels(TypedDict, total=False):
    """Label keys of the data set that a frame came from. Only evaluators read them."""

    image_id: Any
    annotations: list[dict[str, Any]]
    sem_seg_file_name: str
    pan_seg_file_name: str
    segments_info: list[dict[str, Any]]
    color: np.ndarray
    color_file_name: str


class _Live(TypedDict, total=False):
    """Keys of a live camera's frames."""

    dropped: int


class Frame(_Labels, _Live):
    """One frame of a video: a detectron2 dataset dict, so models and evaluators take it as it is.

    image: (3, h, w) uint8 at network resolution, channels in ``cfg.INPUT.FORMAT`` order.
    height, width: original size in pixels, the size of the model's outputs.
    video_id: the video's name; frame_index: 0-based position in the video.
    file_name: where the frame was read from, as text (see ``files.path_text``); for a video file
    ``"<file>#<index>"``.
    dropped: pictures that a live camera gave since the frame before and nobody saw; without the
    key, none.
    Further keys are the data set's labels, passed on unread.
    """

    image: Tensor
    height: int
    width: int
    video_id: str
    frame_index: int
    file_name: str


@runtime_checkable
class FrameSource(Protocol):
    """One video: its frames in time order, again from the start with every ``iter()``.

    ``num_frames`` is the number of frames to expect (a progress bar's total; frames that turn out
    to be unreadable lower it), or None where nobody knows, as for a webcam.
    """

    @property
    def video_id(self) -> str: ...

    @property
    def num_frames(self) -> int | None: ...

    def __iter__(self) -> Iterator[Frame]: ...
