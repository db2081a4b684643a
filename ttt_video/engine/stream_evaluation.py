"""What ``tools/stream_eval.py`` runs: videos through the loop, rows and pictures to disk."""

from __future__ import annotations

import copy
import platform
import resource
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn
from tqdm import tqdm

from .. import __version__
from ..adaptation import NoAdaptation
from ..errors import UserError
from ..evaluation.base import StreamingEvaluator
from ..evaluation.evaluators import build_evaluators, score_frame
from ..evaluation.protocols import LabelInfo
from ..evaluation.records import Row, RunDirectory, finite, summarize
from ..modeling.weights import load_weights, read_checkpoint, weights_hash
from ..structures import FrameSource
from ..visualization.overlay import overlay_prediction, side_by_side, to_rgb
from ..visualization.video import VideoWriter
from .stream import FrameResult, StreamRunner

Observer = Callable[[FrameResult, FrameResult | None], None]
"""Sees each frame's result, and the frozen model's where that runs beside it."""


def load_source_model(cfg: CfgNode) -> nn.Module:
    """The model of the config with ``MODEL.WEIGHTS``, in eval mode: (f0, g0, h0).

    Raises:
        UserError: no weights are named, they cannot be read, or do not fit.
    """
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights: pass --weights FILE, or set MODEL.WEIGHTS")
    # A frozen model needs no decoder g, so a plain Mask2Former checkpoint will do.
    allow_new = ("recon_head.",) if cfg.TTT.METHOD == "none" else ()
    model = build_model(cfg)
    load_weights(
        model,
        read_checkpoint(cfg.MODEL.WEIGHTS),
        source=cfg.MODEL.WEIGHTS,
        extra_channels="zero",
        allow_new=allow_new,
    )
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
        observers: Sequence[Observer] = (),
    ) -> None:
        """
        Args:
            cfg: resolved; its ``TTT`` keys decide the method.
            model: source model of :func:`load_source_model`.
            run: where rows go.
            dataset_name: of the videos, which says what is scored; "" for others.
            compare: also predict every frame with the frozen model.
            observers: called with every result, also of frames whose rows are on disk already.
        """
        self.cfg = cfg
        self.run = run
        self.observers = observers
        self.hash = weights_hash(model)
        frozen = copy.deepcopy(model) if compare else None
        self.frozen = None if frozen is None else NoAdaptation(frozen)
        self.runner = StreamRunner.from_config(cfg, model)
        self.dataset_name = dataset_name
        self.evaluators = {
            who: build_evaluators(cfg, dataset_name) for who in ("adapted", "frozen")
        }

    def evaluate(self, sources: Sequence[FrameSource], max_frames: int | None = None) -> Row:
        """Runs all videos and writes ``summary.json``, also when it is stopped on the way.

        Args:
            sources: the videos.
            max_frames: of each video; None for all.

        Returns:
            The summary.

        Raises:
            UserError: the folder holds rows of another config, or with and without ``compare``.
        """
        compare = self.frozen is not None
        if any(("frozen" in row) != compare for row in islice(self.run.rows(), 1)):
            raise UserError(
                f"the run in {self.run.path} was made {'without' if compare else 'with'} "
                "--compare; resume it like that, or choose another --output"
            )
        self.run.write_config(self.cfg.dump())
        complete = False
        try:
            for source in sources:
                self._stream(source, max_frames)
            complete = True
        finally:
            summary = self._summary(sources, complete)
            self.run.close()
        return summary

    def _stream(self, source: FrameSource, max_frames: int | None) -> None:
        expected = [n for n in (source.num_frames, max_frames) if n is not None]
        total = min(expected, default=None)
        video_id = source.video_id
        finished = total is not None and all(self.run.has(video_id, i) for i in range(total))
        if finished and self.runner.reset != "never":  # else later videos build on this one
            return
        with tqdm(total=total, desc=video_id, unit="frame") as bar:
            # A video that was cut off runs again from its start, because its weights depend on
            # every frame before; the rows it already has are not written twice.
            self.runner.start_video(video_id)
            for frame in islice(source, max_frames):
                result = self.runner.step(frame)
                frozen = None if self.frozen is None else self._predict_frozen(frame)
                row = self._row(result, frozen)  # evaluators see every frame that is run
                if not self.run.has(video_id, frame["frame_index"]):
                    self.run.append(row)
                for observer in self.observers:
                    observer(result, frozen)
                if "loss_recon" in result.record:
                    bar.set_postfix(loss_recon=f"{result.record['loss_recon']:.4f}", refresh=False)
                bar.update()

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
        row.update(self._scores(result, self.evaluators["adapted"]))
        if frozen is not None:
            row["frozen"] = self._scores(frozen, self.evaluators["frozen"])
        return row

    def _scores(self, result: FrameResult, evaluators: Sequence[StreamingEvaluator]) -> Row:
        scores = score_frame(evaluators, result.frame, result.output)
        return {"predict_seconds": result.predict_seconds, **scores}

    def _summary(self, sources: Sequence[FrameSource], complete: bool) -> Row:
        device = self.runner.window.device
        info = LabelInfo.of(self.dataset_name)
        summary = summarize(self.run.rows(), info)
        skipped = [name for source in sources for name in getattr(source, "skipped", ())]
        summary.update(
            complete=complete,
            skipped_frames=skipped,
            dataset=self.dataset_name,
            classes=list(info.classes),
            method=self.cfg.TTT.METHOD,
            preset=self.cfg.TTT.PRESET,
            seed=self.runner.seed,
            weights=self.cfg.MODEL.WEIGHTS,
            weights_sha256=self.hash,
            peak_memory_mib=peak_memory_mib(device),
            device=torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads",
            versions={
                "ttt_video": __version__,
                "detectron2": detectron2.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
        )
        self.run.write_json("summary.json", summary)
        return summary


def peak_memory_mib(device: torch.device) -> float:
    """Largest memory so far, MiB: PyTorch's on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class OverlayVideos:
    """An observer that writes predictions over their frames, one video file per video.

    The file is ``overlay.mp4``, or ``overlay-VIDEO.mp4`` when there are several videos.
    """

    def __init__(self, cfg: CfgNode, folder: Path, *, fps: float, single: bool) -> None:
        """``cfg`` gives the channel order and the colours (metadata of the first test set)."""
        self.format = cfg.INPUT.FORMAT
        self.method = cfg.TTT.METHOD
        self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
        self.folder = folder
        self.fps = fps
        self.single = single
        self._video_id: str | None = None
        self._writer: VideoWriter | None = None

    def __enter__(self) -> OverlayVideos:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __call__(self, result: FrameResult, frozen: FrameResult | None) -> None:
        """Adds one frame: original, frozen if there, adapted."""
        frame = result.frame
        if frame["video_id"] != self._video_id:
            self.close()
            self._video_id = frame["video_id"]
            safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in frame["video_id"])
            name = "overlay.mp4" if self.single else f"overlay-{safe}.mp4"
            self._writer = VideoWriter(self.folder / name, self.fps)
        assert self._writer is not None
        panels = self.panels(result, frozen)
        self._writer.write(side_by_side(list(panels.values()), list(panels)))

    def panels(self, result: FrameResult, frozen: FrameResult | None) -> dict[str, Any]:
        """Titled (height, width, 3) uint8 pictures of one frame."""
        frame = result.frame
        image = to_rgb(frame["image"], self.format, (frame["height"], frame["width"]))
        panels = {"original": image}
        if frozen is not None:
            panels["frozen"] = overlay_prediction(image, frozen.output, self.metadata)
        panels[self.method] = overlay_prediction(image, result.output, self.metadata)
        return panels

    def close(self) -> None:
        """Finishes the current video."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
