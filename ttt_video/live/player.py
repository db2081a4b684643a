"""Runs a stream in a thread of its own, shows its frames, and does what a page asks for."""

from __future__ import annotations

import copy
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from detectron2.config import CfgNode
from torch import nn

from ..adaptation import SlidingWindow, build_adapter, method_names
from ..data.base import closing_frames
from ..errors import UserError
from ..stream import OverlayVideos, Results, Stream
from ..stream.budget import BudgetedStream
from ..stream.on_time import OnTimeStream
from ..structures import Frame, FrameSource
from ..tasks import Shared, differences
from ..tasks.classes import check_predicted_classes
from .saver import Saver
from .shown import Shown

MOMENTS = 8
"""Moments that are kept; each is as large as the window and the weights that moved."""

HISTORY = 600
"""Frames whose numbers a page gets that comes later."""

RECENT = 10
"""Frames over which frames per second are taken."""

_GLANCE = 0.05  # seconds between looks whether somebody else has done a command


@dataclass(frozen=True)
class Moment:
    """A state of the stream that was kept.

    Attributes:
        number: counts them from 1.
        label: says when it was.
        method, step_size: with which it learnt.
        state: of :meth:`ttt_video.stream.Stream.state_dict`, copied.
    """

    number: int
    label: str
    method: str
    step_size: float | None
    state: dict[str, Any]


class Player:
    """Runs videos through a stream and the frozen model beside it, in a thread of its own::

        player = Player(config, model, sources, folder)
        player.listen(on_frame, on_state)  # called in the player's thread; must return at once
        player.start()
        player.do("learn", False)          # between two frames; returns once it is done
        player.stop()

    Attributes:
        ended: set once no frame will come any more.
        error: what went wrong last, for the page.
        failure: what ended the stream, if it did not come to its end.
    """

    def __init__(
        self,
        config: Callable[[str | None], CfgNode],
        model: nn.Module,
        sources: Sequence[FrameSource],
        folder: Path,
    ) -> None:
        """
        Args:
            config: returns the resolved config of a method; None: of the one asked for at first.
            model: with the source weights, in eval mode; it stays so.
            sources: the videos, one after the other.
            folder: for saved predictions; it is made when there are any.

        Raises:
            UserError: the method does not fit the model, or needs whole videos, or the model
                predicts nothing that could be drawn.
        """
        self._config, self._source_model = config, model
        self.sources = sources
        cfg = config(None)
        check_predicted_classes(cfg, "")
        if cfg.TTT.FRAME_ORDER != "time":
            raise UserError(
                f"TTT.FRAME_ORDER is {cfg.TTT.FRAME_ORDER}; the live page takes time alone"
            )
        self.outputs = frozenset(getattr(model, "outputs", ()))
        if not self.outputs & {"sem_seg", "panoptic_seg", "instances", "color"}:
            raise UserError(
                "the live page draws classes of pixels, objects or colours, and this model "
                "predicts none of them: run ttt-video stream"
            )
        frozen = build_adapter(cfg, copy.deepcopy(model), "none")
        self.frozen = Stream(frozen, SlidingWindow(1, model.device))  # type: ignore[arg-type]
        self.painter = OverlayVideos(cfg, folder, single=True)
        self.step_size: float | None = None
        self._use(cfg)
        self.moments: list[Moment] = []
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY)
        self.ended, self.error = threading.Event(), ""
        self.failure: Exception | None = None
        self._kept = 0
        self._saver = Saver(cfg, self.outputs, folder, self._say)
        self._source: FrameSource | None = None  # the video that runs
        self._late = self._dropped = 0
        self._done_at: deque[float] = deque(maxlen=RECENT + 1)
        self._listeners: list[tuple[Callable[[Shown], None], Callable[[], None]]] = []
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._turn = threading.Lock()  # whoever has it may touch the stream
        self._going, self._stopping = threading.Event(), threading.Event()
        self._going.set()
        # A daemon, because a camera that hangs in a read would keep Python alive.
        self._thread = threading.Thread(target=self._run, name="live stream", daemon=True)

    def start(self) -> None:
        """Starts with the first video."""
        self._thread.start()

    def stop(self) -> None:
        """Ends after the current frame; saved files are whole."""
        self._stopping.set()
        self._going.set()
        if self._thread.ident is not None:  # it was started
            self._thread.join(timeout=10)
        with self._turn:
            self._saver.end()

    def listen(self, on_frame: Callable[[Shown], None], on_state: Callable[[], None]) -> None:
        """Has functions called with every frame, and when :meth:`state` has changed."""
        self._listeners.append((on_frame, on_state))

    def state(self) -> dict[str, Any]:
        """Returns what the page's controls show: JSON values."""
        saving = self._saver.folder
        return {
            "method": self.method,
            "methods": method_names(),
            "step_size": self.step_size,
            "learning": self.stream.learning,
            "paused": not self._going.is_set(),
            "saving": str(saving) if saving is not None else None,
            "moments": [{"number": m.number, "label": m.label} for m in self.moments],
            "ended": self.ended.is_set(),
            "error": self.error,
        }

    def do(self, name: str, value: Any = None) -> None:
        """Does a command of :data:`~ttt_video.live.commands.COMMANDS` between two frames.

        Any thread may call it; it returns when the command has been done.

        Raises:
            UserError: it cannot be done; everything is as before.
        """
        future: Future[None] = Future()
        action: Callable[..., None] = getattr(self, f"_{name}")
        self._jobs.put((action if value is None else partial(action, value), future))
        # The stream's thread does it before its next frame; if it waits for one, this thread does.
        while not future.done():
            if self._turn.acquire(timeout=_GLANCE):
                try:
                    self._do_jobs()
                finally:
                    self._turn.release()
        try:
            future.result()
        finally:
            self._tell()

    def _do_jobs(self) -> None:
        with suppress(queue.Empty):
            while True:
                action, future = self._jobs.get_nowait()
                try:
                    action()
                except Exception as error:  # noqa: BLE001 - raised where it was asked for
                    future.set_exception(error)
                else:
                    future.set_result(None)

    def _say(self, error: str) -> None:
        self.error = error
        self._tell()

    def _tell(self) -> None:
        for _, on_state in self._listeners:
            on_state()

    # ---- commands; each runs with the turn

    def _pause(self, value: bool) -> None:
        (self._going.clear if value else self._going.set)()

    def _learn(self, value: bool) -> None:
        self.stream.learning = value

    def _reset(self) -> None:
        self.stream.forget()

    def _keep(self) -> None:
        if len(self.moments) >= MOMENTS:
            del self.moments[0]
        self._kept += 1
        last = self.history[-1] if self.history else None
        label = f"{self._kept}: " + (f"frame {last['frame']}" if last else "start")
        state = copy.deepcopy(self.stream.state_dict())
        moment = Moment(self._kept, f"{label}, {self.method}", self.method, self.step_size, state)
        self.moments.append(moment)

    def _back(self, value: int) -> None:
        moment = next((m for m in self.moments if m.number == value), None)
        if moment is None:
            raise UserError(f"no moment {value} is kept")
        if moment.method != self.method:
            self._method(moment.method)
        # It goes on in the video that runs now: another id would begin a video anew.
        state = {**copy.deepcopy(moment.state), "video_id": self.stream.video_id}
        self.stream.load_state_dict(state)
        self.step_size = moment.step_size  # that of the state's optimizer

    def _method(self, value: str) -> None:
        video_id, learning = self.stream.video_id, self.stream.learning
        self._use(self._config(value))
        self.stream.learning = learning
        if video_id is not None:
            self.stream.start_video(video_id)

    def _step_size(self, value: float) -> None:
        optimizer = _optimizer(self.stream)
        if optimizer is None or not self.step_size:
            raise UserError(f"{self.method} has no step size that could be changed")
        if value <= 0:
            raise UserError("step_size is 0; give more, or have the model not learn")
        for group in optimizer.param_groups:
            group["lr"] *= value / self.step_size
        self.step_size = value

    def _save(self, value: bool) -> None:
        if value and self.ended.is_set():
            raise UserError("the stream has ended: there is nothing more to save")
        if value:
            self._saver.turn_on(self._source)
            self.error = ""
        else:
            self._saver.turn_off()

    # ---- the stream

    def _use(self, cfg: CfgNode) -> None:
        """Builds the stream of a config around the source weights."""
        stream = Stream.from_config(cfg, copy.deepcopy(self._source_model))
        if isinstance(stream, OnTimeStream):
            raise UserError("TTT.CLOCK.FPS is for recordings, which a page lets wait: set it to 0")
        if stream.adapter.offline:
            raise UserError(f"{cfg.TTT.METHOD} needs the whole video before its first prediction")
        self.cfg, self.stream, self.method = cfg, stream, str(cfg.TTT.METHOD)
        base = cfg.TTT.OPTIMIZER.BASE_LR
        self.step_size = None if _optimizer(stream) is None else float(base)
        self.painter.method = self.method

    def _run(self) -> None:
        try:
            for source in self.sources:
                if not self._stopping.is_set():
                    self._run_video(source)
        except Exception as error:  # noqa: BLE001 - raised where the stream was started
            self.failure = error
            self.error = str(error)
        finally:
            with self._turn:
                self._saver.end()
                self.ended.set()
            self._tell()

    def _run_video(self, source: FrameSource) -> None:
        frames = iter(source)
        with closing_frames(frames):
            with self._turn:
                self._source = source
                self.stream.start_video(source.video_id)
                self._saver.start_video(source)
            for frame in self._paced(frames, source):
                started = time.monotonic()
                with self._turn:
                    self._do_jobs()
                    shown = self._step(frame)
                self._count(shown, source, time.monotonic() - started)
                for on_frame, _ in self._listeners:
                    on_frame(shown)
            with self._turn:
                self._saver.end_video()

    def _paced(self, frames: Iterator[Frame], source: FrameSource) -> Iterator[Frame]:
        """Yields frames no faster than the video's own rate, and none while there is a pause."""
        interval = 1 / source.fps if source.fps and not source.live else 0.0
        due = time.monotonic()
        for frame in frames:
            self._stopping.wait(max(0.0, due - time.monotonic()))
            self._going.wait()
            if self._stopping.is_set():
                return
            due = max(due + interval, time.monotonic())
            yield frame

    def _step(self, frame: Frame) -> Shown:
        shared = cast(Frame, Shared(frame))
        adapted = self.stream.step(shared)
        adapted = replace(adapted, output=Shared(adapted.output))
        frozen = self.frozen.step(shared)
        frozen = replace(frozen, output=Shared(frozen.output))
        results = Results(adapted, frozen, {})
        self._saver.write(results)
        apart = differences(adapted.output, frozen.output)
        name, value = next(iter(apart.items()), ("", None))
        numbers = {
            "video": frame["video_id"],
            "frame": frame["frame_index"],
            "loss": adapted.record.get("loss_recon"),
            "shift": adapted.record.get("norm_shift"),
            "apart": value,
            "apart_is": name,
            "late": adapted.record.get("late_frames"),
            "dropped": frame.get("dropped", 0),
        }
        return Shown(numbers, *self.painter.pictures(results))

    def _count(self, shown: Shown, source: FrameSource, seconds: float) -> None:
        """Adds to a frame's numbers what depends on those before."""
        late = shown.numbers["late"]
        if late is None:  # no budget says it
            late = bool(source.fps) and seconds * (source.fps or 0.0) > 1
        self._late += int(late)
        self._dropped += shown.numbers["dropped"]
        self._done_at.append(time.monotonic())
        passed = self._done_at[-1] - self._done_at[0]
        rate = (len(self._done_at) - 1) / passed if passed > 0 else None
        shown.numbers.update(late=self._late, dropped=self._dropped, fps=rate)
        self.history.append(shown.numbers)


def _optimizer(stream: Stream | BudgetedStream) -> Any:
    """Returns the optimizer of a method that takes gradient steps; None of others."""
    adapter: Any = stream.adapter
    while hasattr(adapter, "inner"):
        adapter = adapter.inner
    return getattr(adapter, "optimizer", None)
