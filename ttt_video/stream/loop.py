"""The loop over a video: push the frame, adapt on the window, predict; in that order by default."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import chain
from os import PathLike, fspath
from typing import Any, ParamSpec, TypeVar, cast

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..adaptation import Adapter, SlidingWindow, build_adapter, build_window
from ..config import DEFAULT_STREAM_CONFIG, check_device, key_values, load_config
from ..data.pictures import Picture, PictureFrames, PictureVideo
from ..errors import UserError
from ..structures import Frame, FrameSource, StepResult, video_seed
from .budget import BudgetedStream
from .clock import Clock
from .on_time import OnTimeStream, simulate
from .results import FrameResult
from .source_model import config_of_weights, load_source_model

P = ParamSpec("P")
R = TypeVar("R")

StepRecorder = Callable[[Frame, Mapping[str, Any], dict[str, float]], Any]
"""Returns what is to be kept of a gradient step: of the frame with its labels, the prediction after
the step, and the step's scalars."""


def with_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """Has a function learn although its caller has switched gradients off.

    Under ``torch.no_grad()`` a step would have no gradient, and move nothing without a word; under
    ``torch.inference_mode()`` no tensor made there can be learned from.
    """

    @wraps(function)
    def learning(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return function(*args, **kwargs)

    return learning


def _learnable(frame: Frame) -> Frame:
    """Returns a frame without tensors that were made under ``torch.inference_mode()``."""
    if not any(isinstance(v, Tensor) and v.is_inference() for v in frame.values()):
        return frame
    return cast(Frame, {k: v.clone() if isinstance(v, Tensor) else v for k, v in frame.items()})


def keep_step(frame: Frame, output: Mapping[str, Any], record: dict[str, float]) -> StepResult:
    """Keeps the whole prediction."""
    return StepResult(record, output)


class Stream:
    """Runs one adapter over videos; all state of a stream is here and in the adapter::

        for result in Stream.from_pretrained("quick/stream_world").run(frames):
            print(result.loss, result.labels.shape)

    :meth:`from_config` and :meth:`from_pretrained` make streams that take pictures as well as
    frames: (H, W, 3) uint8 arrays and Pillow images.

    Attributes:
        learning: False has frames only predicted, with the weights as they are. It may be set
            between two frames, and is no part of a state.
    """

    def __init__(
        self,
        adapter: Adapter,
        window: SlidingWindow,
        *,
        reset: str = "video",
        update_every: int = 1,
        predict: str = "after",
        seed: int = 0,
        clock: Clock | None = None,
        pictures: PictureFrames | None = None,
        record_step: StepRecorder | None = None,
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
            seed: decides every random draw, with the video's id (``reset`` "frame": the frame's).
            clock: times updates and predictions; by default a clock of the window's device.
            pictures: makes frames of pictures; None takes frames alone.
            record_step: is called after each gradient step, with the prediction by the weights
                after it, for :attr:`FrameResult.steps`. It costs a prediction for each step, which
                no clock counts, and changes no other result. None: there are no such predictions.
        """
        if reset not in ("frame", "video", "never"):
            raise ValueError(f"no reset {reset!r}; frame, video or never")
        if predict not in ("after", "before"):
            raise ValueError(f"no place {predict!r} for the prediction; after or before")
        self.adapter, self.window = adapter, window
        self.reset, self.update_every, self.seed = reset, update_every, seed
        self.predict_first = predict == "before"
        self.clock, self.generator = clock or Clock(window.device), torch.Generator()
        self.pictures = pictures
        self.record_step = record_step
        self.learning = True
        self.video_id: str | None = None  # of the video that runs
        self._position, self._watch_seconds = 0, 0.0

    @classmethod
    @with_gradients
    def from_pretrained(
        cls,
        config: str | PathLike[str] | None = None,
        *,
        weights: str | PathLike[str] | None = None,
        method: str | None = None,
        preset: str | None = None,
        device: str | None = None,
        opts: Sequence[object] = (),
        color: str = "rgb",
    ) -> Stream | BudgetedStream | OnTimeStream:
        """Builds model and stream of a config, as ``tools/stream_eval.py`` does.

        Args:
            config: a config file, or the name of a shipped one, such as "quick/stream_world"; None:
                that in the weights (``--save-weights``), or else :data:`DEFAULT_STREAM_CONFIG`.
            weights: file of the source weights; None: those that the config names.
            method: adaptation method, such as "tent"; None: the config's.
            preset: settings to merge on top, such as "realtime".
            device: such as "cpu" or "cuda:1"; None: a GPU if there is one.
            opts: further keys and their values in turn: ["TTT.BATCH_SIZE", 8].
            color: the order of the channels of arrays, "rgb" or, as OpenCV gives them, "bgr".
                Pillow images say it themselves.

        Raises:
            UserError: there is no such config, method or device, or they do not fit each other; or
                the config wants frames in another order, which only a whole run can give.
        """
        given = {"MODEL.WEIGHTS": weights, "MODEL.DEVICE": device}
        overrides = key_values([*map(str, opts)])
        overrides |= {key: fspath(value) for key, value in given.items() if value}
        content = config_of_weights(weights) if config is None else fspath(config)
        cfg = load_config(
            content or DEFAULT_STREAM_CONFIG, preset, [*chain(*overrides.items())], method=method
        )
        check_device(cfg.MODEL.DEVICE)
        if cfg.TTT.FRAME_ORDER != "time":
            raise UserError(
                f"TTT.FRAME_ORDER is {cfg.TTT.FRAME_ORDER!r}, and a stream takes frames as they "
                "come: set it to 'time', and give run() a list in the order that you want"
            )
        return cls.from_config(cfg, load_source_model(cfg), color=color)

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        *,
        color: str = "rgb",
        record_step: StepRecorder = keep_step,
    ) -> Stream | BudgetedStream | OnTimeStream:
        """Builds the stream of ``TTT.*`` and ``SEED``.

        It is within a frame budget where one is set, and its frames do not wait where they have a
        rate (``TTT.CLOCK.FPS``).

        ``color`` is the order of the channels of arrays, "rgb" or "bgr"; frames have the config's.
        ``record_step`` is used with ``TTT.RECORD_STEPS``.

        Raises:
            UserError: the config or the model does not fit the method.
        """
        pictures = PictureFrames(cfg, color)
        ttt = cfg.TTT
        window = build_window(cfg, model.device)  # type: ignore[arg-type]
        settings = {"reset": ttt.RESET, "update_every": ttt.UPDATE_EVERY, "predict": ttt.PREDICT}
        settings["record_step"] = record_step if ttt.RECORD_STEPS else None
        adapter, seed = build_adapter(cfg, model), max(cfg.SEED, 0)
        stream = cls(adapter, window, seed=seed, pictures=pictures, **settings)
        if ttt.CLOCK.PROFILE:
            simulate(stream, cfg, ttt.METHOD)
        budget = ttt.FRAME_BUDGET_MS / 1000
        within = BudgetedStream(stream, budget) if budget else stream
        return OnTimeStream(within, ttt.CLOCK.FPS) if ttt.CLOCK.FPS else within

    @with_gradients
    def start_video(self, video_id: str, video: Iterable[Frame | Picture] | None = None) -> None:
        """Begins a video as an independent unit; :meth:`step` calls it when the id changes.

        An offline method needs ``video``: all frames, to be iterated as often as it likes. Pictures
        have no ids: call it where another video begins.

        Raises:
            UserError: the method is offline and there is no such ``video``.
        """
        self.video_id, self._position = video_id, 0
        self.generator.manual_seed(video_seed(self.seed, video_id))
        if self.reset != "never":
            self.forget()
        if self.adapter.offline:
            if video is None or isinstance(video, Iterator) or _is_live(video):
                raise UserError(
                    "an offline method needs the whole video before its first prediction: give a "
                    "folder, a video file or a data set, or in Python a list of frames, not a live "
                    "stream"
                )
            frames = PictureVideo(self.pictures, video, video_id) if self.pictures else video
            _, self._watch_seconds = self.clock.time(self.adapter.watch, frames, self.generator)

    def frame_of(self, picture: Frame | Picture) -> Frame:
        """Returns the frame of a picture, the next of the video that runs; a frame as it is.

        Raises:
            UserError: it is neither, or has another size than the frames before.
        """
        if self.pictures is None:
            if isinstance(picture, Mapping):
                return cast(Frame, picture)
            raise UserError(
                f"a frame is a dict (ttt_video.structures.Frame), not {type(picture).__name__}: "
                "streams of Stream.from_pretrained and Stream.from_config take pictures"
            )
        if self.video_id is None:
            return self.pictures(picture, "video", 0)
        return self.pictures(picture, self.video_id, self._position)

    def step(self, picture: Frame | Picture) -> FrameResult:
        """Adapts on the window that ends with this frame, then predicts this frame.

        A picture that is refused changes nothing. After any other exception, such as that of
        Ctrl-C, the frame may be in the window already: go on from a state, or begin the video anew.

        Args:
            picture: a frame, or a picture, which follows those before it.
        """
        return self.begin(picture)()

    @with_gradients
    def begin(self, picture: Frame | Picture) -> Callable[[], FrameResult]:
        """Does as :meth:`step`, without waiting for the last of the device's work.

        Returns:
            A function that waits for it and returns the result; any thread may call it, also while
            later frames run.
        """
        frame = self.frame_of(picture)
        if frame["video_id"] != self.video_id:
            self.start_video(frame["video_id"])
        sample, pushing = self.clock.follow(self._push, frame)
        if self.predict_first:
            output, predicting = self.clock.follow(self.adapter.predict, sample)
        steps: list[Any] = []
        with self._recording(frame, sample, steps):
            record, adapting = self.clock.follow(self._adapt)
        if not self.predict_first:
            output, predicting = self.clock.follow(self.adapter.predict, sample)
        watched = self._watch_seconds
        self._position, self._watch_seconds = self._position + 1, 0.0

        def result() -> FrameResult:
            push, adapt, predict = pushing(), adapting(), predicting()
            ready = push + predict + (0.0 if self.predict_first else adapt)
            seconds = (adapt + (push + watched), predict, ready)
            return FrameResult(frame, output, record, *seconds, steps)

        return result

    def _push(self, frame: Frame) -> dict[str, Any]:
        sample = self.window.push(_learnable(frame))
        if self.reset == "frame":
            self.adapter.reset_weights()
            # A frame that remembers no other has draws of its own, wherever it comes in the stream.
            name = f"{frame['video_id']}/{frame['frame_index']}"
            self.generator.manual_seed(video_seed(self.seed, name))
        return sample

    def _adapt(self) -> dict[str, float]:
        due = self.learning and self._position % self.update_every == 0
        return self.adapter.adapt(self.window, self.generator) if due else {}

    @contextmanager
    def _recording(self, frame: Frame, sample: Any, steps: list[Any]) -> Iterator[None]:
        """Fills ``steps`` with what :attr:`record_step` returns."""
        record_step = self.record_step
        if record_step is None:
            yield
            return

        def observe(adapter: Adapter, record: dict[str, float]) -> None:
            with self.clock.paused():
                steps.append(record_step(frame, adapter.predict(sample), record))

        self.adapter.observe_steps(observe)
        try:
            yield
        finally:
            self.adapter.observe_steps(None)

    def run(self, source: Iterable[Frame | Picture], *, anew: bool = True) -> Iterator[FrameResult]:
        """Yields the result of every frame, in order, as they happen.

        A video starts ``anew`` even when it is the one that ran last; otherwise the frames follow
        those that were run, as after :meth:`load_state_dict`.

        Args:
            source: frames, or pictures of one video, such as a list of arrays.
            anew: see above.

        Raises:
            UserError: an element is no picture, or nothing came of a video that starts anew.
        """
        for frame in self.frames_of(source, anew=anew):
            if frame["video_id"] != self.video_id:
                self.start_video(frame["video_id"], source)
            yield self.step(frame)

    def frames_of(self, source: Iterable[Frame | Picture], *, anew: bool) -> Iterator[Frame]:
        """Yields the frames of :meth:`run`, each as soon as the one before has been run."""
        self.video_id = None if anew else self.video_id
        empty = anew
        for picture in source:
            empty = False
            yield self.frame_of(picture)
        if empty:
            raise UserError("there are no frames: the iterable is empty, or was used up before")

    def forget(self) -> None:
        """Returns to the source weights and an empty window."""
        self.window.clear()
        self.adapter.reset()

    def state_dict(self) -> dict[str, Any]:
        """Returns all that later results depend on, between two frames; plain values, tensors.

        The tensors are the stream's own, which change as it goes on: write the state to a file, or
        keep a ``copy.deepcopy`` of it.
        """
        objects = {"window": self.window.state_dict(), "adapter": self.adapter.state_dict()}
        place = {"video_id": self.video_id, "position": self._position}
        return {**place, "generator": self.generator.get_state(), **objects}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where ``state`` was taken: the next :meth:`step` gives the same, bit for bit."""
        self.video_id, self._position = state["video_id"], state["position"]
        self.generator.set_state(state["generator"].cpu())
        self.window.load_state_dict(state["window"])
        self.adapter.load_state_dict(state["adapter"])


def _is_live(video: Iterable[Frame | Picture]) -> bool:
    return isinstance(video, FrameSource) and video.live
