"""What crosses the package's boundaries: a frame, a source of frames, seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
from torch import Tensor


class _OptionalKeys(TypedDict, total=False):
    """Labels, which only evaluators read, and keys that only cameras' or grey frames have."""

    picture: np.ndarray
    grey: Tensor
    original: np.ndarray
    image_id: Any
    annotations: list[dict[str, Any]]
    sem_seg_file_name: str
    pan_seg_file_name: str
    segments_info: list[dict[str, Any]]
    original_file_name: str
    dropped: int
    after_gap: bool


class Frame(_OptionalKeys):
    """One frame of a video: a detectron2 dataset dict, so models and evaluators take it as it is.

    image: (3, h, w) uint8 at network resolution, channels in ``cfg.INPUT.FORMAT`` order.
    height, width: original size in pixels, the size of the model's outputs.
    video_id: the video's name; frame_index: 0-based position in the video.
    file_name: where the frame was read from, as text (see ``files.path_text``); for a video file
    ``"<file>#<index>"``.
    after_gap: True for a live source's first frame after a kill; without the key, the frame before
    is the one that the camera gave before.
    dropped: pictures that a live camera dropped since the frame before; none without the key.
    grey: (1, height, width) uint8, what a model of colours may see of the frame at its own size;
    original: (height, width, 3) uint8 RGB, the label of such a frame.
    picture: (height, width, 3) uint8 RGB, the frame as it is shown to people; no window takes it.
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

    A source of your own inherits from ``ttt_video.data.BaseSource``, which has a default for all
    but ``video_id`` and the frames.
    """

    @property
    def video_id(self) -> str:
        """The video's name; every frame has it."""
        ...

    @property
    def num_frames(self) -> int | None:
        """Frames to expect, such as a progress bar's total; None where nobody knows (a camera).

        Frames that turn out to be unreadable lower it.
        """
        ...

    @property
    def fps(self) -> float | None:
        """Frame rate in 1/s; None where nobody knows."""
        ...

    @property
    def live(self) -> bool:
        """Whether frames come as time goes by, so that none can be seen twice (a camera)."""
        ...

    @property
    def skipped(self) -> Sequence[str]:
        """Files of the frames that the current or last iteration skipped as unreadable so far."""
        ...

    def __iter__(self) -> Iterator[Frame]: ...

    def frames_after(self, frame_index: int) -> Iterator[Frame]:
        """Returns the frames that follow the one with this index, in the source's own order.

        A live source gives those to come, numbered on from this index.
        """
        ...

    def fingerprint(self) -> list[list[Any]] | None:
        """Returns what the video's files are known by (``ttt_video.data.fingerprint``).

        None for a source without files, such as a camera.
        """
        ...


@dataclass
class StepResult:
    """One gradient step of a frame's update: its scalars, and the prediction after it.

    record: such as ``loss_recon``, which is taken before the step, and ``grad_norm``.
    output: detectron2's outputs by the weights after the step.
    """

    record: dict[str, float]
    output: Mapping[str, Any]


def video_seed(seed: int, video_id: str) -> int:
    """Returns a seed for one video, whatever videos come before it."""
    digest = hashlib.sha256(f"{seed}/{video_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
