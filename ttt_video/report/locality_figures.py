"""Draws and tabulates what :mod:`ttt_video.locality` measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..files import file_stem
from ..locality import Locality
from .curves import PALETTE, figure_axes
from .formats import Table, to_markdown

TITLES = (
    "video",
    "frames",
    "cosine",
    "c",
    "sigma^2 / |g|^2",
    "beta eta / |g|",
    "k*, bound",
    "k, measured",
    "k, without labels",
)


def locality_table(found: Sequence[Locality]) -> str:
    """Returns the numbers of all videos as a Markdown table; |g| is the length of grad l_m."""
    rows = []
    for video in found:
        norm = video.main_norm or math.nan
        rows.append(
            [
                video.video_id,
                str(video.frames),
                f"{video.cosine:.3f}",
                f"{video.scale:.3g}",
                f"{video.sigma2 / norm**2:.3g}",
                f"{video.beta_eta / norm:.3g}",
                f"{video.best_bound:.2g}",
                str(video.best_error),
                f"{video.best_unlabelled:.2g}",
            ]
        )
    return to_markdown(Table([*TITLES], rows))


def plot_locality(video: Locality, folder: Path) -> list[Path]:
    """Draws the terms by window size, and drift by lag; returns the files.

    All values are relative to the mean squared length of grad l_m.
    """
    square = video.main_norm**2 or math.nan
    name = file_stem(video.video_id)
    files = [folder / f"windows_{name}.png", folder / f"drift_{name}.png"]
    sizes = list(video.windows)
    with figure_axes(files[0]) as axes:
        for color, term in zip(PALETTE, ("error", "bias", "variance"), strict=False):
            values = [getattr(video.windows[k], term) / square for k in sizes]
            axes.plot(sizes, values, marker="o", color=color, label=f"{term}, measured")
        bound = [video.windows[k].bound / square for k in sizes]
        axes.plot(sizes, bound, color="0.5", linestyle="--", label="bound of the theorem")
        top = max(max(video.windows[k].error for k in sizes) / square, 1.0)
        axes.set_ylim(0, 1.2 * top)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(k) for k in sizes])
        axes.set_xlabel("frames in the window, k")
        axes.set_ylabel("squared distance / |grad l_m|²")
        axes.set_title(f"{video.video_id}: mean of grad l_s over the window, to grad l_m", size=10)
        axes.legend(frameon=False)
    with figure_axes(files[1]) as axes:
        for color, (label, drift) in zip(
            PALETTE, {"l_m": video.drift, "c l_s": video.recon_drift}.items(), strict=False
        ):
            values = [value / video.main_norm for value in drift.values()]
            axes.plot(list(drift), values, marker="o", color=color, label=f"grad {label}")
        axes.set_ylim(0)
        axes.set_xlabel("lag d, frames")
        axes.set_ylabel("rms of |g(t) - g(t - d)| / |grad l_m|")
        axes.set_title(f"{video.video_id}: drift of the gradients", size=10)
        axes.legend(frameon=False)
    return files
