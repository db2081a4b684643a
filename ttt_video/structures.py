"""The two shapes that cross every boundary of the package: a frame, and a source of frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor


class _OptionalKeys(TypedDict, total=False):
    """Labels, which only evaluators read, and what only a live camera's frames have."""

    image_id: Any
    annotations: list[dict[str, Any]]
    sem_seg_file_name: str
    pan_seg_file_name: str
    segments_info: list[dict[str, Any]]
    dropped: int


class Frame(_OptionalKeys):
    """One frame of a video: a detectron2 dataset dict, so models and evaluators take it as it is.

    image: (3, h, w) uint8 at network resolution, channels in ``cfg.INPUT.FORMAT`` order.
    height, width: original size in pixels, the size of the model's outputs.
    video_id: the video's name; frame_index: 0-based position in the video.
    file_name: where the frame was read from, as text (see ``files.path_text``); for a video file
    ``"<file>#<index>"``.
    dropped: pictures that a live camera dropped since the frame before; none without the key.
    Other keys are the data set's labels, passed on unread.
    """

    image: Tensor
    height: int
    width: int
    video_id: str
    frame_index: int
    file_name: str


@runtime_checkable
class FrameSource(Protocol):
    """One video; every ``iter()`` yields its frames in time order, from the first on.

    ``num_frames`` is the number of frames to expect, as a progress bar needs it. Unreadable frames
    make it smaller, and it is None if nobody knows, as for a webcam.
    """

    @property
    def video_id(self) -> str: ...

    @property
    def num_frames(self) -> int | None: ...

    def __iter__(self) -> Iterator[Frame]: ...
