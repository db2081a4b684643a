"""Sweeps: a grid of methods, settings, videos and seeds as runs of ``tools/stream_eval.py``.

A cell of the grid is one such run in a folder of its own. It is finished when its ``summary.json``
says so, so a sweep that is started again runs only what is missing.
"""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..cli import key_values
from ..data.world.layouts import VIDEO_DATASETS
from ..errors import UserError
from ..evaluation.tables import PROTOCOLS

SWEEP_KEYS = (
    "config", "preset", "weights", "frames", "compare", "settings", "seeds", "sources", "rows",
    "baseline", "figures", "protocol", "quick",
)  # fmt: skip
ROW_KEYS = (
    "method", "config", "preset", "weights", "settings", "sources", "seeds", "labels", "clip",
)  # fmt: skip
SOURCE_KINDS = ("dataset", "video", "video-dir", "world")
UNLABELLED_KINDS = ("video", "video-dir")
SOURCE_KEYS = (*SOURCE_KINDS, "config", "weights", "settings")
FIGURES = ("curve", "bars", "gain_against_time", "over_time")


@dataclass(frozen=True, eq=False)
class Cell:
    """One run.

    Attributes:
        row: its line of the table: the row's name and those of its settings that vary.
        name: the row's name alone.
        method: ``--method``.
        settings: all settings of the grid, by key.
        source: name of the videos.
        seed: ``SEED``.
        flags: of ``tools/stream_eval.py``, all but ``--output`` and ``--resume``.
        overrides: its KEY VALUE pairs: the grid's, ``SEED`` and the command line's.
        environment: variables to set.
        folder: of the run.
        clip: whether it is only there for its video, the frozen model's beside it.
    """

    row: str
    name: str
    method: str
    settings: Mapping[str, Any]
    source: str
    seed: int
    flags: tuple[str, ...]
    overrides: Mapping[str, str]
    environment: Mapping[str, str]
    folder: Path
    clip: bool = False

    def __str__(self) -> str:
        return f"{self.row} / {self.source} / seed {self.seed}"

    @property
    def arguments(self) -> list[str]:
        """Of ``tools/stream_eval.py``: the flags, and then the overrides."""
        return [*self.flags, *itertools.chain(*self.overrides.items())]

    def summary(self) -> dict[str, Any] | None:
        """What the run found; None unless it is finished."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return summary if summary.get("complete") else None


@dataclass(frozen=True)
class WorldVideos:
    """Videos to render before the cells that need them: ``tools/make_world.py``'s flags."""

    arguments: tuple[str, ...]
    folder: Path


@dataclass
class Sweep:
    """A sweep file, read: what to render, what to run, what to draw.

    Attributes:
        cells: in the order of the table.
        worlds: rendered first.
        baseline: name of the row that gains are counted from; None without a frozen row.
        protocol: name of what pools the frames of a metric (``evaluation.tables.PROTOCOLS``).
        figures: kind of figure to its setting's key (``curve``), its rows' names (``over_time``)
            or True.
    """

    cells: list[Cell]
    worlds: list[WorldVideos] = field(default_factory=list)
    baseline: str | None = None
    protocol: str = "standard"
    figures: dict[str, Any] = field(default_factory=dict)


def read_sweep(
    path: Path,
    output: Path,
    *,
    flags: Sequence[str] = (),
    overrides: Sequence[str] = (),
    replace: Mapping[str, Any] | None = None,
    quick: bool = False,
) -> Sweep:
    """Reads a sweep file (docs/sweep.md) into cells below ``output``.

    Args:
        path: YAML.
        output: folder of the sweep.
        flags: of ``stream_eval.py`` for every cell.
        overrides: KEY VALUE pairs for every cell, after the grid's.
        replace: top-level entries that stand for those of the file.
        quick: the entries of the file's ``quick`` stand for its others.

    Raises:
        UserError: a mistake in the file, with its place.
    """
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"sweep {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"sweep {path} is no YAML: {' '.join(str(error).split())}") from error
    spec = _section(content, f"sweep {path}", SWEEP_KEYS)
    shorter = _section(spec.get("quick"), "quick", [k for k in SWEEP_KEYS if k != "quick"])
    if quick and not shorter:
        raise UserError(f"sweep {path} has no entry quick: it comes in one length")
    spec = {**spec, **(shorter if quick else {}), **(replace or {})}
    rows = _named_sections(spec, "rows", ROW_KEYS)
    sources = _named_sections(spec, "sources", SOURCE_KEYS)
    sweep = Sweep([], figures=_figures(spec.get("figures") or {}))
    sweep.protocol = _one_of(spec.get("protocol", sweep.protocol), PROTOCOLS, "protocol")
    opened = {name: _source(name, source, output, sweep) for name, source in sources.items()}
    shared = _grid(spec.get("settings"), "settings")
    seeds = _seeds(spec.get("seeds", [0]), "seeds")
    last = key_values(overrides)
    for name, row in rows.items():
        # What replaces the sources of the file replaces its choices among them, too.
        chosen = [*opened] if "sources" in (replace or {}) else _row_sources(name, row, opened)
        own_seeds = _seeds(row.get("seeds", seeds), f"rows.{name}.seeds")
        clip = _flag(row, name, "clip")
        if _flag(row, name, "labels"):
            chosen = [s for s in chosen if not sources[s].keys() & {*UNLABELLED_KINDS}]
        axes = {**shared, **_grid(row.get("settings"), f"rows.{name}.settings")}
        for settings in _combinations(axes):
            varied = {k: v for k, v in settings.items() if len(axes[k]) > 1}
            label = ", ".join([name, *(f"{k.removeprefix('TTT.')}={varied[k]}" for k in varied)])
            for source, seed in itertools.product(chosen, own_seeds):
                own, environment = opened[source]
                cell_flags = [*flags, *own, *_flags(spec, row, sources[source], name)]
                pairs = {**_own_settings(sources[source]), **settings, "SEED": seed}
                sweep.cells.append(
                    Cell(
                        row=label,
                        name=name,
                        method=row.get("method", name),
                        settings=settings,
                        source=source,
                        seed=seed,
                        flags=tuple(cell_flags),
                        overrides={**{k: str(v) for k, v in pairs.items()}, **last},
                        environment=environment,
                        folder=output / "cells" / _safe(label) / _safe(source) / f"seed{seed}",
                        clip=clip,
                    )
                )
    if not sweep.cells:
        raise UserError(
            f"sweep {path}: every row needs labels (labels: True), and no source has any"
        )
    if len({cell.folder for cell in sweep.cells}) < len(sweep.cells):
        raise UserError(f"sweep {path}: two rows, sources or seeds have the same name")
    for name in sweep.figures.get("over_time", []):
        if name not in rows:
            raise UserError(f"figures.over_time: no row {name!r}; choose from {', '.join(rows)}")
    sweep.baseline = _baseline(spec.get("baseline"), sweep.cells)
    return sweep


def _section(value: Any, where: str, keys: Iterable[str]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; it must be a mapping of {', '.join(keys)}")
    for key in value:
        if key not in keys:
            close = difflib.get_close_matches(str(key), list(keys), n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(keys)}"
            raise UserError(f"{where}: no entry {key!r}; {hint}")
    return value


def _named_sections(
    spec: Mapping[str, Any], name: str, keys: Iterable[str]
) -> dict[str, dict[str, Any]]:
    sections = spec.get(name)
    if not isinstance(sections, dict) or not sections:
        raise UserError(f"{name} is {sections!r}; it must map at least one name to its entries")
    return {str(k): _section(v, f"{name}.{k}", keys) for k, v in sections.items()}


def _grid(settings: Any, where: str) -> dict[str, list[Any]]:
    """Values to try by key; a list is an axis, anything else is one value."""
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"{where} is {settings!r}; it must map config keys to values")
    axes = {key: v if isinstance(v, list) else [v] for key, v in settings.items()}
    for key, values in axes.items():
        if not values:
            raise UserError(f"{where}.{key} is an empty list; give at least one value")
    return axes


def _combinations(axes: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _row_sources(name: str, row: Mapping[str, Any], known: Iterable[str]) -> list[str]:
    """The sources that a row runs on, all unless it names some."""
    chosen = row.get("sources", [*known])
    if not isinstance(chosen, list) or not chosen or not {*chosen} <= {*known}:
        raise UserError(
            f"rows.{name}.sources is {chosen!r}; give a list of some of {', '.join(known)}"
        )
    return chosen


def _flag(row: Mapping[str, Any], name: str, key: str) -> bool:
    """``labels``: left out where there are none, folders and files of frames; or ``clip``."""
    value = row.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"rows.{name}.{key} is {value!r}; give True or False")
    return value


def _seeds(seeds: Any, where: str) -> list[int]:
    if not isinstance(seeds, list) or not seeds or not all(isinstance(s, int) for s in seeds):
        raise UserError(f"{where} is {seeds!r}; give a list of integers")
    return seeds


def _one_of(value: Any, choices: Iterable[str], where: str) -> str:
    if value not in choices:
        raise UserError(f"{where} is {value!r}; choose from {', '.join(choices)}")
    return str(value)


def _source(
    name: str, source: Mapping[str, Any], output: Path, sweep: Sweep
) -> tuple[list[str], dict[str, str]]:
    """Flags and environment for a source; a world's videos are noted to be rendered."""
    where = f"sources.{name}"
    kinds = [kind for kind in SOURCE_KINDS if kind in source]
    if "world" not in source:
        if len(kinds) != 1:
            raise UserError(f"{where} needs exactly one of {', '.join(SOURCE_KINDS)}")
        return [f"--{kinds[0]}", str(source[kinds[0]])], {}
    world = source["world"]
    if not isinstance(world, dict) or set(kinds) - {"world", "dataset"}:
        raise UserError(f"{where} is a world: give flags of tools/make_world.py, and no video")
    layout = world.get("layout", "kitti_step")
    if layout not in VIDEO_DATASETS:
        raise UserError(f"{where}: layout {layout!r}; choose from {', '.join(VIDEO_DATASETS)}")
    root = output / "videos" / _safe(name)
    flags: list[str] = []
    for key, value in world.items():
        if value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        flags += [f"--{key}", *map(str, values)]
    sweep.worlds.append(WorldVideos(tuple(flags), root / layout))
    dataset = source.get("dataset", VIDEO_DATASETS[layout])
    return ["--dataset", dataset], {"DETECTRON2_DATASETS": str(root.resolve())}


def _flags(
    spec: Mapping[str, Any], row: Mapping[str, Any], source: Mapping[str, Any], name: str
) -> list[str]:
    """The tool's flags; what a row says goes before its source, and that before the sweep."""
    flags: list[str] = []
    for flag in ("config", "preset", "weights"):
        value = row.get(flag, source.get(flag, spec.get(flag)))
        if value is not None:
            flags += [f"--{flag}", str(value)]
    flags += ["--method", row.get("method", name)]
    clip = row.get("clip", False)
    if not clip:
        flags.append("--no-video")
    if spec.get("frames") is not None:
        flags += ["--max-frames", str(spec["frames"])]
    if clip or spec.get("compare"):
        flags.append("--compare")
    return flags


def _own_settings(source: Mapping[str, Any]) -> dict[str, Any]:
    grid = _grid(source.get("settings"), "settings of a source")
    if any(len(values) > 1 for values in grid.values()):
        raise UserError("settings of a source are single values, not axes of the grid")
    return {key: values[0] for key, values in grid.items()}


def _figures(figures: Any) -> dict[str, Any]:
    figures = _section(figures, "figures", FIGURES)
    if not isinstance(figures.get("curve", ""), str):
        raise UserError(f"figures.curve is {figures['curve']!r}; name the setting on its x axis")
    if not isinstance(figures.get("over_time", []), list):
        raise UserError(f"figures.over_time is {figures['over_time']!r}; give a list of rows")
    return {kind: value for kind, value in figures.items() if value}


def _baseline(name: str | None, cells: list[Cell]) -> str | None:
    names = dict.fromkeys(cell.name for cell in cells if not cell.clip)
    if name is not None and name not in names:
        raise UserError(f"baseline {name!r} is no row; choose from {', '.join(names)}")
    frozen = (cell.name for cell in cells if cell.method == "none" and not cell.clip)
    return name or next(frozen, None)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)
