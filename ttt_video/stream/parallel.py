"""Several videos at once, each in one of several processes, into one run folder."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from types import FrameType
from typing import NamedTuple, cast

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from tqdm import tqdm

from ..adaptation import build_adapter
from ..adaptation.base import WITHOUT_GRAPHS
from ..data.ordering import FirstFrames
from ..errors import UserError
from ..plugins import run_files
from ..processes import end_with, keep_freed_memory
from ..structures import Frame, FrameSource
from .directory import Row
from .evaluation import StreamEvaluation, check_sinks, incomplete
from .on_time import on_machine_time
from .run import Settings, recorded
from .sinks import Results, Sink, VideoRun
from .source_model import load_source_model
from .summary import source_facts

_PATIENCE = 300.0  # seconds for a worker to finish its frame after it is told to stop
_GLANCE = 0.1  # seconds between looks whether to stop


class _Stopped(Exception):
    """Another worker failed, or the user interrupted the run."""


@dataclass
class Orders:
    """Tells a worker, in a process of its own, what to build."""

    settings: Settings
    metadata: dict[str, Row]

    @classmethod
    def of(cls, settings: Settings) -> Orders:
        """Returns the orders of a run."""
        # A spawned process knows only the data sets that importing ttt_video registers, and those
        # of the files of --register. Others were registered by a program that calls this.
        names = [settings.dataset_name, *settings.cfg.DATASETS.TEST, *settings.cfg.DATASETS.TRAIN]
        return cls(settings, {name: MetadataCatalog.get(name).as_dict() for name in names if name})

    def build(self, device: str, threads: int, share: float = 1.0) -> StreamEvaluation:
        """Builds the evaluation, in a worker that may take a share of its GPU's memory.

        Otherwise each of several workers on a GPU would count on all that is free, which the others
        take meanwhile, and how large its micro-batches are would depend on who comes first.
        """
        torch.set_num_threads(threads)
        if share < 1:
            torch.cuda.set_per_process_memory_fraction(share, device)
        run_files(self.settings.register)
        for name, values in self.metadata.items():
            known = MetadataCatalog.get(name).as_dict()
            MetadataCatalog.get(name).set(**{k: v for k, v in values.items() if k not in known})
        settings = replace(self.settings, cfg=_on(self.settings.cfg, device))
        return StreamEvaluation(settings, load_source_model(settings.cfg))


def _on(cfg: CfgNode, device: str) -> CfgNode:
    """Returns the config with another device."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    return cfg


def check_independent(cfg: CfgNode, remedy: str = "use one worker") -> None:
    """Refuses what videos that run at once cannot have.

    Args:
        cfg: resolved.
        remedy: what the message says to do.

    Raises:
        UserError: videos build on one another, or have to be on time on the wall clock.
    """
    if key := on_machine_time(cfg):
        raise UserError(
            f"with {key} videos that run at once would take each other's time: {remedy}"
        )
    if cfg.TTT.RESET == "never":
        raise UserError(f"with TTT.RESET never every video builds on the one before: {remedy}")


def evaluate_in_parallel(
    settings: Settings, sources: Sequence[FrameSource], num_workers: int
) -> Row:
    """As :meth:`StreamEvaluation.evaluate`, with each video in one of several processes.

    Processes take the GPUs in turn; on a CPU they share PyTorch's threads out. The numbers are
    those of one process with as many threads.

    Args:
        settings: of the run; picklable.
        sources: the videos; picklable.
        num_workers: processes, at most; there are no more than videos.

    Returns:
        The summary, with the number of ``workers``.

    Raises:
        UserError: videos build on one another, or have a frame budget; a worker failed, in a line
            that names its video.
    """
    cfg = settings.cfg
    check_independent(cfg)
    with closing(settings.run):
        cpu = _on(cfg, "cpu")
        model = load_source_model(cpu)
        check_sinks(settings.sinks, model)
        facts, offline = source_facts(model), build_adapter(cpu, model).offline
        del model  # each worker has its own
        team = _Team(settings, num_workers)
        with recorded(settings, sources, facts, team.facts, offline=offline) as summary:
            team.work(sources)
    return summary


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    source: FrameSource | None = None
    done: int = 0


class _Team:
    """The processes, the videos that wait for one, and one bar over all frames."""

    def __init__(self, settings: Settings, num_workers: int) -> None:
        self.orders = Orders.of(settings)
        self.num_workers = num_workers
        self.workers: dict[Connection, _Worker] = {}
        self.process_facts: list[Row] = []

    def work(self, sources: Sequence[FrameSource]) -> None:
        """Starts the processes, hands out the videos, and ends the processes, come what may."""
        settings = self.orders.settings
        remaining = incomplete(settings, sources)
        totals = {s.video_id: FirstFrames(s, settings.max_frames).num_frames for s in remaining}
        known = [total for total in totals.values() if total is not None]
        # The longest first, so that no process is left with a long one at the end.
        self.waiting = sorted(remaining, key=lambda source: -(totals[source.video_id] or 0))
        self.num_videos = len(self.waiting)
        self.num_workers = min(self.num_workers, self.num_videos)
        context = multiprocessing.get_context("spawn")
        stop = context.Event()
        self.bar = tqdm(total=sum(known) if len(known) == len(totals) else None, unit="frame")
        try:
            for place in _places(settings.cfg.MODEL.DEVICE, self.num_workers):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work, args=(self.orders, place, theirs, stop), daemon=True
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
        raise UserError(f"{video}{why}; all rows are kept, {self._resumed()}")

    def _resumed(self) -> str:
        """Returns what a resumed run would do with the videos that have not ended."""
        if self.orders.settings.save_every:
            return "--resume goes on"
        if any(worker.source.live for worker in self.workers.values() if worker.source):
            return (
                "but no state is (--save-every 0): --resume refuses live sources that have rows; "
                "choose another --output"
            )
        return "but no state is (--save-every 0): --resume begins unfinished videos anew"

    def _show(self) -> None:
        running = [w.source.video_id for w in self.workers.values() if w.source is not None]
        ended = self.num_videos - len(self.waiting) - len(running)
        self.bar.set_description(f"{ended} of {self.num_videos} videos done")
        self.bar.set_postfix_str(", ".join(running)[:60])

    def facts(self) -> Row:
        """Of all processes that came to their end."""
        devices = sorted({facts["device"] for facts in self.process_facts})
        peaks = [facts["peak_memory_mib"] for facts in self.process_facts]
        name = "micro_batch_size"
        chosen = [facts[name] for facts in self.process_facts if name in facts]
        plain = {
            k: why for own in self.process_facts for k, why in own.get(WITHOUT_GRAPHS, {}).items()
        }
        return {
            "workers": self.num_workers,
            "device": ", ".join(devices) or None,
            "peak_memory_mib": max(peaks, default=None),
            **({name: min(chosen)} if chosen else {}),
            **({WITHOUT_GRAPHS: plain} if plain else {}),
        }


SHARED = 0.9
"""Share of a GPU's memory that workers divide; each has a CUDA context beside its own share."""


class _Place(NamedTuple):
    """Where a worker runs: its device, PyTorch's threads, and its share of the device's memory."""

    device: str
    threads: int
    share: float


def _places(device: str, num_workers: int) -> list[_Place]:
    """Returns the place of each worker."""
    threads = max(1, torch.get_num_threads() // max(1, num_workers))
    devices = [device] * num_workers
    if device == "cuda":
        count = torch.cuda.device_count()
        devices = [f"cuda:{i % count}" for i in range(num_workers)]
    on_gpus = device.startswith("cuda")
    shared = {d: devices.count(d) if on_gpus else 1 for d in devices}
    return [_Place(d, threads, SHARED / n if (n := shared[d]) > 1 else 1.0) for d in devices]


class _Report(Sink):
    """Tells the parent how far a video is; stops it where the parent says so."""

    behind = True

    def __init__(self, connection: Connection, stop: Event) -> None:
        self.connection = connection
        self.stop = stop

    def start(self, video: VideoRun) -> None:
        self.video = video
        self._tell()

    def write(self, results: Results) -> None:
        self._tell()

    def _tell(self) -> None:
        if self.stop.is_set():
            raise _Stopped
        self.connection.send(("frames", self.video.done))


class _Watch:
    """Ends the wait for a frame where the parent says so, also in a source that is silent."""

    def __init__(self, stop: Event) -> None:
        """Starts a thread that looks; called in the main thread, which is the one that waits."""
        self.stop = stop
        self.waiting = False
        self._main = threading.get_ident()
        signal.signal(signal.SIGUSR1, self._interrupt)
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def frames(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        """Hands frames on; raises where the run is to stop before the next one has come."""
        end = object()
        while True:
            self.waiting = True
            try:
                frame = next(frames, end)
            finally:
                self.waiting = False
            if frame is end:
                return
            yield cast(Frame, frame)

    def _look(self) -> None:
        # Not stop.wait(): its setter would wait for a process that was killed in it.
        while True:
            time.sleep(_GLANCE)
            if self.waiting and self.stop.is_set():
                signal.pthread_kill(self._main, signal.SIGUSR1)

    def _interrupt(self, number: int, at: FrameType | None) -> None:
        # A signal that comes late finds a model at work, or files that are being ended.
        if self.waiting:
            self.waiting = False
            raise _Stopped


def _work(orders: Orders, place: _Place, connection: Connection, stop: Event) -> None:
    """A worker: runs the videos it is sent until it is sent None."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent tells it to stop
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with(parent.pid)
    keep_freed_memory()

    with suppress(_Stopped, BrokenPipeError, EOFError):  # told to stop, or the parent is gone
        try:
            evaluation = orders.build(*place)
            watch = _Watch(stop)
            while (source := connection.recv()) is not None:
                evaluation.run_video(source, _Report(connection, stop), through=watch.frames)
                connection.send(("video",))
            connection.send(("ended", evaluation.process_facts()))
        except (_Stopped, BrokenPipeError, EOFError):
            raise
        except UserError as error:
            connection.send(("failed", str(error)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent must know
            traceback.print_exc(file=sys.stderr)
            reason = str(error).split("\n", 1)[0]
            connection.send(("failed", f"{type(error).__name__}: {reason}"))
