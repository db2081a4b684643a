"""Figures of runs on image sets: Figures 2 to 5, 9 to 13 and 14 of the report of TTT-MAE online."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..data.catalog import read_pixels
from ..errors import UserError
from ..files import file_stem, names_apart
from ..world.image_sets import family_of
from .curves import FROZEN_COLOR, PALETTE, figure_axes
from .image_runs import (
    BASELINE,
    ImageRun,
    Share,
    after_each_step,
    by_picture,
    change_counts,
    datasets,
    examples,
    moving_accuracy,
    rows,
    runs_of,
    scores_by_step,
    share,
)

MOVING_WIDTH = 300
_whole_numbers = partial(MaxNLocator, integer=True, steps=[1, 2, 5, 10])
_SHOWN_CHANGES = 10
_BESIDE: dict[str, Any] = {
    "frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1.0, 0.5),
}  # fmt: skip


def draw_image_runs(
    runs: Sequence[ImageRun], folder: Path, *, width: int | None = None, suffix: str = "svg"
) -> list[Path]:
    """Draws the figures that the runs have numbers for, and returns the files.

    - ``accuracy.SUFFIX``: top-1 of each method with its 95 % interval, by data set;
    - ``moving-DATASET.SUFFIX``: the accuracy over the last ``width`` pictures (None: 300), in the
      order in which they came; left out if there are fewer;
    - of runs with ``TTT.RECORD_STEPS``: ``steps.SUFFIX``, ``changes.SUFFIX``, and
      ``examples-RUN.SUFFIX`` with the class scores of up to four pictures after each step.
    """
    files = [_draw_bars(runs, folder / f"accuracy.{suffix}")] if runs else []
    for dataset in datasets(runs):
        file = folder / f"moving-{file_stem(dataset)}.{suffix}"
        if _draw_moving(runs, dataset, file, width or MOVING_WIDTH):
            files.append(file)
    recorded = [run for run in runs if run.steps]
    if recorded:
        files.append(_draw_steps(runs, recorded, folder / f"steps.{suffix}"))
        files.append(_draw_changes(recorded, folder / f"changes.{suffix}"))
    names = names_apart([run.path for run in recorded])
    for run, name in zip(recorded, names, strict=True):
        file = folder / f"examples-{file_stem(name)}.{suffix}"
        if _draw_examples(run, file):
            files.append(file)
    return files


def _short_names(sets: Sequence[str]) -> dict[str, str]:
    """Returns what tells data sets apart: the corruptions of those of one family."""
    split = {name: family_of(name) for name in sets}
    if len({family for family, _ in split.values()}) > 1:
        return {name: name for name in sets}
    return {name: ending for name, (_, ending) in split.items()}


def _errors(shares: Sequence[Share]) -> list[float]:
    return [s.interval.high - s.percent if s.interval else 0.0 for s in shares]


def _draw_bars(runs: Sequence[ImageRun], file: Path) -> Path:
    methods, sets = rows(runs), datasets(runs)
    width = 0.8 / len(methods)
    colors = iter(PALETTE * (1 + len(methods) // len(PALETTE)))
    with figure_axes(file, 3 + 2.2 * len(sets), 4) as axes:
        for number, row in enumerate(methods):
            color = FROZEN_COLOR if row == BASELINE else next(colors)
            found = [(i, share(by_picture(runs_of(runs, row, name)).values()))
                     for i, name in enumerate(sets) if runs_of(runs, row, name)]  # fmt: skip
            axes.bar(
                [i + (number - (len(methods) - 1) / 2) * width for i, _ in found],
                [s.percent for _, s in found], width, yerr=_errors([s for _, s in found]),
                color=color, capsize=2, label=row,
            )  # fmt: skip
        axes.set_xticks(range(len(sets)), _short_names(sets).values())
        axes.set_ylabel("top-1 (%)")
        axes.legend(**_BESIDE)
    return file


def _draw_moving(runs: Sequence[ImageRun], dataset: str, file: Path, width: int) -> bool:
    """Draws a line per run; returns False, and nothing, if no run has ``width`` pictures."""
    own = [run for run in runs if run.dataset == dataset and len(run.records) >= width]
    if not own:
        return False
    methods = [row for row in rows(own) if row != BASELINE]
    colors = dict(zip(methods, PALETTE * (1 + len(methods) // len(PALETTE)), strict=False))
    colors[BASELINE] = FROZEN_COLOR
    seeds = sorted({run.seed for run in own if run.row != BASELINE})
    dashes = dict(zip(seeds, ("-", "--", ":", "-.") * (1 + len(seeds) // 4), strict=False))
    with figure_axes(file, 9, 3.5) as axes:
        for run in sorted(own, key=lambda run: (rows(runs).index(run.row), run.seed)):
            frozen = run.row == BASELINE
            line = moving_accuracy(run, width)
            label = f"{run.row}, seed {run.seed}" if len(seeds) > 1 and not frozen else run.row
            axes.plot(
                range(width, width + len(line)), line, label=label, lw=1.4,
                color=colors[run.row], ls="-" if frozen else dashes[run.seed],
            )  # fmt: skip
        axes.set(title=dataset, xlabel="pictures seen")
        axes.set_ylabel(f"top-1 of the last {width} (%)")
        axes.grid(alpha=0.3)
        axes.legend(**_BESIDE)
    return True


def _draw_steps(runs: Sequence[ImageRun], recorded: Sequence[ImageRun], file: Path) -> Path:
    colors = iter(PALETTE * (1 + len(recorded) // len(PALETTE)))
    names = _short_names(datasets(recorded))
    with figure_axes(file, 9) as axes:
        for dataset in datasets(recorded):
            for row in rows(recorded):
                own = runs_of(recorded, row, dataset)
                if not own:
                    continue
                line, frozen = after_each_step(own), runs_of(runs, BASELINE, dataset)
                start = [share(by_picture(frozen).values())] if frozen else []
                shares = [*start, *line]
                steps = range(1 - len(start), len(line) + 1)
                color = next(colors)
                axes.plot(
                    steps, [s.percent for s in shares], marker="o", ms=3, color=color,
                    label=f"{row}, {names[dataset]}",
                )  # fmt: skip
                if all(s.interval for s in shares):
                    low, high = zip(*(s.interval for s in shares if s.interval), strict=True)
                    axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
        axes.set(xlabel="gradient steps on the picture (0: the baseline)", ylabel="top-1 (%)")
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.grid(alpha=0.3)
        axes.legend(**_BESIDE)
    return file


def _draw_changes(recorded: Sequence[ImageRun], file: Path) -> Path:
    sets = [(row, name) for name in datasets(recorded) for row in rows(recorded)
            if runs_of(recorded, row, name)]  # fmt: skip
    names = _short_names(datasets(recorded))
    width = 0.8 / len(sets)
    colors = iter(PALETTE * (1 + len(sets) // len(PALETTE)))
    with figure_axes(file, 9) as axes:
        for number, (row, dataset) in enumerate(sets):
            counts = change_counts(runs_of(recorded, row, dataset))
            shown = [counts[n] for n in range(min(max(counts), _SHOWN_CHANGES) + 1)]
            axes.bar(
                [n + (number - (len(sets) - 1) / 2) * width for n in range(len(shown))],
                [s.percent for s in shown], width, yerr=_errors(shown), color=next(colors),
                capsize=2, label=f"{row}, {names[dataset]}",
            )  # fmt: skip
        axes.set(xlabel="changes of the predicted class", ylabel="pictures (%)", ylim=(0, None))
        axes.xaxis.set_major_locator(_whole_numbers())
        axes.legend(**_BESIDE)
    return file


def _draw_examples(run: ImageRun, file: Path) -> bool:
    """Draws picture and class scores by step of :func:`examples`; False if there are none."""
    found = examples(run)
    if not found:
        return False
    classes = MetadataCatalog.get(run.dataset).get("classes", ())
    figure = Figure(figsize=(8, 2.3 * len(found)), dpi=130, layout="constrained")
    grid = figure.subplots(len(found), 2, squeeze=False, width_ratios=(1, 4))
    for (left, right), (kind, index) in zip(grid, found, strict=True):
        record = run.records[index]
        pixels = _picture(run.dataset, index)
        left.set_axis_off()
        if pixels is not None:
            left.imshow(pixels)
        left.set_title(f"{kind},\npicture {index}", fontsize=8)
        for color, (number, line) in zip(PALETTE, scores_by_step(record).items(), strict=False):
            name = classes[number] if number < len(classes) else str(number)
            mine = number == record["label"]
            right.plot(
                range(1, len(line) + 1), line, color=color, marker="o", ms=2.5,
                lw=2.2 if mine else 1.0, label=f"{name} (the label)" if mine else name,
            )  # fmt: skip
        right.set_ylabel("score (%)", fontsize=8)
        right.tick_params(labelsize=7)
        right.xaxis.set_major_locator(_whole_numbers())
        right.grid(alpha=0.3)
        right.legend(**_BESIDE)
    grid[-1][1].set_xlabel("gradient steps", fontsize=8)
    figure.savefig(file)
    return True


def _picture(dataset: str, index: int) -> np.ndarray | None:
    """Returns a picture of a data set as it was predicted; None if its files are not here."""
    if dataset not in DatasetCatalog:
        return None
    try:
        records = DatasetCatalog.get(dataset)
    except (UserError, FileNotFoundError):
        return None
    record = next((r for r in records if r["frame_index"] == index), None)
    return None if record is None else read_pixels(record)
