"""What ``tools/stream_eval.py`` runs: videos through the loop, rows and pictures to disk."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn
from tqdm import tqdm

from ..adaptation import NoAdaptation
from ..data.decoded_source import frames_after
from ..data.fingerprint import fingerprint_of
from ..data.ordering import FirstFrames, ShuffledFrames
from ..errors import UserError, ending_with
from ..files import save_torch, writing
from ..modeling.interface import drop_part, parts_of
from ..modeling.weights import load_weights, read_checkpoint
from ..structures import Frame, FrameSource
from ..tasks import build_tasks, score_frame
from ..tasks.classes import check_predicted_classes
from .directory import Row, RunDirectory
from .loop import FrameResult, StreamRunner
from .overlay import OverlayVideos
from .records import finite
from .saved_state import UnusableState, read_state
from .summary import process_facts, source_facts, write_summary

logger = logging.getLogger(__name__)

_ROW_KEYS = ("file_name", "adapt_seconds", "predict_seconds", "metrics", "records")

Observer = Callable[[FrameResult, FrameResult | None], None]
"""Sees each frame's result, and the frozen model's where that runs beside it."""

Progress = Callable[[int, Row], None]
"""Told the number of a video's frames that are done, and the newest row: when a video starts
(empty), and after every frame."""


def load_source_model(cfg: CfgNode) -> nn.Module:
    """The model of the config with ``MODEL.WEIGHTS``, in eval mode: (f0, g0, h0).

    Raises:
        UserError: no weights are named, they cannot be read, or do not fit.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights: pass --weights FILE, or set MODEL.WEIGHTS")
    model = build_model(cfg)
    decoder = tuple(f"{name}." for role, name in parts_of(model).items() if role == "g")
    read = getattr(model, "read_weights", read_checkpoint)  # other architectures', other formats
    report = load_weights(
        model,
        read(cfg.MODEL.WEIGHTS),
        source=cfg.MODEL.WEIGHTS,
        extra_channels="zero",
        allow_new=decoder,
    )
    # Not every method needs the decoder g; those that do refuse a model without.
    if any(name.startswith(decoder) for name in report.new):
        drop_part(model, "g")
    return model.eval()


class StreamEvaluation:
    """Streams videos through one method, beside the frozen model if asked; records each frame."""

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        run: RunDirectory,
        *,
        dataset_name: str = "",
        compare: bool = False,
        overlay: OverlayVideos | None = None,
        observers: Sequence[Observer] = (),
        save_every: int = 0,
    ) -> None:
        """
        Args:
            cfg: resolved; its ``TTT`` keys decide the method.
            model: source model of :func:`load_source_model`.
            run: where rows go.
            dataset_name: of the videos, which says what is scored; "" for others.
            compare: also predict every frame with the frozen model.
            overlay: writes the predictions of each video as a video.
            observers: called with every result, also of frames whose rows are on disk already.
            save_every: frames from one saved state of a video to the next, from which an
                interrupted run goes on; 0 saves none, and interrupted videos start anew.

        Raises:
            UserError: the data set has other classes than the model.
        """
        check_predicted_classes(cfg, dataset_name)
        self.cfg = cfg
        self.run = run
        self.dataset_name = dataset_name
        self.overlay = overlay
        self.observers = observers
        # With a frame budget there is no going on, and a state takes long to write.
        self.save_every = 0 if cfg.TTT.FRAME_BUDGET_MS else save_every
        self._before: str | None = None  # the video that was run before
        self.source_facts = source_facts(model)
        self.frozen = NoAdaptation(copy.deepcopy(model)) if compare else None
        # A method that looks at labels has to score them as the run does.
        named = cfg.clone()
        named.defrost()
        named.DATASETS.TEST = (dataset_name,) if dataset_name else ()
        self.runner = StreamRunner.from_config(named, model)
        self._reset_evaluators()

    def _reset_evaluators(self) -> None:
        self.evaluators = {
            who: build_tasks(self.dataset_name, self.cfg)
            for who in (("adapted", "frozen") if self.frozen is not None else ("adapted",))
        }

    def evaluate(self, sources: Sequence[FrameSource], max_frames: int | None = None) -> Row:
        """Runs all videos and writes ``summary.json``, also when it is stopped on the way.

        Args:
            sources: the videos.
            max_frames: of each video; None for all.

        Returns:
            The summary.

        Raises:
            UserError: the folder holds rows of another config, other weights, other flags or
                other videos.
        """
        with closing(self.run):
            claim(
                self.run,
                self.cfg,
                self.source_facts,
                sources,
                dataset_name=self.dataset_name,
                compare=self.frozen is not None,
                video=self.overlay is not None,
                max_frames=max_frames,
                offline=self.runner.adapter.offline,
            )
            summary: Row = {}
            complete = False

            def summarize() -> None:
                summary.update(
                    write_summary(
                        self.run,
                        self.cfg,
                        [source.video_id for source in sources],
                        dataset_name=self.dataset_name,
                        complete=complete,
                        **self.source_facts,
                        **process_facts(self.runner.window.device),
                    )
                )

            with ending_with(summarize):
                for source in self._remaining(sources, max_frames):
                    total = expected_frames(source, max_frames)
                    with tqdm(total=total, desc=source.video_id, unit="frame") as bar:
                        self.stream(source, max_frames, functools.partial(advance, bar))
                self.run.remove_unfinished(*(source.video_id for source in sources))
                complete = True
        return summary

    def _remaining(
        self, sources: Sequence[FrameSource], max_frames: int | None
    ) -> Sequence[FrameSource]:
        """The videos to run: those that are not complete."""
        remaining = [
            source
            for source in sources
            if not self.run.is_complete(source.video_id, expected_frames(source, max_frames))
        ]
        if not remaining or self.runner.reset != "never":
            return remaining
        # Later videos build on the earlier ones: from the last one that has a state to go on from.
        saved = [i for i, s in enumerate(sources) if self._restore(s.video_id)]
        return sources[max(saved, default=0) :]

    def stream(self, source: FrameSource, max_frames: int | None, progress: Progress) -> None:
        """Runs one video from its saved state, or else its start, to its end.

        Args:
            source: the video.
            max_frames: of the video; None for all.
            progress: told of every frame; what it raises stops the video.
        """
        video_id = source.video_id
        state, frames = self._begin(source, max_frames)
        done, skipped = state.get("frames", 0), state.get("skipped", [])
        if max_frames is not None and done > max_frames:
            return  # an earlier run was to go further, and came further
        progress(done, {})
        limit = None if max_frames is None else max_frames - done
        complete = False

        def end() -> None:
            self.run.end_video(
                video_id,
                frames=done,
                total=expected_frames(source, max_frames),
                skipped=_skipped(skipped, source),
                complete=complete,
            )

        endings = (end,) if self.overlay is None else (self.overlay.finish, end)
        with ending_with(*endings):
            for frame in self.runner.paced(islice(frames, limit)):
                row = self._frame(frame)
                done += 1
                progress(done, row)
                if self.save_every and done % self.save_every == 0:
                    self._save(video_id, done, frame["frame_index"], _skipped(skipped, source))
            complete = True
        if self.runner.reset != "never":  # else the next video may have to go on from this one
            self.run.remove_unfinished(video_id)

    def _begin(self, source: FrameSource, max_frames: int | None) -> tuple[Row, Iterator[Frame]]:
        """The state that a video goes on from ({} at its start), and the frames that follow it."""
        video_id = source.video_id
        first = FirstFrames(source, max_frames)
        if self.cfg.TTT.FRAME_ORDER == "shuffled":
            source = first = ShuffledFrames(source, max_frames, seed=self.runner.seed)
        # A later video that builds on the one before goes on from that, not from its own state.
        follows = self.runner.reset == "never" and self._before is not None
        state = {} if follows else self._restore(video_id)
        if self.overlay is not None:
            self.overlay.start(
                video_id,
                self.run.unfinished(video_id),
                frames=state.get("frames", 0),
                parts=state.get("overlay", ()),
            )
        if not state:
            self.runner.start_video(video_id, first)
            if self.save_every and self.runner.reset == "never":
                self._save(video_id, 0, -1, [])
                if self._before is not None:
                    self.run.remove_unfinished(self._before)
        self._before = video_id
        if not state.get("frames"):
            return state, iter(source)
        return state, frames_after(source, state["frame_index"])

    def _frame(self, frame: Frame) -> Row:
        """Runs one frame; its row is on disk before anything else can fail."""
        result = self.runner.step(frame)
        with self.runner.off_the_clock():  # a camera's run has neither
            frozen = None if self.frozen is None else self._predict_frozen(frame)
            row = self._row(result, frozen)  # evaluators see every frame that is run
        if not self.run.has(frame["video_id"], frame["frame_index"]):
            self.run.append(row)
        if self.overlay is not None:
            self.overlay.write(result, frozen)
        for observer in self.observers:
            observer(result, frozen)
        return row

    def _predict_frozen(self, frame: Any) -> FrameResult:
        assert self.frozen is not None
        clock = self.runner.now
        start = clock()
        output = self.frozen.predict(self.runner.window.current)
        return FrameResult(frame, output, predict_seconds=clock() - start)

    def _row(self, result: FrameResult, frozen: FrameResult | None) -> Row:
        frame = result.frame
        row: Row = {key: frame[key] for key in ("video_id", "frame_index", "file_name")}
        row.update(finite(result.record), adapt_seconds=result.adapt_seconds)
        row.update(self._scores(result, "adapted"))
        if frozen is not None:
            row["frozen"] = self._scores(frozen, "frozen")
        return row

    def _scores(self, result: FrameResult, who: str) -> Row:
        scores = score_frame(self.evaluators[who], result.frame, result.output)
        return {"predict_seconds": result.predict_seconds, **scores}

    def _state_file(self, video_id: str) -> Path:
        return self.run.unfinished(video_id) / "state.pth"

    def _save(self, video_id: str, done: int, frame_index: int, skipped: list[str]) -> None:
        """Keeps all that the frames to come depend on, in one file that is whole or the old one."""
        state = {
            "frames": done,
            "frame_index": frame_index,
            "skipped": skipped,
            "rows": torch.tensor(self.run.recorded(video_id).ranges()).view(-1, 2),
            "overlay": self.overlay.cut() if self.overlay is not None else [],
            "runner": self.runner.state_dict(),
            "evaluators": {
                who: {evaluator.name: evaluator.state_dict() for evaluator in evaluators}
                for who, evaluators in self.evaluators.items()
            },
        }
        file = self._state_file(video_id)
        with writing(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        save_torch(file, state)

    def _restore(self, video_id: str) -> Row:
        """Brings back the saved state of a video and returns it; {} where there is none to use."""
        file = self._state_file(video_id)
        if not file.exists():
            return {}
        try:
            state = read_state(file)
            if not self.run.recorded(video_id).covers(state["rows"].tolist()):
                raise UnusableState(f"{self.run.frames_file} lacks rows that were there")
            self.runner.load_state_dict(state["runner"])
            for who, evaluators in self.evaluators.items():
                for evaluator in evaluators:
                    evaluator.load_state_dict(state["evaluators"][who][evaluator.name])
        except UnusableState as error:
            reason = str(error)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):
            reason = f"{file} is not the state of such a run"
        else:
            return state
        # A part of it may have been taken.
        self.runner.window.clear()
        self.runner.adapter.reset()
        self._reset_evaluators()
        anew = "the run" if self.runner.reset == "never" else f"video {video_id}"
        logger.warning("%s: %s starts anew without it", reason, anew)
        return {}


def claim(
    run: RunDirectory,
    cfg: CfgNode,
    facts: Row,
    sources: Sequence[FrameSource],
    *,
    dataset_name: str,
    compare: bool,
    video: bool,
    max_frames: int | None,
    offline: bool,
) -> None:
    """Makes sure that all rows of the folder are of one config, model, set of flags and videos.

    Raises:
        UserError: there are rows of others, or that lack what a row has; or there are any, of a run
            with a frame budget.
    """
    for row in run.rows():
        lacking = [key for key in _ROW_KEYS if key not in row]
        if lacking:
            raise UserError(
                f"{run.frames_file} has a row without {', '.join(lacking)} (video "
                f"{row['video_id']}, frame {row['frame_index']}): remove it or restore the file"
            )
    if cfg.TTT.FRAME_BUDGET_MS and next(run.rows(), None) is not None:
        raise UserError(
            f"the run in {run.path} cannot go on: with TTT.FRAME_BUDGET_MS the frames that are run "
            "again would get other updates than their rows say; choose another --output"
        )
    flags: Row = {"--dataset": dataset_name, "--compare": compare, "--no-video": not video}
    # Elsewhere a longer run goes on from a shorter one; here the frames that are there depend on
    # how many were to come, or on how many the videos before them had.
    if offline or cfg.TTT.FRAME_ORDER == "shuffled" or cfg.TTT.RESET == "never":
        flags["--max-frames"] = max_frames
    if cfg.TTT.RESET == "never":
        flags["videos"] = [source.video_id for source in sources]
    run.claim(
        cfg.dump(),
        {"weights_sha256": facts["weights_sha256"], **flags},
        {source.video_id: fingerprint_of(source) for source in sources},
    )


def expected_frames(source: FrameSource, max_frames: int | None) -> int | None:
    """Number of frames to expect of a video; None where nobody knows."""
    return FirstFrames(source, max_frames).num_frames


def advance(bar: tqdm, done: int, row: Row) -> None:
    """Shows a video's progress."""
    if not row:
        bar.initial = done  # frames of an earlier run say nothing about the speed of this one
    elif row.get("loss_recon") is not None:
        bar.set_postfix(loss_recon=f"{row['loss_recon']:.4f}", refresh=False)
    bar.update(done - bar.n)


def _skipped(before: list[str], source: FrameSource) -> list[str]:
    """Files skipped so far, of which some may have been passed again."""
    return list(dict.fromkeys([*before, *getattr(source, "skipped", ())]))
