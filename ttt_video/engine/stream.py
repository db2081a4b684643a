"""The loop over a video: push the frame, adapt on the window, predict; in that order by default."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..adaptation import Adapter, SlidingWindow, build_adapter
from ..errors import UserError


@dataclass
class FrameResult:
    """What one frame gave.

    Attributes:
        frame: the frame, labels included, for evaluators.
        output: detectron2's outputs, by the weights after this frame's update unless
            ``TTT.PREDICT`` is "before".
        record: scalars of the update, such as ``loss_recon``; empty for a frame without one.
        adapt_seconds: wall time of the update; that of a video's first frame has with it what an
            offline method spent on the video before. predict_seconds: of the prediction.
    """

    frame: Any
    output: dict[str, Any]
    record: dict[str, float] = field(default_factory=dict)
    adapt_seconds: float = 0.0
    predict_seconds: float = 0.0


def video_seed(seed: int, video_id: str) -> int:
    """A seed for one video, whatever videos come before it."""
    digest = hashlib.sha256(f"{seed}/{video_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


class StreamRunner:
    """Runs one adapter over videos. All state of a stream is here and in the adapter."""

    def __init__(
        self,
        adapter: Adapter,
        window: SlidingWindow,
        *,
        reset: str = "video",
        update_every: int = 1,
        predict: str = "after",
        seed: int = 0,
    ) -> None:
        """
        Args:
            adapter: around the model with its source weights.
            window: explicit memory.
            reset: back to the source weights before every "frame", at every new "video", or
                "never". The window is emptied at every new video unless "never".
            update_every: n adapts at a video's first frame and every n-th after it; all frames
                enter the window and are predicted.
            predict: a frame "after" the update it takes part in, or "before" it.
            seed: with the video's id (and the frame's index, where every frame is reset) it
                decides every random draw.
        """
        if reset not in ("frame", "video", "never"):
            raise ValueError(f"no reset {reset!r}; frame, video or never")
        if predict not in ("after", "before"):
            raise ValueError(f"no place {predict!r} for the prediction; after or before")
        self.adapter = adapter
        self.window = window
        self.reset = reset
        self.update_every = update_every
        self.predict_first = predict == "before"
        self.seed = seed
        self.generator = torch.Generator()
        self._video_id: str | None = None
        self._position = 0
        self._watch_seconds = 0.0

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> StreamRunner:
        """Reads ``TTT.*`` and ``SEED`` (negative counts as 0)."""
        device: torch.device = model.device  # type: ignore[assignment]
        return cls(
            build_adapter(cfg, model),
            SlidingWindow(cfg.TTT.WINDOW_SIZE or None, device),
            reset=cfg.TTT.RESET,
            update_every=cfg.TTT.UPDATE_EVERY,
            predict=cfg.TTT.PREDICT,
            seed=max(cfg.SEED, 0),
        )

    def start_video(self, video_id: str, video: Iterable[Any] | None = None) -> None:
        """Begins a video as an independent unit; :meth:`step` calls it when the id changes.

        Args:
            video_id: of the video.
            video: all of its frames, to be iterated as often as needed, for offline methods.

        Raises:
            UserError: the method is offline and there is no such ``video``.
        """
        self._video_id = video_id
        self._position = 0
        self.generator.manual_seed(video_seed(self.seed, video_id))
        if self.reset != "never":
            self.window.clear()
            self.adapter.reset()
        if not self.adapter.offline:
            return
        if video is None or isinstance(video, Iterator):
            raise UserError(
                "an offline method needs the whole video before its first prediction: give a "
                "folder, a video file or a data set, not a live stream"
            )
        start = self.now()
        self.adapter.watch(video, self.generator)
        self._watch_seconds = self.now() - start

    def step(self, frame: Any) -> FrameResult:
        """Adapts on the window that ends with this frame, then predicts this frame."""
        if frame["video_id"] != self._video_id:
            self.start_video(frame["video_id"])
        start = self.now()
        sample = self.window.push(frame)
        if self.reset == "frame":
            self.adapter.reset_weights()
            # A frame that remembers no other has draws of its own, wherever it comes in the stream.
            name = f"{frame['video_id']}/{frame['frame_index']}"
            self.generator.manual_seed(video_seed(self.seed, name))
        pushed = self.now()
        output = self.adapter.predict(sample) if self.predict_first else {}
        predicted = self.now()
        record: dict[str, float] = {}
        if self._position % self.update_every == 0:
            record = self.adapter.adapt(self.window, self.generator)
        adapted = self.now()
        if not self.predict_first:
            output = self.adapter.predict(sample)
        predict_seconds = self.now() - adapted + predicted - pushed
        adapt_seconds = adapted - predicted + pushed - start + self._watch_seconds
        self._watch_seconds = 0.0
        self._position += 1
        return FrameResult(frame, output, record, adapt_seconds, predict_seconds)

    def run(self, source: Iterable[Any]) -> Iterator[FrameResult]:
        """Results of a video's frames, one for each, in order, as they happen.

        Running a video always starts it anew, even when it is the one that ran last.
        """
        self._video_id = None
        for frame in source:
            if frame["video_id"] != self._video_id:
                self.start_video(frame["video_id"], source)
            yield self.step(frame)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, between two frames: all that later results depend on.

        Returns:
            ``video_id`` of the current video, ``position`` (number of its frames that were run),
            ``generator``, ``window``, ``adapter``; see :meth:`Adapter.state_dict`.
        """
        return {
            "video_id": self._video_id,
            "position": self._position,
            "generator": self.generator.get_state(),
            "window": self.window.state_dict(),
            "adapter": self.adapter.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken: the next :meth:`step` gives the same, bit for bit."""
        self._video_id = state["video_id"]
        self._position = state["position"]
        self.generator.set_state(state["generator"].cpu())
        self.window.load_state_dict(state["window"])
        self.adapter.load_state_dict(state["adapter"])

    def now(self) -> float:
        """Seconds on a clock that waits for the device's work."""
        if self.window.device.type == "cuda":
            torch.cuda.synchronize(self.window.device)
        return time.perf_counter()
