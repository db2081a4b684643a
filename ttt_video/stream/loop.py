"""The loop over a video: push the frame, adapt on the window, predict; in that order by default."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from ..adaptation import Adapter, SlidingWindow, build_adapter
from ..errors import UserError
from .budget import FrameBudget


@dataclass
class FrameResult:
    """What one frame gave.

    Attributes:
        frame: the frame, labels included, for evaluators.
        output: detectron2's outputs, by the weights after this frame's update unless
            ``TTT.PREDICT`` is "before".
        record: scalars of the update, such as ``loss_recon``; empty for a frame without one. With a
            frame budget also ``step_samples`` (of each step; 0: none), ``skipped_updates`` and
            ``shrunk_updates`` (1 or 0: the budget did so), ``late_frames`` (1 or 0: the prediction
            came after the next frame) and ``behind_seconds`` (see :class:`FrameBudget`).
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
        budget: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
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
            budget: seconds per frame that the loop keeps up with (:class:`FrameBudget`); 0: none.
            clock: gives seconds.

        Raises:
            UserError: the method is offline, and there is a budget.
        """
        if reset not in ("frame", "video", "never"):
            raise ValueError(f"no reset {reset!r}; frame, video or never")
        if predict not in ("after", "before"):
            raise ValueError(f"no place {predict!r} for the prediction; after or before")
        if budget and adapter.offline:
            raise UserError(
                "TTT.FRAME_BUDGET_MS is set, but an offline method learns before a video's first "
                "frame and takes no steps that could be made shorter: set it to 0, or choose "
                "another --method"
            )
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
        self.budget = FrameBudget(budget) if budget else None
        self._clock = clock
        self._stepped = 0.0  # when the last step ended, on a clock that stops off_the_clock()

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
            budget=cfg.TTT.FRAME_BUDGET_MS / 1000,
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
        if self.budget is not None:
            self.budget.start_video()
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
        if self.budget is not None:
            self.budget.take_frame(frame.get("dropped", 0))
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
            record = self._update()
        adapted = self.now()
        if not self.predict_first:
            output = self.adapter.predict(sample)
        end = self.now()
        predict_seconds = end - adapted + predicted - pushed
        adapt_seconds = adapted - predicted + pushed - start + self._watch_seconds
        self._watch_seconds = 0.0
        self._position += 1
        if self.budget is not None:
            ready = (predicted if self.predict_first else end) - start
            record = {
                **dict.fromkeys(("step_samples", "skipped_updates", "shrunk_updates"), 0),
                **record,
                "late_frames": int(self.budget.is_late(ready)),
                "behind_seconds": self.budget.behind,
            }
            self.budget.predicted(predict_seconds)
            self.budget.did_else(pushed - start)
            self._stepped = end
        return FrameResult(frame, output, record, adapt_seconds, predict_seconds)

    def _update(self) -> dict[str, float]:
        """The frame's update, or as much of it as the budget has room for."""
        budget, window = self.budget, self.window
        if budget is None or not self.adapter.updates:
            return self.adapter.adapt(window, self.generator)
        record: dict[str, float] = {}
        window.asked = window.drawn = 0
        limit = window.max_samples = budget.max_samples()
        if limit:
            start = self.now()
            record = self.adapter.adapt(window, self.generator)
            budget.updated(self.now() - start, window.drawn)
        window.max_samples = None
        return {
            **record,
            "step_samples": window.drawn,
            "skipped_updates": int(limit == 0),
            "shrunk_updates": int(window.drawn < window.asked),
        }

    def paced(self, frames: Iterable[Any]) -> Iterator[Any]:
        """The frames as they are; what the caller does between two of them is on the budget.

        Waiting for the next one is not, nor is what is done :meth:`off_the_clock`.
        """
        for frame in frames:
            yield frame
            if self.budget is not None:
                self.budget.did_else(self.now() - self._stepped)

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """For what measures a stream and would not be there without the measurement."""
        if self.budget is None:
            yield
            return
        start = self.now()
        yield
        self._stepped += self.now() - start

    def run(self, source: Iterable[Any]) -> Iterator[FrameResult]:
        """Results of a video's frames, one for each, in order, as they happen.

        Running a video always starts it anew, even when it is the one that ran last. What the
        caller does with a result is on the frame budget (:meth:`paced`).
        """
        self._video_id = None
        for frame in self.paced(source):
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
        return self._clock()
