"""Curves over frames, readable without colour vision."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # no pyplot: no display, no global state

# Okabe and Ito (2008), "Color Universal Design", without yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FROZEN_COLOR = "#7F7F7F"  # the line called "frozen" has it in every picture


def rolling_mean(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of the ``width`` values around each position, of fewer at both ends.

    An even width takes one value more before than after. NaNs are skipped; the mean of none is NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    positions = np.arange(len(array))
    first = np.maximum(positions - width // 2, 0)
    last = np.minimum(positions + (width + 1) // 2, len(array))
    number = counts[last] - counts[first]
    return np.divide(
        sums[last] - sums[first], number, out=np.full(len(array), np.nan), where=number > 0
    )


@contextmanager
def figure_axes(
    path: str | os.PathLike[str], width: float = 7.0, height: float = 4.4, dpi: int = 130
) -> Iterator[Axes]:
    """Gives the axes of a new figure of that size in inches, and writes the file afterwards."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path)


def plot_curves(
    series: Mapping[str, Sequence[float]],
    path: str | os.PathLike[str],
    title: str,
    ylabel: str,
    *,
    xlabel: str = "frame",
    x: Sequence[float] | None = None,
    rolling: int = 1,
    starts: Sequence[int] = (),
) -> None:
    """Writes a line plot: one line per name; NaN leaves a gap.

    Args:
        series: values by line name.
        path: the file; its suffix (``.png``, ``.svg``, ``.pdf``) gives the type.
        title: heading of the plot.
        ylabel: name and unit of the values.
        xlabel: name of the positions.
        x: the positions of all lines; None is 0, 1, 2, ...
        rolling: above 1, the :func:`rolling_mean` of this width is drawn over the pale values.
        starts: positions in the values at which a video starts; no line or mean crosses them.
    """
    colors = iter(PALETTE * (1 + len(series) // len(PALETTE)))
    with figure_axes(path, 8, 3.5, dpi=120) as axes:
        for name, values in series.items():
            positions = np.arange(len(values)) if x is None else np.asarray(x)
            color = FROZEN_COLOR if name == "frozen" else next(colors)
            places = [place for place in starts if 0 < place < len(values)]
            parts = zip(
                np.split(positions, places),
                np.split(np.asarray(values, float), places),
                strict=True,
            )
            for number, (where, own) in enumerate(parts):
                marker = "o" if len(own) == 1 else None  # a line of one point is invisible
                if rolling > 1 and len(own) > 1:
                    axes.plot(where, own, color=color, linewidth=0.6, alpha=0.35)
                    own = rolling_mean(own, rolling)
                label = name if number == 0 else None
                axes.plot(where, own, color=color, label=label, linewidth=1.6, marker=marker)
        mean_of = f", mean of {rolling} frames" if rolling > 1 else ""
        axes.set(title=title, xlabel=f"{xlabel}{mean_of}", ylabel=ylabel)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(frameon=False)
