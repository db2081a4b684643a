"""Draws what gradient steps on one frame do (paper, Figure 3)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from ..files import write_atomically
from ..locality.one_frame import FrameSteps
from ..visualization.grid import picture_grid
from .formats import Table, to_markdown


def write_steps(found: FrameSteps, folder: Path) -> str:
    """Writes ``steps.png`` and ``steps.json`` to a folder; returns the losses as a table."""
    losses = {
        count: {"recon_loss": found.recon_loss[count], "main_loss": found.main_loss[count]}
        for count in found.recon_loss
    }
    row = {"frame": found.image, "masked": found.masked}
    for count, own in losses.items():
        title = f"step {count}: l_s {own['recon_loss']:.3f}, l_m {own['main_loss']:.2f}"
        row[title] = found.reconstructions[count]
    picture_grid([row], folder / "steps.png", column_width=300)
    numbers = {"video_id": found.video_id, "frame_index": found.frame_index, "steps": losses}
    text = json.dumps(numbers, indent=1) + "\n"
    write_atomically(folder / "steps.json", partial(_write, text))
    lines = [
        [str(count), f"{own['recon_loss']:.4f}", f"{own['main_loss']:.4f}"]
        for count, own in losses.items()
    ]
    title = f"Video {found.video_id}, frame {found.frame_index}"
    return to_markdown(Table(["steps", "l_s", "l_m"], lines, [], title))


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
