"""Reads a sweep: a grid of methods, settings, videos and seeds as runs of ``tools/stream_eval.py``.

A cell of the grid is one such run in a folder of its own. It is finished when its ``summary.json``
says so, so that a sweep that is started again runs only what is missing.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..config import key_values, read_yaml
from ..errors import UserError
from ..files import file_stem, write_atomically
from ..tasks.metrics import PROTOCOLS
from ..world.layouts import VIDEO_DATASETS
from .entries import (
    FIGURE_KEYS,
    ROW_KEYS,
    SOURCE_KEYS,
    SOURCE_KINDS,
    SWEEP_KEYS,
    grid,
    is_text,
    named_sections,
    one_of,
    row_sources,
    section,
)

UNLABELLED_KINDS = ("video", "video-dir")

Sections = Mapping[str, Mapping[str, Any]]
"""Rows or sources by name, with their entries."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a sweep."""

    row: str  # its line of the table: the row's name and the settings of the row that vary
    name: str  # of the row
    method: str
    settings: Mapping[str, Any]  # of the grid, by key
    source: str  # name of the videos
    seed: int
    flags: tuple[str, ...]  # of tools/stream_eval.py, without --output and --resume
    overrides: Mapping[str, str]  # KEY VALUE pairs: the grid's, SEED and the command line's
    environment: Mapping[str, str]  # variables to set
    folder: Path
    clip: bool = False  # whether it is there for its video only, beside the frozen model's

    def __str__(self) -> str:
        return f"{self.row} / {self.source} / seed {self.seed}"

    @property
    def arguments(self) -> list[str]:
        """The flags and overrides for ``tools/stream_eval.py``."""
        return [*self.flags, *itertools.chain(*self.overrides.items())]

    def summary(self) -> dict[str, Any] | None:
        """Returns the run's ``summary.json``; None unless it is finished."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(summary, dict) and summary.get("complete")
        return summary if whole else None

    def failure(self) -> str | None:
        """Returns why the last attempt ended without a summary; None unless it failed."""
        try:
            return (self.folder / "failed.txt").read_text("utf-8").strip()
        except (OSError, ValueError):
            return None

    def note_failure(self, reason: str | None) -> None:
        """Writes what :meth:`failure` reads; None removes it before the next attempt."""
        note = self.folder / "failed.txt"
        if reason is None:
            note.unlink(missing_ok=True)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(note, lambda part: part.write_text(f"{reason}\n", "utf-8"))

    def flag(self, name: str) -> str | None:
        """Returns what follows one of the flags; None if the cell has no such flag."""
        return dict(itertools.pairwise(self.flags)).get(name)


@dataclass(frozen=True)
class WorldVideos:
    """Videos to render before the cells that need them."""

    arguments: tuple[str, ...]  # flags of tools/make_world.py
    folder: Path


@dataclass
class Sweep:
    """The content of a sweep file: what to render, what to run, what to draw."""

    cells: list[Cell]  # in the order of the table
    worlds: list[WorldVideos] = field(default_factory=list)  # rendered first
    baseline: str | None = None  # the row that gains are counted from; None without a frozen row
    protocol: str = "standard"  # a key of PROTOCOLS
    # By kind of figure: the key of a setting ("curve"), names of rows ("over_time", "levels") or
    # True.
    figures: dict[str, Any] = field(default_factory=dict)


def read_sweep(
    path: Path,
    output: Path,
    *,
    flags: Sequence[str] = (),
    overrides: Sequence[str] = (),
    replace: Mapping[str, Any] | None = None,
    weights: Mapping[str, str] | None = None,
    quick: bool = False,
) -> Sweep:
    """Reads a sweep file (docs/sweep.md) into cells below ``output``.

    Args:
        path: YAML.
        output: folder of the sweep.
        flags: of ``stream_eval.py`` for every cell.
        overrides: KEY VALUE pairs for every cell, after the grid's.
        replace: top-level entries in place of the file's.
        weights: files in place of those of sources, by their names.
        quick: whether the file's entries under ``quick`` replace its others.

    Raises:
        UserError: a mistake in the file, with its place.
    """
    spec = _read_file(path, replace or {}, quick=quick)
    rows = named_sections(spec, "rows", ROW_KEYS)
    sources = named_sections(spec, "sources", SOURCE_KEYS)
    for name, file in (weights or {}).items():
        sources[one_of(name, sources, "--weights")]["weights"] = file
    figures = section(spec.get("figures"), "figures", FIGURE_KEYS)
    sweep = Sweep([], figures={kind: value for kind, value in figures.items() if value})
    sweep.protocol = one_of(spec.get("protocol", sweep.protocol), PROTOCOLS, "protocol")
    opened = {name: _source(name, source, output, sweep) for name, source in sources.items()}
    shared = grid(spec.get("settings"), "settings")
    seeds = spec.get("seeds", [0])
    last = key_values(overrides)
    for name, row in rows.items():
        # Other sources than the file's replace its choices among them, too.
        chosen = [*opened] if "sources" in (replace or {}) else row_sources(name, row, opened)
        for source in row["weights"] if isinstance(row.get("weights"), dict) else ():
            one_of(source, sources, f"rows.{name}.weights")
        if row.get("labels", False):
            chosen = [s for s in chosen if not sources[s].keys() & {*UNLABELLED_KINDS}]
        axes = {**shared, **grid(row.get("settings"), f"rows.{name}.settings")}
        for settings in _combinations(axes):
            varied = {k: v for k, v in settings.items() if len(axes[k]) > 1}
            label = ", ".join([name, *(f"{k.removeprefix('TTT.')}={varied[k]}" for k in varied)])
            for source, seed in itertools.product(chosen, row.get("seeds", seeds)):
                own, environment = opened[source]
                cell_flags = [*flags, *own, *_flags(spec, row, sources, source, name)]
                pairs = {**_own_settings(sources[source]), **settings, "SEED": seed}
                sweep.cells.append(
                    Cell(
                        row=label,
                        name=name,
                        method=str(row.get("method", name)),
                        settings=settings,
                        source=source,
                        seed=seed,
                        flags=tuple(cell_flags),
                        overrides={**{k: str(v) for k, v in pairs.items()}, **last},
                        environment=environment,
                        folder=output / "cells" / _safe(label) / _safe(source) / f"seed{seed}",
                        clip=row.get("clip", False),
                    )
                )
    if not sweep.cells:
        raise UserError(
            f"sweep {path}: every row needs labels (labels: True), and no source has any"
        )
    _check_folders(sweep.cells)
    for kind in ("over_time", "levels"):
        for name in sweep.figures.get(kind, []):
            if name not in rows:
                raise UserError(f"figures.{kind}: no row {name!r}; choose from {', '.join(rows)}")
    sweep.baseline = _baseline(spec.get("baseline"), sweep.cells)
    return sweep


def _read_file(path: Path, replace: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
    """Reads the entries of a sweep file; ``quick`` and ``replace`` are those of read_sweep."""
    try:
        content = read_yaml(path)
    except OSError as error:
        raise UserError(f"sweep {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"sweep {path} is no YAML: {' '.join(str(error).split())}") from error
    spec = section(content, "", SWEEP_KEYS, file=f"sweep {path}")
    shorter = section(spec.get("quick"), "quick", [k for k in SWEEP_KEYS if k != "quick"])
    if quick and not shorter:
        raise UserError(f"sweep {path} has no entry quick: it comes in one length")
    spec = {**spec, **(shorter if quick else {}), **replace}
    return section(spec, "", SWEEP_KEYS, file=f"sweep {path}")


def _combinations(axes: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _source(
    name: str, source: Mapping[str, Any], output: Path, sweep: Sweep
) -> tuple[list[str], dict[str, str]]:
    """Returns a source's flags and environment; a world's videos join those to be rendered."""
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
    one_of(layout, VIDEO_DATASETS, f"{where}.world.layout")
    root = output / "videos" / _safe(name)
    flags: list[str] = []
    for key, value in world.items():
        if value is False or value is None:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        if not all(map(is_text, values)):
            raise UserError(f"{where}.world.{key} is {value!r}; give a value, or a list of some")
        flags += [f"--{key}", *map(str, values)]
    sweep.worlds.append(WorldVideos(tuple(flags), root / layout))
    dataset = str(source.get("dataset", VIDEO_DATASETS[layout]))
    return ["--dataset", dataset], {"DETECTRON2_DATASETS": str(root.resolve())}


def _flags(
    spec: Mapping[str, Any], row: Mapping[str, Any], sources: Sections, source: str, name: str
) -> list[str]:
    """Returns the tool's flags; a row goes before its source, and a source before the sweep."""
    flags: list[str] = []
    for flag in ("config", "preset", "weights"):
        value = row.get(flag)
        if isinstance(value, dict):  # weights by source
            value = value.get(source)
        value = value or sources[source].get(flag, spec.get(flag))
        if value is not None:
            flags += [f"--{flag}", str(value)]
    flags += ["--method", str(row.get("method", name))]
    if not row.get("clip"):
        flags.append("--no-video")
    if spec.get("frames") is not None:
        flags += ["--max-frames", str(spec["frames"])]
    if row.get("clip") or spec.get("compare"):
        flags.append("--compare")
    return flags


def _own_settings(source: Mapping[str, Any]) -> dict[str, Any]:
    axes = grid(source.get("settings"), "settings of a source")
    if any(len(values) > 1 for values in axes.values()):
        raise UserError("settings of a source are single values, not axes of the grid")
    return {key: values[0] for key, values in axes.items()}


def _baseline(name: str | None, cells: list[Cell]) -> str | None:
    names = dict.fromkeys(cell.name for cell in cells if not cell.clip)
    if name is not None and name not in names:
        raise UserError(f"baseline {name!r} is no row; choose from {', '.join(names)}")
    frozen = (cell.name for cell in cells if cell.method == "none" and not cell.clip)
    return name or next(frozen, None)


def _safe(name: str) -> str:
    """Returns the folder of a name; several names may have the same."""
    plain = "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)
    fits = plain.strip(".") and len(plain.encode()) <= 200
    return plain if fits else file_stem(name)


def _check_folders(cells: Sequence[Cell]) -> None:
    """Raises UserError if two cells, or the videos of two sources, would share a folder."""
    for kind in ("source", "row"):
        names: dict[str, str] = {}
        for name in dict.fromkeys(getattr(cell, kind) for cell in cells):
            other = names.setdefault(_safe(name), name)
            if other != name:
                raise UserError(
                    f"the {kind}s {other!r} and {name!r} would share the folder {_safe(name)}, "
                    "because some characters cannot stand in its name; rename one"
                )
    found: set[Path] = set()
    for cell in cells:
        if cell.folder in found:
            raise UserError(f"{cell} is there twice: a row or seed has the same name as another")
        found.add(cell.folder)
