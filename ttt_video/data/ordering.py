"""Sources that yield a video's first frames, in order or shuffled."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from ..errors import UserError
from ..structures import Frame, FrameSource
from .base import drop_until


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
        return islice(iter(self.source), self.max_frames)

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
            name = f"{self.seed}/{self.video_id}/order".encode()
            rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name).digest()[:8], "big"))
            self._frames = [frames[i] for i in rng.permutation(len(frames))]
        return iter(self._frames)
