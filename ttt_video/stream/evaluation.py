"""What ``tools/stream_eval.py`` runs: videos through streams, results into sinks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import cast

import torch
from detectron2.config import CfgNode
from torch import nn

from ..adaptation import SlidingWindow, build_adapter
from ..data.base import closing_frames
from ..data.ordering import FirstFrames, in_order
from ..errors import UserError, ending_with
from ..files import save_torch, writing
from ..structures import Frame, FrameSource
from ..tasks import Shared
from ..tasks.classes import check_predicted_classes
from .clock import SimulatedClock
from .directory import Row
from .gaps import after_gap, last_frame, size_of
from .handover import Handover, HandoverBehind
from .loop import Stream
from .on_time import OnTimeStream, on_machine_time, simulate
from .records import finite
from .results import FrameResult
from .run import Settings, recorded
from .saved_state import UnusableState, read_state
from .sinks import Progress, Results, Rows, Scores, Sink, StepScores, VideoRun
from .streaming_scores import StreamingScores
from .summary import process_facts, source_facts

logger = logging.getLogger(__name__)


class StreamEvaluation:
    """Runs sources through streams into sinks, from saved states where there are any."""

    def __init__(self, settings: Settings, model: nn.Module) -> None:
        """
        Args:
            settings: of the run.
            model: source model of :func:`~ttt_video.stream.source_model.load_source_model`.

        Raises:
            UserError: the data set has other classes than the model, or the method does not fit.
        """
        self.settings = settings
        self.run, self.cfg = settings.run, settings.cfg
        check_predicted_classes(self.cfg, settings.dataset_name)
        check_sinks(settings.sinks, model)
        for sink in settings.sinks:
            sink.attach(model)
        self.builds_up = self.cfg.TTT.RESET == "never"  # each video on the one before
        self.source_facts = source_facts(model)
        self.device: torch.device = model.device  # type: ignore[assignment]
        behind = self.device.type == "cuda" if settings.behind is None else settings.behind
        # A frame budget pays for what sinks do, and a camera does not wait for it, so that they
        # have to do it in the loop. Networks describe colours, and whether a GPU multiplies in TF32
        # is one setting of all threads, which the loop changes.
        colors = "color" in getattr(model, "outputs", ())
        timed = self.cfg.TTT.FRAME_BUDGET_MS or self.cfg.TTT.CLOCK.FPS
        self.behind = behind and not timed and not colors
        self.frozen = frozen_stream(self.cfg, model) if settings.compare else None
        # A method that looks at labels has to score them as the run does.
        named = self.cfg.clone()
        named.defrost()
        named.DATASETS.TEST = (settings.dataset_name,) if settings.dataset_name else ()
        record_step = StepScores(self.cfg, settings.dataset_name)
        self.stream = Stream.from_config(named, model, record_step=record_step)
        scores: list[Sink] = [
            kind(self.cfg, settings.dataset_name, compare=settings.compare)
            for kind in (Scores, *((StreamingScores,) if self.cfg.TTT.CLOCK.FPS else ()))
        ]
        self.sinks: tuple[Sink, ...] = (*scores, Rows(self.run), *settings.sinks)
        self._before: str | None = None  # the video that was run before

    def evaluate(self, sources: Sequence[FrameSource]) -> Row:
        """Runs all videos and writes ``summary.json``, also when it is stopped on the way.

        Returns:
            The summary.

        Raises:
            UserError: the folder holds rows of another config, other weights, other flags or
                other videos.
        """
        offline = self.stream.adapter.offline
        facts = self.source_facts, self.process_facts
        with recorded(self.settings, sources, *facts, offline=offline) as summary:
            for source in self._remaining(sources):
                self.run_video(source, Progress())
        return summary

    def process_facts(self) -> Row:
        """Returns a summary's entries about this process and how its adapter ran."""
        facts = {**process_facts(self.device), **self.stream.adapter.facts()}
        clock = self.stream.clock
        if isinstance(clock, SimulatedClock):
            facts["device"] = f"simulated: {clock.times.machine}"
        return facts

    def _remaining(self, sources: Sequence[FrameSource]) -> Sequence[FrameSource]:
        """The videos to run: those that are not complete."""
        remaining = incomplete(self.settings, sources)
        if not remaining or not self.builds_up:
            return remaining
        # Later videos build on the earlier ones: from the last one that has a state to go on from.
        saved = [i for i, source in enumerate(sources) if self._restore(source)]
        return sources[max(saved, default=0) :]

    def run_video(
        self,
        source: FrameSource,
        *more: Sink,
        through: Callable[[Iterator[Frame]], Iterator[Frame]] = iter,
    ) -> None:
        """Runs one video from its saved state, or else its start, to its end.

        Args:
            source: the video.
            more: sinks of this video alone, after the others.
            through: hands the frames on; what it raises ends the video as an error of its own.
        """
        max_frames = self.settings.max_frames
        order, seed = self.cfg.TTT.FRAME_ORDER, max(self.cfg.SEED, 0)
        first = in_order(source, order, max_frames, seed=seed)
        ordered = source if order == "time" else first  # where it can, it skips without decoding
        before, self._before = self._before, source.video_id
        # A later video that builds on the one before goes on from that, not from its own state.
        follows = self.builds_up and before is not None
        state = {} if follows else self._restore(source)
        done, unsaved = state.get("frames", 0), 0
        recorded = self.run.recorded(source.video_id) if source.live else ()
        if recorded:  # what came after the state has rows and files, and does not come again
            done, unsaved = len(recorded), len(recorded) - done
        if max_frames is not None and done > max_frames:
            return  # an earlier run was to go further, and came further
        folder = self.run.unfinished(source.video_id)
        video = VideoRun(first, folder, done, state.get("skipped", ()), unsaved)
        sinks = (*self.sinks, *more)
        started: list[Sink] = []

        def end_sink(sink: Sink) -> None:
            try:
                sink.end(video)
            except BaseException:
                video.complete = False  # its files are not: a resumed run ends the video again
                raise

        def end() -> None:
            with ending_with(*(partial(end_sink, sink) for sink in reversed(started))):
                pass

        behind = self.behind and all(sink.behind for sink in sinks)
        handover = (HandoverBehind if behind else Handover)(sinks, video, self.stream.clock)
        with ending_with(handover.close, end):
            for sink in sinks:
                sink.start(video)
                started.append(sink)
            if not state:
                self._start(video)
                self._save_start(video, before)
            at = last_frame(self.run, source.video_id) if recorded else state.get("frame_index", -1)
            frames = ordered.frames_after(at) if done else iter(ordered)
            limit = None if max_frames is None else max_frames - done
            with closing_frames(frames):
                coming = after_gap(frames, self.run, video, state) if recorded else frames
                coming = through(islice(coming, limit))
                coming = self._shared(coming, video, starts=not state)
                self._run_frames(coming, video, handover, behind=behind)
            video.complete = True
        if not self.builds_up:  # else the next video may have to go on from this one
            self.run.remove_unfinished(video.video_id)

    def _save_every(self, source: FrameSource) -> int:
        """Returns the frames from one state of a source to the next; 0: none are saved."""
        # Where the machine's speed decides, no frame can be run again as it was, and a state takes
        # long to write. A live source's are never run again.
        never = on_machine_time(self.cfg) and not source.live
        return 0 if never else self.settings.save_every

    def _start(self, video: VideoRun) -> None:
        """Begins a video at its start."""
        self.stream.start_video(video.video_id, video.source)
        if self.frozen is not None:  # a state that could not be used may have been loaded in part
            self.frozen.start_video(video.video_id, video.source)

    def _shared(self, frames: Iterator[Frame], video: VideoRun, *, starts: bool) -> Iterator[Frame]:
        """Yields frames whose labels are read once, and class maps computed once, whoever asks.

        Where a video ``starts``, its first state is saved again when a frame has come and none has
        been run: then the size of the frames is known.
        """
        for frame in frames:
            if video.size is None:
                video.size = size_of(frame)
                if starts:
                    self._save_start(video, None)
            yield cast(Frame, Shared(frame))

    def _save_start(self, video: VideoRun, before: str | None) -> None:
        """Saves a video's first state where its frames cannot be asked for again."""
        if self._save_every(video.source) and (self.builds_up or video.source.live):
            self._save(video, -1)
            if self.builds_up and before is not None:
                self.run.remove_unfinished(before)

    def _run_frames(
        self, frames: Iterator[Frame], video: VideoRun, handover: Handover, *, behind: bool
    ) -> None:
        """Runs frames of a video into its sinks and saves states between them."""
        done, save_every = video.done, self._save_every(video.source)
        for frame, result in self._steps(frames, behind=behind):
            done += 1
            frozen = self._frozen_step(frame, behind=behind)
            handover.write(partial(self._results, result, frozen))
            del result, frozen  # or outputs would take the device's memory during the next frame
            if save_every and done % save_every == 0:
                handover.flush()
                self._save(video, frame["frame_index"])
        handover.flush()

    def _steps(
        self, frames: Iterator[Frame], *, behind: bool
    ) -> Iterator[tuple[Frame, Callable[[], FrameResult]]]:
        """Yields each frame with a function that returns its result.

        ``behind``: the loop goes on before the device has done its work.
        """
        if behind:
            assert isinstance(self.stream, Stream)  # the others have sinks in the loop
            for frame in self.stream.frames_of(frames, anew=False):
                yield frame, self.stream.begin(frame)
            return
        for result in self.stream.run(frames, anew=False):
            yield result.frame, partial(_itself, result)
            del result

    def _frozen_step(self, frame: Frame, *, behind: bool) -> Callable[[], FrameResult] | None:
        """Returns what :meth:`_steps` does of the frozen model, where there is one."""
        if self.frozen is None:
            return None
        if behind:
            assert isinstance(self.frozen, Stream)
            return self.frozen.begin(frame)
        with self.stream.clock.paused():
            return partial(_itself, self.frozen.step(frame))

    def _results(
        self, begun: Callable[[], FrameResult], frozen_begun: Callable[[], FrameResult] | None
    ) -> Results:
        """Returns what sinks take, once the device has done its work."""
        result, frozen = begun(), None if frozen_begun is None else frozen_begun()
        result = replace(result, output=Shared.of(result.output))
        if frozen is not None:
            frozen.output = Shared.of(frozen.output)
        row: Row = {key: result.frame[key] for key in ("video_id", "frame_index", "file_name")}
        row.update(finite(result.record), adapt_seconds=result.adapt_seconds)
        row["predict_seconds"] = result.predict_seconds
        return Results(result, frozen, row)

    def _save(self, video: VideoRun, frame_index: int) -> None:
        """Keeps all that the frames to come depend on, in one file that is whole or the old one."""
        frozen = self.frozen  # on time, its results depend on when those before were finished
        state = {
            "frames": video.done,
            "frame_index": frame_index,
            "size": video.size,
            "skipped": video.skipped,
            "stream": self.stream.state_dict(),
            **({"frozen": frozen.state_dict()} if isinstance(frozen, OnTimeStream) else {}),
            "sinks": [sink.save() for sink in self.sinks],
        }
        file = self.run.state_file(video.video_id)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        save_torch(file, state)

    def _restore(self, source: FrameSource) -> Row:
        """Brings back the saved state of a video and returns it; {} where there is none to use.

        Raises:
            UserError: a live source has frames that do not come again, and a state that is damaged.
        """
        file = self.run.state_file(source.video_id)
        if not file.exists():
            return {}
        try:
            state = read_state(file)
            for sink, saved in zip(self.sinks, state["sinks"], strict=True):
                sink.load(saved)
            if isinstance(self.frozen, OnTimeStream):
                self.frozen.load_state_dict(state["frozen"])
            self.stream.load_state_dict(state["stream"])
        except UnusableState as error:
            reason = str(error)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
            reason = f"{file} is not the state of such a run"
        else:
            return state
        self.stream.forget()  # a part of it may have been taken
        if source.live and self.run.recorded(source.video_id):
            raise UserError(
                f"{reason}: {source.video_id} cannot go on without it; choose another --output"
            )
        anew = "the run" if self.builds_up else f"video {source.video_id}"
        logger.warning("%s: %s starts anew without it", reason, anew)
        return {}


def _itself(result: FrameResult) -> FrameResult:
    return result


def frozen_stream(cfg: CfgNode, model: nn.Module) -> Stream | OnTimeStream:
    """Returns the stream of a copy of the model that does not adapt.

    In simulated time its frames do not wait either, and it has a clock of its own. On the wall
    clock it could not run beside the other model without taking its time.
    """
    adapter = build_adapter(cfg, copy.deepcopy(model), "none")
    stream = Stream(adapter, SlidingWindow(1, model.device))  # type: ignore[arg-type]
    if not cfg.TTT.CLOCK.PROFILE:
        return stream
    simulate(stream, cfg, "none")
    return OnTimeStream(stream, cfg.TTT.CLOCK.FPS)


def check_sinks(sinks: Sequence[Sink], model: nn.Module) -> None:
    """Tells sinks what the model predicts.

    Raises:
        UserError: one of them needs something else.
    """
    for sink in sinks:
        sink.check(frozenset(getattr(model, "outputs", ())))


def incomplete(settings: Settings, sources: Sequence[FrameSource]) -> list[FrameSource]:
    """Returns the videos that are not yet run as far as is asked for."""
    return [
        source
        for source in sources
        if not settings.run.is_complete(
            source.video_id, FirstFrames(source, settings.max_frames).num_frames
        )
    ]
