"""Guards the folder of a training: one process at a time, one config and data for all attempts."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm

from ..config import read_yaml
from ..data.fingerprint import fingerprint_images
from ..errors import UserError
from ..files import FolderLock, make_folder, read_json_object, write_atomically
from ..stream.directory import differences

LOG_FILE_ONLY = {"log_file_only": True}
"""The ``extra`` of log records that are too long for a terminal."""

FREE = (
    "OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "CUDNN_BENCHMARK", "VIS_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD", "TEST.EXPECTED_RESULTS", "SOLVER.FROM_SCRATCH",
    "TTT.RECON.PICTURE_PERIOD",
)  # fmt: skip
"""Keys that a resumed training may change: they decide where it runs and what it tells, not the
weights. ``MODEL.WEIGHTS`` may be left out too, because a resumed training does not read it."""


@contextmanager
def training_directory(
    cfg: CfgNode, *, resume: bool, evaluate: bool, writes: bool = True
) -> Iterator[None]:
    """Holds ``cfg.OUTPUT_DIR`` while a training, or an evaluation of one, writes there.

    ``config.yaml`` in it is the training's; an evaluation in the same folder leaves it as it is.

    Args:
        cfg: resolved.
        resume: go on with the training in the folder.
        evaluate: train nothing.
        writes: whether this machine, of several, writes to the folder.

    Raises:
        UserError: another process writes to the folder, it holds a training although ``resume`` is
            not set or one with other settings, or it cannot be made or written.
    """
    folder = Path(cfg.OUTPUT_DIR)
    config = folder / "config.yaml"
    with _held(folder) if writes else nullcontext():
        trained = (folder / "last_checkpoint").is_file()
        if trained and not evaluate:
            if not resume:
                raise UserError(
                    f"{folder} already holds a training run; add --resume to go on with it, or "
                    "choose another OUTPUT_DIR"
                )
            if config.is_file():
                _compare(config, cfg)
        if writes and not (trained and evaluate):
            text = cfg.dump()
            write_atomically(config, lambda part: part.write_text(text, encoding="utf-8"))
        yield


def keep_to_images(cfg: CfgNode, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes what a training is made on to ``training_data.json``; a resumed one compares it.

    Call it in every process. A training of an earlier version has no such file before it is
    resumed.

    Args:
        cfg: resolved.
        records: of ``DATASETS.TRAIN``.

    Raises:
        UserError: the images or labels are others, the file is damaged or cannot be written.
    """
    folder = Path(cfg.OUTPUT_DIR)
    file = folder / "training_data.json"
    now = fingerprint_images(records)
    if (folder / "last_checkpoint").is_file() and file.is_file():
        _compare_images(file, now, cfg.DATASETS.TRAIN)
    elif comm.is_main_process():
        text = json.dumps(now) + "\n"
        write_atomically(file, lambda part: part.write_text(text, encoding="utf-8"))


def _compare_images(file: Path, now: Mapping[str, Any], names: Sequence[str]) -> None:
    try:
        before = read_json_object(file)
    except UserError:
        before = {}
    if before.keys() != now.keys():
        raise UserError(
            f"{file} is damaged, so that nobody knows the images of this training; delete it to go "
            "on with those that are there now"
        )
    if before != now:
        said = f"has {now['images']} images, the run began with {before['images']}"
        if before["images"] == now["images"]:
            said = "lists other images or labels than the run began with"
        raise UserError(
            f"data set {', '.join(names)} {said}; restore it, or start a new run from the weights "
            f"in {file.parent}, with another OUTPUT_DIR"
        )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    make_folder(folder, "OUTPUT_DIR")
    lock = FolderLock(
        folder,
        f"another process is writing to the run in {folder}: wait for it, or choose another "
        "OUTPUT_DIR",
    )
    # The loading processes of a killed training live on for seconds and must not hold the folder.
    os.register_at_fork(after_in_child=lock.close)
    try:
        yield
    finally:
        lock.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        # A full disk ends the training with one line where it writes its results; the terminal
        # shows the records that are lost here.
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Terminal(logging.StreamHandler):
    def filter(self, record: logging.LogRecord) -> Any:
        return not getattr(record, "log_file_only", False) and super().filter(record)


def open_logs(folder: str) -> None:
    """Starts the terminal's log and ``log.txt``; :data:`LOG_FILE_ONLY` keeps a record to the file.

    Call it in every process: the file of process n is ``log.txt.rank<n>``, and only process 0
    writes to the terminal.
    """
    rank = comm.get_rank()
    handlers: list[logging.Handler] = [
        _LogFile(Path(folder) / (f"log.txt.rank{rank}" if rank else "log.txt"))
    ]
    if rank == 0:
        handlers.append(_Terminal(sys.stdout))
    pattern = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
    for handler in handlers:
        handler.setFormatter(logging.Formatter(pattern, datefmt="%m/%d %H:%M:%S"))
    for name in ("fvcore", "detectron2", "ttt_video"):
        log = logging.getLogger(name)
        log.setLevel(logging.DEBUG)
        log.propagate = False
        for handler in list(log.handlers):  # an earlier training in this process may have left some
            if isinstance(handler, _LogFile | _Terminal):
                log.removeHandler(handler)
                handler.close()
        for handler in handlers:
            log.addHandler(handler)


def _compare(file: Path, cfg: CfgNode) -> None:
    try:
        old = read_yaml(file)
    except (UserError, yaml.YAMLError, ValueError):
        old = None
    if not isinstance(old, dict):
        raise UserError(
            f"{file} is damaged, so that nobody knows the settings of this training; delete it to "
            "go on with those that are given now"
        )
    new = yaml.safe_load(cfg.dump())
    free = (*FREE, *(() if cfg.MODEL.WEIGHTS else ("MODEL.WEIGHTS",)))
    for config in (old, new):
        for key in free:
            _remove(config, key)
    values = differences(old, new)
    if values:
        raise UserError(
            f"the training in {file.parent} has other settings ({values}); resume it with the "
            "same, or start a new one from its weights, with another OUTPUT_DIR"
        )


def _remove(config: dict[str, Any], dotted: str) -> None:
    *sections, key = dotted.split(".")
    with suppress(KeyError, TypeError):  # a config of an older version has no such section
        for section in sections:
            config = config[section]
        del config[key]
