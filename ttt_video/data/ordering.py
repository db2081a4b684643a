"""Orders of frames: a video's first ones as they come, shuffled, or sorted by what records say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from ..errors import UserError
from ..structures import Frame, FrameSource
from .base import closing_frames, drop_until
from .sources import DatasetSource


class FirstFrames:
    """The first frames of a source."""

    def __init__(self, source: FrameSource, max_frames: int | None) -> None:
        """``max_frames`` None takes all."""
        self.source = source
        self.max_frames = max_frames
        self.video_id = source.video_id
        self.fps = source.fps
        self.live = source.live
        self.fingerprint = source.fingerprint

    @property
    def num_frames(self) -> int | None:
        """Returns how many frames to expect; None if nobody knows."""
        known = [n for n in (self.source.num_frames, self.max_frames) if n is not None]
        return min(known, default=None)

    @property
    def skipped(self) -> Sequence[str]:
        """Returns the files that the source skipped."""
        return self.source.skipped

    def __iter__(self) -> Iterator[Frame]:
        frames = iter(self.source)
        with closing_frames(frames):
            yield from islice(frames, self.max_frames)

    def frames_after(self, frame_index: int) -> Iterator[Frame]:
        """Returns those of the first frames that follow the one with this index."""
        return drop_until(self, frame_index)


class ShuffledFrames(FirstFrames):
    """The first frames of a source in an order that a seed and the video's id decide.

    Frames keep their ``frame_index``. The first iteration decodes all of them and keeps them in
    memory: a minute of KITTI's frames at 1024 x 2048 px takes about 4 GB.
    """

    def __init__(self, source: FrameSource, max_frames: int | None, *, seed: int) -> None:
        """Shuffles the first ``max_frames`` frames only; None shuffles all.

        Raises:
            UserError: the source is live.
        """
        if source.live:
            raise UserError(
                f"{source.video_id} gives its frames as they come: set TTT.FRAME_ORDER to time"
            )
        super().__init__(source, max_frames)
        self.seed = seed
        self._frames: list[Frame] = []

    def __iter__(self) -> Iterator[Frame]:
        if not self._frames:
            frames = list(super().__iter__())
            for frame in frames:
                frame.pop("picture", None)  # its size would add to that of the network's input
            order = _permutation(self.seed, self.video_id, len(frames))
            self._frames = [frames[i] for i in order]
        return iter(self._frames)


def _permutation(seed: int, video_id: str, count: int) -> list[int]:
    name = f"{seed}/{video_id}/order".encode()
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name).digest()[:8], "big"))
    permuted: list[int] = rng.permutation(count).tolist()
    return permuted


SORTED_BY = {"class": "class_id", "first": "group", "second": "group", "severity": "severity"}
"""Keys of records that some values of ``TTT.FRAME_ORDER`` sort an image set by."""


def in_order(source: FrameSource, order: str, max_frames: int | None, *, seed: int) -> FrameSource:
    """Returns the first frames of a source in an order of ``TTT.FRAME_ORDER``.

    Images of an image set that are equal in what they are sorted by are shuffled, but for ``class``
    they stay as they come. No image set is decoded for its order.

    Args:
        source: of all frames.
        order: value of the key.
        max_frames: how many of the first frames are put in order; None for all.
        seed: decides, with the video's id, how frames are shuffled.

    Raises:
        UserError: the frames lack what they are to be sorted by, or do not differ in it.
    """
    if order == "time":
        return FirstFrames(source, max_frames)
    records = source.records[:max_frames] if isinstance(source, DatasetSource) else []
    is_image_set = bool(records) and "class_id" in records[0]
    if order == "shuffled" and not is_image_set:
        return ShuffledFrames(source, max_frames, seed=seed)
    places = list(range(len(records)))
    if order != "class":
        places = _permutation(seed, source.video_id, len(records))
    if order != "shuffled":
        key = SORTED_BY[order]
        if len({record.get(key) for record in records}) < 2:
            raise UserError(
                f"TTT.FRAME_ORDER is {order!r}, but the frames of {source.video_id} do not differ "
                f"in {key!r}: choose another order, or an image set that does"
            )
        places.sort(key=lambda place: records[place][key], reverse=order == "second")
    assert isinstance(source, DatasetSource)
    return source.reordered(places)
