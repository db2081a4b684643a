"""Finds mistakes in a sweep's cells before the first of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from ..adaptation import find_method
from ..config import DEFAULT_STREAM_CONFIG, load_config
from ..data.catalog import check_registered
from ..errors import UserError
from ..stream.stage_times import stage_times
from .cells import Cell
from .workers import conflict


def check_cells(cells: Sequence[Cell]) -> None:
    """Raises UserError with the cell if a config, key, value, method or data set is unknown.

    Files of ``--register`` have to be run before.
    """
    known: dict[tuple[object, ...], CfgNode] = {}
    for cell in cells:
        try:
            cfg = _config(cell, known)
            for name in dict.fromkeys((cfg.TTT.METHOD, cfg.TTT.ENSEMBLE.METHOD)):
                find_method(name)
            if cfg.TTT.CLOCK.PROFILE:
                stage_times(cfg)
            dataset = cell.flag("--dataset")
            if dataset is not None:
                check_registered(dataset)
        except UserError as error:
            raise UserError(f"{cell}: {error}") from error


def check_folders(cells: Sequence[Cell]) -> None:
    """Raises UserError if folders hold runs that are not the cells': those would have no result."""
    others = [other for other in map(conflict, cells) if other is not None]
    if others:
        more = f" (and {len(others) - 1} more cells alike)" if len(others) > 1 else ""
        raise UserError(
            f"{others[0]}{more}; nothing was run or written: choose another --output, or move what "
            "is there away"
        )


def without_files(cells: Sequence[Cell]) -> dict[Cell, str]:
    """Returns the cells whose weights or videos do not exist, each with what to do about it."""
    known: dict[tuple[object, ...], CfgNode] = {}
    reasons = {}
    for cell in cells:
        weights = cell.flag("--weights") or _config(cell, known).MODEL.WEIGHTS
        videos = [cell.flag(kind) for kind in ("--video", "--video-dir")]
        gone = [video for video in videos if video is not None and not Path(video).exists()]
        if not weights:
            reasons[cell] = "no weights; give --weights, or weights in the sweep file"
        elif "://" not in weights and not Path(weights).exists():
            reasons[cell] = f"no weights at {weights}; give --weights, or put them there"
        elif gone:
            reasons[cell] = f"no video at {gone[0]}; correct its source, or put it there"
    return reasons


def _config(cell: Cell, known: dict[tuple[object, ...], CfgNode]) -> CfgNode:
    """Returns the cell's config, loaded once for all cells that differ in the seed alone."""
    config = cell.flag("--config") or DEFAULT_STREAM_CONFIG
    pairs = {key: value for key, value in cell.overrides.items() if key != "SEED"}
    key = (config, cell.flag("--preset"), cell.method, *pairs.items())
    if key not in known:
        opts = [part for pair in pairs.items() for part in pair]
        known[key] = load_config(config, cell.flag("--preset"), opts, method=cell.method)
    return known[key]
