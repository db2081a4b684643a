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
FROZEN_COLOR = "#7F7F7F"  # of the line called "frozen", in every picture


def rolling_mean(values: Sequence[float] | np.ndarray, width: int) -> np.ndarray:
    """Mean over the ``width`` positions around each, fewer at both ends; NaN does not count.

    An even width takes one position more before than after. All NaN gives NaN.
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
    """Gives the axes of a new figure, in inches, and writes it to a file afterwards."""
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
        path: where to write; the suffix (``.png``, ``.svg``, ``.pdf``) gives the file type.
        title: heading of the plot.
        ylabel: what the values are, with their unit.
        xlabel: what the positions are.
        x: the positions of all lines; None is 0, 1, 2, ...
        rolling: above 1, the values are drawn thin and pale, and their :func:`rolling_mean` of this
            width on top.
        starts: where in the values a new video starts; neither lines nor means cross these places.
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
                # A line of one point would be invisible.
                marker = "o" if len(own) == 1 else None
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
