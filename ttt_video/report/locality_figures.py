"""Draws and tabulates what :mod:`ttt_video.locality` measured."""

from __future__ import annotations

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
    "cosine of the best window",
    "sigma^2 / |g|^2",
    "beta eta / |g|",
    "k*, bound",
    "k, measured",
    "k, without labels",
)

COSINES = {"last k frames": "cosine", "last and k - 1 others": "shuffled_cosine"}


def locality_table(found: Sequence[Locality]) -> str:
    """Returns the numbers of all videos as a Markdown table; |g| is the length of grad l_m."""
    rows = []
    for video in found:
        best = None if video.best_cosine is None else video.windows[video.best_cosine].cosine
        square = None if video.sigma2 is None else video.sigma2 / video.main_norm**2
        rows.append(
            [
                video.video_id,
                str(video.frames),
                f"{video.cosine:.3f}",
                "" if best is None else f"{best:.3f}",
                "" if square is None else f"{square:.3g}",
                f"{video.beta_eta / video.main_norm:.3g}",
                "" if video.best_bound is None else f"{video.best_bound:.2g}",
                "" if video.best_cosine is None else str(video.best_cosine),
                f"{video.best_unlabelled:.2g}",
            ]
        )
    return to_markdown(Table([*TITLES], rows))


def plot_locality(video: Locality, folder: Path) -> list[Path]:
    """Draws the agreement of both gradients by window size, and drift by lag; returns the files."""
    name = file_stem(video.video_id)
    files = [folder / f"windows_{name}.png", folder / f"drift_{name}.png"]
    sizes = list(video.windows)
    with figure_axes(files[0]) as axes:
        for color, (label, key) in zip(PALETTE, COSINES.items(), strict=False):
            values = {k: getattr(own, key) for k, own in video.windows.items()}
            known = {k: value for k, value in values.items() if value is not None}
            axes.plot(list(known), list(known.values()), marker="o", color=color, label=label)
        axes.axhline(0, color="0.7", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(k) for k in sizes])
        axes.set_xlabel("frames in the window, k")
        axes.set_ylabel("cosine")
        axes.set_title(f"{video.video_id}: mean of grad l_s over the window, and grad l_m", size=10)
        axes.legend(frameon=False)
    main = {d: value / video.main_norm for d, value in video.drift.items()}
    drifts = {"l_m": main, "l_s": video.recon_drift}
    with figure_axes(files[1]) as axes:
        for color, (label, drift) in zip(PALETTE, drifts.items(), strict=False):
            axes.plot(
                list(drift), list(drift.values()), marker="o", color=color, label=f"grad {label}"
            )
        axes.set_ylim(0)
        axes.set_xlabel("lag d, frames")
        axes.set_ylabel("rms of |g(t) - g(t - d)| / rms of |g|")
        axes.set_title(f"{video.video_id}: drift of the gradients", size=10)
        axes.legend(frameon=False)
    return files
