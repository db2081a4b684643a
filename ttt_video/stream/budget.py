"""A frame budget (``TTT.FRAME_BUDGET_MS``): the loop keeps up with a camera.

The camera gives a frame every T seconds. The frames of a recording wait until the loop takes them
up; a live camera drops those for which the loop comes too late, and their time with them. Each
frame that is taken up is predicted; what gives way is the step, and :meth:`FrameBudget.max_samples`
is the one place where that is decided. :class:`BudgetedStream` is a stream that obeys it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch

from ..adaptation import Adapter, LimitedWindow, SlidingWindow, Wrapper
from ..data.pictures import Picture
from ..errors import UserError
from ..structures import Frame
from .clock import Clock
from .results import FrameResult

if TYPE_CHECKING:
    from .loop import Stream

logger = logging.getLogger(__name__)

MEMORY = 7
"""Frames that an estimate is the median of: a slow one moves none, and that the machine has become
slower is noticed after four."""

SPARE = 0.05
"""Share of the budget that is left free: times vary, and a step that just fits is late every other
time."""

DOUBT = 0.9
"""See :meth:`FrameBudget.max_samples`."""


class FrameBudget:
    """Says how many samples the step of each frame may have. It is told all times, and reads none.

    Attributes:
        seconds: T, from one frame of the camera to the next.
        behind: seconds from the arrival of the current frame to the loop's taking it up; the debt
            of the frames before it. A loop that is early waits, so nothing is ever saved up.
        spent: seconds from the current frame's arrival to the end of what is done.
    """

    def __init__(self, seconds: float) -> None:
        if not seconds > 0:
            raise ValueError(f"a frame budget is a positive number of seconds, not {seconds}")
        self.seconds = seconds
        self.behind = 0.0
        self.spent = 0.0
        self._predict: deque[float] = deque(maxlen=MEMORY)
        self._other: deque[float] = deque(maxlen=MEMORY)
        self._sample: deque[float] = deque(maxlen=MEMORY)
        self._other_now = 0.0
        self._trust = 1.0
        self._warned = False
        self._draws = False  # whether any update has drawn samples

    def start_video(self) -> None:
        """The camera starts anew: no debt. What is known of the machine stays known."""
        self.behind = self.spent = self._other_now = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Returns all that it knows, for a clock that shows the same in another run."""
        known = {name: list(own) for name, own in self._known().items()}
        return {
            **known,
            "numbers": [self.behind, self.spent, self._other_now, self._trust],
            "flags": [self._warned, self._draws],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Knows what it knew when ``state`` was taken, and nothing else."""
        for name, own in self._known().items():
            own.clear()
            own.extend(state[name])
        self.behind, self.spent, self._other_now, self._trust = state["numbers"]
        self._warned, self._draws = state["flags"]

    def _known(self) -> dict[str, deque[float]]:
        return {"predict": self._predict, "other": self._other, "sample": self._sample}

    def take_frame(self, dropped: int = 0) -> None:
        """The next frame has arrived, T seconds after the one before, and is taken up.

        Args:
            dropped: pictures that the camera gave since the frame before, and that nobody saw: each
                of them came T seconds after the other, and no debt is left of that time.
        """
        if self._predict:
            self._other.append(self._other_now)
        self._other_now = 0.0
        self.behind = max(0.0, self.spent - (1 + dropped) * self.seconds)
        self.spent = self.behind

    def max_samples(self) -> int:
        """The largest number of samples that this frame's step may have; 0 for no step.

        It is what there is room for once the debt and the prediction are paid, by the medians of
        the last frames. As long as nothing is known a frame is predicted only, and the first step
        has one sample. The fixed cost of a step counts as its samples', so that a small step looks
        dearer than it is: steps come to what there is room for from below, if not all the way.

        An estimate that allows no step would never be measured again, though it may be of a slow
        moment such as the first step on a GPU. So it loses a tenth with every frame that owes
        nothing, until a step of one sample is tried; where that is indeed longer than the room,
        such a step once in a while is what the budget allows, and the next frames pay for it.
        """
        if not self._predict:
            return 0
        predict, other = median_low(self._predict), median_low(self._other or [0.0])
        room = (1 - SPARE) * self.seconds - predict - other
        if room <= 0:
            self._warn(predict, other)
            return 0
        if not self._sample:
            return int(self.behind < room)
        sample = max(median_low(self._sample) * self._trust, 1e-9)
        count = max(int((room - self.behind) / sample), 0)
        if count == 0 and self.behind == 0:
            self._trust *= DOUBT
        return count

    def predicted(self, seconds: float) -> None:
        """The current frame's prediction took so long."""
        self._predict.append(seconds)
        self.spent += seconds

    def updated(self, seconds: float, samples: int) -> None:
        """The current frame's update took so long, with so many samples in each of its steps.

        An update that draws no samples is all or nothing: it counts as one. If others of the
        method have drawn some, this one was a rest, and says nothing of what a sample takes.
        """
        self._draws = self._draws or samples > 0
        if samples or not self._draws:
            self._sample.append(seconds / max(samples, 1))
            self._trust = 1.0
        self.spent += seconds

    def did_else(self, seconds: float) -> None:
        """What else the loop did for the current frame took so long."""
        self._other_now += seconds
        self.spent += seconds

    def is_late(self, seconds: float) -> bool:
        """Whether the next frame was there before the current one's prediction.

        Args:
            seconds: from taking up the frame to its prediction.
        """
        return self.behind + seconds > self.seconds

    def _warn(self, predict: float, other: float) -> None:
        if self._warned or len(self._predict) < MEMORY:  # the first frames are often slow
            return
        self._warned = True
        total = 1000 * (predict + other)
        logger.warning(
            "TTT.FRAME_BUDGET_MS is %.0f, but a frame without any update takes %.0f ms (%.0f of "
            "them its prediction): all updates are skipped. Set it well above %.0f, or have the "
            "model see smaller frames (INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST)",
            1000 * self.seconds,
            total,
            1000 * predict,
            total,
        )


class _LimitedAdapter(Wrapper):
    """Takes the steps that a budget allows: shorter ones, or none."""

    def __init__(self, inner: Adapter, budget: FrameBudget, clock: Clock) -> None:
        super().__init__(inner)
        self.budget = budget
        self.clock = clock

    def adapt(self, window: SlidingWindow, generator: torch.Generator) -> dict[str, float]:
        """Returns the update's record, and what the budget did to it."""
        if not self.updates:
            return self.inner.adapt(window, generator)
        limit = self.budget.max_samples()
        limited = LimitedWindow(window, limit)
        record: dict[str, float] = {}
        if limit:
            record, seconds = self.clock.time(self.inner.adapt, limited, generator)
            self.budget.updated(seconds, limited.drawn)
        return {
            **record,
            "step_samples": limited.drawn,
            "skipped_updates": int(limit == 0),
            "shrunk_updates": int(limited.drawn < limited.asked),
        }


class AroundStream:
    """A stream around another, with what it shows of that one.

    Attributes:
        stream: the one within, which may be around another itself.
    """

    stream: Stream | AroundStream

    @property
    def innermost(self) -> Stream:
        """The stream that is around no other."""
        within = self.stream
        return within.innermost if isinstance(within, AroundStream) else within

    @property
    def video_id(self) -> str | None:
        """See :class:`Stream`."""
        return self.innermost.video_id

    @property
    def window(self) -> SlidingWindow:
        """See :class:`Stream`."""
        return self.innermost.window

    @property
    def learning(self) -> bool:
        """See :class:`Stream`; it may be set at any time."""
        return self.innermost.learning

    @learning.setter
    def learning(self, value: bool) -> None:
        self.innermost.learning = value

    def forget(self) -> None:
        """See :meth:`Stream.forget`."""
        self.innermost.forget()


class BudgetedStream(AroundStream):
    """A stream within a frame budget: it runs, steps and saves its state as a ``Stream`` does.

    Every record has more: ``step_samples`` (samples of each step; 0: none), ``skipped_updates`` and
    ``shrunk_updates`` (1 or 0: the budget did so), ``late_frames`` (1 or 0: the prediction came
    after the next frame) and ``behind_seconds`` (:attr:`FrameBudget.behind`).

    The budget pays for :meth:`step` and for what the caller of :meth:`run` does with a result. It
    does not pay for waiting for the next frame, nor for what is done while :attr:`clock` is paused.

    Attributes:
        adapter: the stream's, without the limits.
        clock: the stream's.
    """

    stream: Stream

    def __init__(self, stream: Stream, seconds: float) -> None:
        """
        Args:
            stream: from now on its adapter is limited.
            seconds: from one frame of the camera to the next.

        Raises:
            UserError: the method is offline.
        """
        if stream.adapter.offline:
            raise UserError(
                "TTT.FRAME_BUDGET_MS is set, but an offline method learns before a video's first "
                "frame and takes no steps that could be made shorter: set it to 0, or choose "
                "another --method"
            )
        self.stream, self.adapter = stream, stream.adapter
        self.clock = stream.clock
        self.budget = FrameBudget(seconds)
        stream.adapter = _LimitedAdapter(stream.adapter, self.budget, self.clock)

    def start_video(self, video_id: str, video: Iterable[Frame | Picture] | None = None) -> None:
        """See :meth:`Stream.start_video`; nothing is owed for the video before.

        By a clock that repeats, nothing is known from it either, so that no video depends on which
        ones the same process ran before.
        """
        self.budget.start_video()
        if self.clock.repeats:
            self.budget.load_state_dict(FrameBudget(self.budget.seconds).state_dict())
        self.stream.start_video(video_id, video)

    def step(self, picture: Frame | Picture) -> FrameResult:
        """See :meth:`Stream.step`."""
        frame = self.stream.frame_of(picture)
        if frame["video_id"] != self.stream.video_id:
            self.start_video(frame["video_id"])
        budget = self.budget
        budget.take_frame(frame.get("dropped", 0))
        start, spent = self.clock(), budget.spent
        result = self.stream.step(frame)
        budget.predicted(result.predict_seconds)
        record = {
            **dict.fromkeys(("step_samples", "skipped_updates", "shrunk_updates"), 0),
            **result.record,
            "late_frames": int(budget.is_late(result.ready_seconds)),
            "behind_seconds": budget.behind,
        }
        budget.did_else(self.clock() - start - (budget.spent - spent))
        return replace(result, record=record)

    def run(self, source: Iterable[Frame | Picture], *, anew: bool = True) -> Iterator[FrameResult]:
        """See :meth:`Stream.run`."""
        for frame in self.stream.frames_of(source, anew=anew):
            result = self.step(frame)
            with self.meanwhile():
                yield result
            del result  # the caller decides how long it lives

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Has the budget pay for what is done in the block, between two steps."""
        start = self.clock()
        yield
        self.budget.did_else(self.clock() - start)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`Stream.state_dict`.

        What is known of a machine's speed is saved only of a simulated one.
        """
        own = {"budget": self.budget.state_dict()} if self.clock.repeats else {}
        return {**self.stream.state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See :meth:`Stream.load_state_dict`."""
        self.stream.load_state_dict(state)
        if self.clock.repeats:
            self.budget.load_state_dict(state["budget"])
