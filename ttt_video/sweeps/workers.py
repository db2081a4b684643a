"""Runs the cells of a sweep in processes of this machine, or as jobs of a Slurm cluster."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from ..config import DEFAULT_STREAM_CONFIG, load_config
from ..config.named_files import digest_of, file_digests
from ..data.fingerprint import Fingerprint, fingerprint_file
from ..data.sources import FrameTransform, open_folder
from ..errors import UserError
from ..files import read_json_object, write_atomically, writing
from ..processes import Children
from .cells import Cell, WorldVideos

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _thread_environment(threads: int | str) -> dict[str, str]:
    """Returns variables for one of several processes, whose OpenMP must not spin on their cores."""
    spin = os.environ.get("GOMP_SPINCOUNT", "3000")
    return {**dict.fromkeys(_THREAD_VARIABLES, str(threads)), "GOMP_SPINCOUNT": spin}


def default_workers() -> int:
    """Returns the number of GPUs, or without any the number of cores of this process."""
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


def threads_per_worker(workers: int) -> int:
    """Returns the cores for each worker, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // workers)


def run_cell(
    cell: Cell, environment: Mapping[str, str], children: Children | None = None
) -> str | None:
    """Runs one cell, or goes on with it; its output goes to ``log.txt`` in its folder.

    Args:
        cell: not finished yet.
        environment: variables to set besides the cell's own.
        children: runs the process; None: one of its own.

    Returns:
        None, or why it failed, in one line.
    """
    if _read_note(cell) is None and cell.summary() is None:
        cell.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_note(cell), indent=1) + "\n"
        write_atomically(cell.folder / "cell.json", lambda part: part.write_text(text, "utf-8"))
    if other := conflict(cell):
        return f"{other}; choose another --output"
    flags = ["--output", str(cell.folder), "--resume", *cell.arguments]
    log, variables = cell.folder / "log.txt", {**environment, **cell.environment}
    reason = _run(["stream", *flags], log, variables, children or Children())
    if reason is None and cell.summary() is None:
        return f"no complete summary.json in {cell.folder}"
    return reason


def finished(cell: Cell) -> bool:
    """Returns whether the cell's run is on disk, complete, and of the same settings and videos."""
    return cell.summary() is not None and conflict(cell) is None


def conflict(cell: Cell) -> str | None:
    """Returns what other run the cell's folder holds, in words; None if the cell may go there."""
    note, ended = _read_note(cell), cell.summary() is not None
    if (note is not None or ended) and note != _note(cell):
        return f"{cell.folder} holds a run of other settings or weights"
    # A run that goes on compares its videos itself.
    return _other_videos(cell) if ended else None


def _note(cell: Cell) -> dict[str, Any]:
    """Returns the content of ``cell.json``: cells with the same note give the same rows."""
    return {
        "arguments": cell.arguments,
        "environment": dict(cell.environment),
        "content": _content(cell),
    }


@cache  # of one cell it is asked for before the run, after it and in the report
def _content(cell: Cell) -> str | None:
    """Returns a hash of the config and of the files it names, which may change under one name.

    It is None if only the cell's own process can tell, such as for a method of ``--register``.
    """
    config = cell.flag("--config") or DEFAULT_STREAM_CONFIG
    pairs = cell.arguments[len(cell.flags) :]
    try:
        cfg = load_config(config, cell.flag("--preset"), pairs, method=cell.method)
        cfg.MODEL.DEVICE = ""
        cfg.MODEL.WEIGHTS = cell.flag("--weights") or cfg.MODEL.WEIGHTS
        files = json.dumps(file_digests(cfg))
        weights = cfg.MODEL.WEIGHTS and digest_of(cfg.MODEL.WEIGHTS)
    except (UserError, OSError):
        return None
    return hashlib.sha256(f"{cfg.dump()}{files}{weights}".encode()).hexdigest()


def _other_videos(cell: Cell) -> str | None:
    """Returns what is wrong if the files of ``--video`` or ``--video-dir`` are not the run's.

    Files that are not here any more do not matter, nor do a data set's, which only the cell's own
    process loads.
    """
    file = cell.folder / "sources.json"
    named = {kind: cell.flag(kind) for kind in ("--video", "--video-dir")}
    now = [_known_videos(kind, name) for kind, name in named.items() if name is not None]
    if not file.exists() or not now or now[0] is None:
        return None
    try:
        same = list(read_json_object(file).values()) == now[0]
    except UserError as error:
        return str(error)
    return None if same else f"{cell.folder} holds a run of other videos"


@lru_cache
def _known_videos(flag: str, name: str) -> list[Fingerprint | None] | None:
    """Returns the fingerprints of a video, or of a folder of videos; None if not here."""
    if flag == "--video":
        return [fingerprint_file(name)] if Path(name).is_file() else None
    try:
        videos = open_folder(name, FrameTransform(min_size=0))
        return [video.fingerprint() for video in videos]
    except UserError:
        return None


def _read_note(cell: Cell) -> Any:
    """Returns the content of ``cell.json``; None without one, "damaged" if it is no JSON."""
    try:
        return json.loads((cell.folder / "cell.json").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return "damaged"


def _run(
    words: Sequence[str], log: Path, environment: Mapping[str, str], children: Children
) -> str | None:
    """Runs ``python -m ttt_video WORDS``; returns None, or why it failed, in one line."""
    # It finds the modules that this process finds, and no others in the folder where it is started.
    # "" is the current folder, in a notebook and for python -c; in PYTHONPATH it would be nothing.
    folders = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    path = {"PYTHONPATH": folders, "PYTHONSAFEPATH": "1"}
    with writing(log), log.open("a", encoding="utf-8") as file:
        start = file.tell()
        command = [sys.executable, "-m", "ttt_video", *words]
        code = children.run(command, file, {**path, **environment})
    if code == 0:
        return None
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["no output"])[-1].removeprefix("error: ")
    return f"{last} (exit code {code}, see {log})"


def render_worlds(worlds: Sequence[WorldVideos], workers: int) -> None:
    """Renders the videos that are missing.

    Raises:
        UserError: a world cannot be rendered; the cells that need it could not run either.
    """

    children = Children()

    def render(world: WorldVideos) -> str | None:
        world.folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["world", *world.arguments, "--output", str(world.folder)]
        log = world.folder.parent / "log.txt"
        return _run(words, log, _thread_environment(1), children)

    pool = ThreadPoolExecutor(workers)
    try:
        for reason in pool.map(render, worlds):
            if reason is not None:
                raise UserError(f"world videos: {reason}")
    finally:
        children.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def run_local(
    cells: Sequence[Cell], *, workers: int, threads: int
) -> Generator[tuple[Cell, str | None], None, None]:
    """Runs cells in processes of their own, ``workers`` at a time.

    Args:
        cells: not finished yet.
        workers: processes at a time.
        threads: of each process. The GPUs that there are, are dealt out to the processes.

    Yields:
        Cells as they end, with the reason if they failed.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    children = Children()
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(workers):
        slots.put(slot)

    def run(cell: Cell) -> str | None:
        slot = slots.get()
        environment = _thread_environment(threads)
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        try:
            return run_cell(cell, environment, children)
        finally:
            slots.put(slot)

    pool = ThreadPoolExecutor(workers)
    try:
        futures = {pool.submit(run, cell): cell for cell in cells}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:  # after a signal, which ends the running processes too, no further ones start
        children.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def run_on_cluster(
    cells: Sequence[Cell],
    logs: Path,
    *,
    workers: int,
    parameters: Mapping[str, Any],
    cluster: str = "slurm",
) -> Generator[tuple[Cell, str | None], None, None]:
    """Runs cells as one array of jobs through submitit; see :func:`run_local`.

    Args:
        cells: as there.
        logs: folder for the jobs' own output, seen by all machines, as every path must be.
        workers: jobs at a time.
        parameters: of submitit's ``AutoExecutor.update_parameters``, such as ``timeout_min``.
        cluster: "slurm", or "local" to try it out: all jobs at once on this machine.

    Raises:
        UserError: submitit or Slurm is missing, or a parameter is unknown.
    """
    try:
        import submitit
    except ImportError as error:
        raise UserError("--slurm needs submitit: pip install submitit") from error
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("--slurm: no sbatch here; run this on a machine of the cluster")
    threads = str(parameters.get("cpus_per_task", 1))
    executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
    try:
        executor.update_parameters(name="ttt_video", slurm_array_parallelism=workers, **parameters)
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--slurm: {' '.join(str(error).split())}") from error
    environment = _thread_environment(threads)
    with executor.batch():
        jobs = [executor.submit(run_cell, cell, environment) for cell in cells]
    cell_of = dict(zip((job.job_id for job in jobs), cells, strict=True))
    for job in submitit.helpers.as_completed(jobs, poll_frequency=1 if cluster == "local" else 10):
        reason: str | None = None
        try:
            reason = job.result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as e:
            reason = f"job {job.job_id}: {str(e).strip().splitlines()[-1]}"
        yield cell_of[job.job_id], reason
