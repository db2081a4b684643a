"""Several videos at once, each in one of several processes, into one run folder."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from ..adaptation import build_adapter
from ..errors import UserError, ending_with
from ..plugins import run_files
from ..processes import end_with
from ..structures import FrameSource
from .directory import Row, RunDirectory
from .evaluation import StreamEvaluation, claim, expected_frames, load_source_model
from .overlay import OverlayVideos
from .summary import process_facts, source_facts, write_summary

_PATIENCE = 300.0  # seconds for a worker to finish its frame after it is told to stop


class _Stopped(Exception):
    """Another worker failed, or the user interrupted the run."""


@dataclass
class Settings:
    """What :class:`StreamEvaluation` is built of in every worker."""

    cfg: CfgNode
    run: RunDirectory
    dataset_name: str = ""
    compare: bool = False
    overlay: OverlayVideos | None = None
    save_every: int = 0
    max_frames: int | None = None
    register: Sequence[str] = ()  # files that a worker runs first
    metadata: dict[str, Row] = field(init=False)

    def __post_init__(self) -> None:
        # A spawned process knows only the data sets that importing ttt_video registers, and those
        # of the files of --register. Others were registered by a program that calls this.
        names = [self.dataset_name, *self.cfg.DATASETS.TEST]
        self.metadata = {name: MetadataCatalog.get(name).as_dict() for name in names if name}

    def build(self, device: str, threads: int) -> StreamEvaluation:
        """The evaluation, in a worker."""
        torch.set_num_threads(threads)
        run_files(self.register)
        for name, values in self.metadata.items():
            known = MetadataCatalog.get(name).as_dict()
            MetadataCatalog.get(name).set(**{k: v for k, v in values.items() if k not in known})
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = device
        return StreamEvaluation(
            cfg,
            load_source_model(cfg),
            self.run,
            dataset_name=self.dataset_name,
            compare=self.compare,
            overlay=self.overlay,
            save_every=self.save_every,
        )


def evaluate_in_parallel(
    settings: Settings, sources: Sequence[FrameSource], num_workers: int
) -> Row:
    """As :meth:`StreamEvaluation.evaluate`, with each video in one of several processes.

    Processes take the GPUs in turn; on a CPU they share PyTorch's threads out. The numbers are
    those of one process with as many threads.

    Args:
        settings: of the evaluation.
        sources: the videos; picklable.
        num_workers: processes, at most; there are no more than videos.

    Returns:
        The summary, with the number of ``workers``.

    Raises:
        UserError: videos build on one another, or have a frame budget; a worker failed, in a line
            that names its video.
    """
    cfg, run = settings.cfg, settings.run
    if cfg.TTT.FRAME_BUDGET_MS:
        raise UserError(
            "with TTT.FRAME_BUDGET_MS videos that run at once would take each other's time: use "
            "one worker"
        )
    if cfg.TTT.RESET == "never":
        raise UserError("with TTT.RESET never every video builds on the one before: use one worker")
    with closing(run):
        source_cfg = cfg.clone()
        source_cfg.defrost()
        source_cfg.MODEL.DEVICE = "cpu"
        model = load_source_model(source_cfg)
        facts = source_facts(model)
        offline = build_adapter(source_cfg, model).offline
        del model  # each worker has its own
        claim(
            run,
            cfg,
            facts,
            sources,
            dataset_name=settings.dataset_name,
            compare=settings.compare,
            video=settings.overlay is not None,
            max_frames=settings.max_frames,
            offline=offline,
        )
        team = _Team(settings, sources, num_workers)
        summary: Row = {}
        complete = False

        def summarize() -> None:
            summary.update(
                write_summary(
                    run,
                    cfg,
                    [source.video_id for source in sources],
                    dataset_name=settings.dataset_name,
                    complete=complete,
                    **facts,
                    **team.facts(),
                )
            )

        with ending_with(summarize):
            team.work()
            run.remove_unfinished(*(source.video_id for source in sources))
            complete = True
    return summary


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    source: FrameSource | None = None
    done: int = 0


class _Team:
    """The processes, the videos that wait for one, and one bar over all frames."""

    def __init__(
        self, settings: Settings, sources: Sequence[FrameSource], num_workers: int
    ) -> None:
        self.settings = settings
        run, limit = settings.run, settings.max_frames
        waiting = [
            (source, total)
            for source in sources
            for total in [expected_frames(source, limit)]
            if not run.is_complete(source.video_id, total)
        ]
        # The longest first, so that no process is left with a long one at the end.
        waiting.sort(key=lambda item: -(item[1] or 0))
        self.waiting = [source for source, _ in waiting]
        totals = [total for _, total in waiting]
        self.total = None if None in totals else sum(total or 0 for total in totals)
        self.num_videos = len(self.waiting)
        self.num_workers = min(num_workers, self.num_videos)
        self.workers: dict[Connection, _Worker] = {}
        self.process_facts: list[Row] = []

    def work(self) -> None:
        """Starts the processes, hands out the videos, and ends the processes, come what may."""
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        self.bar = tqdm(total=self.total, unit="frame")
        try:
            for device, threads in _places(self.settings.cfg.MODEL.DEVICE, self.num_workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(self.settings, device, threads, theirs, stop), daemon=True
                )
                process.start()
                theirs.close()
                self.workers[ours] = _Worker(process, ours)
                self._hand_out(self.workers[ours])
            self._show()
            while self.workers:
                for ready in wait(list(self.workers)):
                    self._listen(self.workers[ready])  # type: ignore[index]
        finally:
            self.bar.close()
            stop.set()
            for worker in self.workers.values():
                worker.connection.close()
                worker.process.join(_PATIENCE)
                worker.process.kill()
                worker.process.join()  # until then it holds the run

    def _hand_out(self, worker: _Worker) -> None:
        worker.source = self.waiting.pop(0) if self.waiting else None
        worker.done = 0
        with suppress(BrokenPipeError):  # it died, which _listen tells
            worker.connection.send(worker.source)

    def _listen(self, worker: _Worker) -> None:
        try:
            kind, *values = worker.connection.recv()
        except EOFError:
            worker.process.join()
            self._fail(
                worker,
                f"its process ended with exit code {worker.process.exitcode} (was it killed? was "
                "there enough memory?)",
            )
        if kind == "frames":
            (done,) = values
            self.bar.update(done - worker.done)
            worker.done = done
        elif kind == "video":
            self._hand_out(worker)
            self._show()
        elif kind == "failed":
            self._fail(worker, values[0])
        else:
            self.process_facts.append(values[0])
            del self.workers[worker.connection]
            worker.process.join()

    def _fail(self, worker: _Worker, why: str) -> None:
        video = "" if worker.source is None else f"video {worker.source.video_id}: "
        raise UserError(f"{video}{why}; all rows are kept, --resume goes on")

    def _show(self) -> None:
        running = [w.source.video_id for w in self.workers.values() if w.source is not None]
        ended = self.num_videos - len(self.waiting) - len(running)
        self.bar.set_description(f"{ended} of {self.num_videos} videos done")
        self.bar.set_postfix_str(", ".join(running)[:60])

    def facts(self) -> Row:
        """Of all processes that came to their end."""
        devices = sorted({facts["device"] for facts in self.process_facts})
        peaks = [facts["peak_memory_mib"] for facts in self.process_facts]
        return {
            "workers": self.num_workers,
            "device": ", ".join(devices) or None,
            "peak_memory_mib": max(peaks, default=None),
        }


def _places(device: str, num_workers: int) -> list[tuple[str, int]]:
    """Device and number of PyTorch threads of each worker."""
    threads = max(1, torch.get_num_threads() // max(1, num_workers))
    if device == "cuda":
        count = torch.cuda.device_count()
        return [(f"cuda:{i % count}", threads) for i in range(num_workers)]
    return [(device, threads)] * num_workers


def _work(
    settings: Settings, device: str, threads: int, connection: Connection, stop: Event
) -> None:
    """A worker: runs the videos it is sent until it is sent None."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent tells it to stop
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)

    def report(done: int, row: Row) -> None:
        if stop.is_set():
            raise _Stopped
        connection.send(("frames", done))

    with suppress(_Stopped, BrokenPipeError, EOFError):  # told to stop, or the parent is gone
        try:
            evaluation = settings.build(device, threads)
            while (source := connection.recv()) is not None:
                evaluation.stream(source, settings.max_frames, report)
                connection.send(("video",))
            connection.send(("ended", process_facts(torch.device(device))))
        except (_Stopped, BrokenPipeError, EOFError):
            raise
        except UserError as error:
            connection.send(("failed", str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent must know
            traceback.print_exc(file=sys.stderr)
            reason = str(error).split("\n", 1)[0]
            connection.send(("failed", f"{type(error).__name__}: {reason}"))
