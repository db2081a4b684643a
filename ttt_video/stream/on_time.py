"""A stream that has to be on time: frames come at a fixed rate, and the world does not wait.

Scores of single frames ignore when a prediction is ready. Here, as in streaming average precision
(sAP; Li et al., Towards Streaming Perception, ECCV 2020), each frame has a deadline, which is the
moment when it comes, and the newest prediction that is finished by then is what counts for it. So
even a fast method answers with the frame before. A frame that comes while the loop is busy is
dropped as soon as a newer one is there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from ..adaptation import Adapter, SlidingWindow, Wrapper
from ..data.pictures import Picture
from ..errors import UserError
from ..structures import Frame
from ..tasks import Shared
from .budget import AroundStream, BudgetedStream
from .clock import Clock, SimulatedClock
from .results import FrameResult, OnTime
from .stage_times import stage_times

if TYPE_CHECKING:
    from .loop import Stream


logger = logging.getLogger(__name__)


def on_machine_time(cfg: CfgNode) -> str:
    """Returns the key because of which a run depends on how fast its machine is; "" for none.

    Such a run cannot be repeated or gone on with, and its videos cannot run at once.
    """
    if cfg.TTT.CLOCK.PROFILE:
        return ""
    keys = {"TTT.FRAME_BUDGET_MS": cfg.TTT.FRAME_BUDGET_MS, "TTT.CLOCK.FPS": cfg.TTT.CLOCK.FPS}
    return next((key for key, value in keys.items() if value), "")


def simulate(stream: Stream, cfg: CfgNode, method: str) -> None:
    """Gives a stream the simulated clock of ``TTT.CLOCK.PROFILE``, seeded by ``SEED``.

    Raises:
        UserError: the profile has no seconds of this method and model.
    """
    method = stream.adapter.timed_as or method
    times = stage_times(cfg, method)
    if times.apart:
        logger.warning(
            "profile %s has the seconds of %s with %s", cfg.TTT.CLOCK.PROFILE, method, times.apart
        )
    clock = SimulatedClock(times, max(cfg.SEED, 0))
    stream.clock = clock
    _time_pushes(stream.window, clock)
    stream.adapter = _TimedAdapter(stream.adapter, clock)


def _time_pushes(window: SlidingWindow, clock: SimulatedClock) -> None:
    """Has a window tell a clock of each frame that is pushed; its kind and its state stay."""
    push = window.push

    def timed(frame: Any) -> dict[str, Any]:
        clock.times.check_size(frame)
        sample = push(frame)
        clock.spend("decode", frame)  # from here on, a frame budget pays for the frame
        clock.spend("push", frame)
        return sample

    window.push = timed  # type: ignore[method-assign]


class _TimedAdapter(Wrapper):
    """Tells a clock of each update and prediction.

    A method with ``timed_as`` may predict in an update, and need not in :meth:`predict`.
    """

    def __init__(self, inner: Adapter, clock: Clock) -> None:
        super().__init__(inner)
        self.clock = clock
        self._predictions = 0
        if self.timed_as:
            inner.model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._predictions += 1

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        window.drawn = self._predictions = 0
        record = super().adapt(window, generator)
        if window.drawn if self.timed_as else self.updates:
            self.clock.spend("step", window.current, window.drawn)
        self._spend_predictions(window.current, self._predictions)
        return record

    def predict(self, frame: Any) -> dict[str, Any]:
        before = self._predictions
        output = self.inner.predict(frame)
        made = self._predictions - before if self.timed_as else 1
        self._predictions = before  # an observer of steps may predict within an update
        self._spend_predictions(frame, made)
        return output

    def _spend_predictions(self, frame: Any, number: int) -> None:
        for _ in range(number):
            self.clock.spend("predict", frame)


@dataclass
class _Prediction:
    """A prediction and the moment, in ns since the video's start, when it is finished."""

    finished: int
    frame_index: int
    output: Mapping[str, Any]


def _ns(seconds: float) -> int:
    """Rounds to ns, in which 3 times 0.1 s are 0.3 s."""
    return round(seconds * 1e9)


class OnTimeStream(AroundStream):
    """A stream of frames that come at a fixed rate; it runs and saves its state as a ``Stream``.

    Frame i comes at i / fps, counted from 0 in each video. The loop takes the newest frame once it
    is free, waits for one if it has seen that, and drops those before. Every frame has a result; a
    dropped one has no update and the output of the frame that was taken before it.
    :attr:`FrameResult.on_time` says what counts for it at its deadline.

    Attributes:
        adapter: the stream's.
        clock: the stream's.
    """

    stream: Stream | BudgetedStream

    def __init__(self, stream: Stream | BudgetedStream, fps: float) -> None:
        """
        Args:
            stream: runs the frames that are taken.
            fps: frames per second, above 0.

        Raises:
            UserError: the method is offline.
        """
        if stream.adapter.offline:
            raise UserError(
                "TTT.CLOCK.FPS is set, but an offline method has seen the whole video before its "
                "first frame: set it to 0, or choose another --method"
            )
        self.stream, self.adapter, self.clock = stream, stream.adapter, stream.clock
        self.fps = fps
        self._meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext
        if isinstance(stream, BudgetedStream):
            self._meanwhile = stream.meanwhile
        self._predictions: list[_Prediction] = []  # from the one that counts to the last one
        self._origin = 0.0
        self._taken = -1

    def start_video(self, video_id: str, video: Iterable[Frame | Picture] | None = None) -> None:
        """See :meth:`Stream.start_video`; its first frame comes now."""
        self.clock.restart()
        self._predictions, self._taken = [], -1
        self.stream.start_video(video_id, video)
        self._origin = self.clock()

    def step(self, picture: Frame | Picture) -> FrameResult:
        """Takes a frame or drops it; see the class."""
        frame = self.innermost.frame_of(_with_index(picture))
        if frame["video_id"] != self.video_id:
            self.start_video(frame["video_id"])
        index = frame["frame_index"]
        comes, next_comes = _ns(index / self.fps), _ns((index + 1) / self.fps)
        counts = self._newest(comes)
        if self._predictions and _ns(self.clock() - self._origin) >= next_comes:
            output = self._predictions[-1].output
            return FrameResult(frame, output, on_time=_on_time(index, counts, dropped=True))
        self.clock.wait_until(self._origin + index / self.fps)
        start = self.clock() - self._origin
        result = self.stream.step(_after(frame, index - self._taken - 1))
        with self._meanwhile():
            self.clock.spend("others", frame)
        result.output = Shared.of(result.output)
        finished = _ns(start + result.ready_seconds)
        self._taken = index
        self._predictions.append(_Prediction(finished, index, result.output))
        counts = self._newest(comes)  # its own, where it took no time
        latency = (finished - comes) / 1e9
        result.on_time = _on_time(index, counts, latency_seconds=latency)
        return result

    def _newest(self, deadline: int) -> _Prediction | None:
        """Returns the newest prediction that is finished; older ones are forgotten."""
        done = [p for p in self._predictions if p.finished <= deadline]
        if not done:
            return None
        self._predictions = self._predictions[len(done) - 1 :]
        return done[-1]

    def run(self, source: Iterable[Frame | Picture], *, anew: bool = True) -> Iterator[FrameResult]:
        """See :meth:`Stream.run`."""
        for frame in self.innermost.frames_of(map(_with_index, source), anew=anew):
            result = self.step(frame)
            with self._meanwhile():
                yield result
            del result  # the caller decides how long it lives

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Stream.state_dict`; it has the predictions that may still count."""
        own: dict[str, Any] = {"taken": self._taken, "origin": self._origin}
        if isinstance(self.clock, SimulatedClock):
            own["clock"] = self.clock.state_dict()
        own["predictions"] = [
            (p.finished, p.frame_index, _packed(p.output)) for p in self._predictions
        ]
        return {**self.stream.state_dict(), "on_time": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Stream.load_state_dict`."""
        self.stream.load_state_dict(state)
        own = state["on_time"]
        self._taken, self._origin = own["taken"], own["origin"]
        if isinstance(self.clock, SimulatedClock):
            self.clock.load_state_dict(own["clock"])
        self._predictions = [
            _Prediction(finished, index, Shared(_unpacked(output)))
            for finished, index, output in own["predictions"]
        ]


def _with_index(picture: Frame | Picture) -> Frame:
    """Returns a frame as it is.

    Raises:
        UserError: it is a picture, of which nobody knows when it came.
    """
    if isinstance(picture, Mapping):
        return cast(Frame, picture)
    raise UserError(
        "with TTT.CLOCK.FPS a stream takes frames of a source, which have a frame_index, and no "
        f"{type(picture).__name__}: set it to 0, or use ttt_video.data.sources"
    )


def _on_time(index: int, counts: _Prediction | None, **more: Any) -> OnTime:
    """Says what counts for a frame."""
    if counts is None:
        return OnTime(None, None, **more)
    return OnTime(counts.output, index - counts.frame_index, **more)


def _after(frame: Frame, dropped: int) -> Frame:
    """Returns the frame with the number of frames that were dropped before it."""
    if not dropped:
        return frame
    told = {**frame, "dropped": dropped}
    return cast(Frame, Shared(told) if isinstance(frame, Shared) else told)


def _packed(output: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an output as a state has it: instances become tensors by name."""
    plain: dict[str, Any] = {}
    for key, value in output.items():
        if isinstance(value, Instances):
            fields = {k: getattr(v, "tensor", v) for k, v in value.get_fields().items()}
            plain[key] = {"image_size": tuple(value.image_size), "fields": fields}
        else:
            plain[key] = value
    return plain


def _unpacked(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the output of :func:`_packed`."""
    output = dict(plain)
    for key, value in plain.items():
        if isinstance(value, dict) and value.keys() == {"image_size", "fields"}:
            fields = {k: Boxes(v) if k == "pred_boxes" else v for k, v in value["fields"].items()}
            output[key] = Instances(value["image_size"], **fields)
    return output
