#!/usr/bin/env python
"""Watch a model adapt: a shifted video of the built-in street world, frozen against adapted.

Makes the video (with exact labels), streams it through the small model that ships with the package,
and writes pictures, a video and every number. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from _checkout import call

from ttt_video_cli.arguments import (
    ToolParser,
    add_override_arguments,
    add_register_argument,
    answer_first,
)

CONFIG = "quick/stream_world.yaml"
GRID_ROWS = 4


def argument_parser() -> argparse.ArgumentParser:
    """The tool's flags."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=2000, help="of the world; 2000-2999 are tests")
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--corruption", default="colour_shift")
    parser.add_argument("--severity", type=float, default=3.0)
    parser.add_argument("--ramp", action="store_true", help="let the severity grow from 0")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    add_register_argument(parser)
    add_override_arguments(parser, "config overrides, last")
    return parser


answer_first(__name__, argument_parser().parse_args)

import numpy as np
import torch
from detectron2.config import CfgNode

from ttt_video.cli import run_tool
from ttt_video.config import load_config
from ttt_video.config.named_files import file_digests
from ttt_video.data.cityscapes import CITYSCAPES_COLORS
from ttt_video.data.kitti_step import register_video_sem_seg
from ttt_video.data.sources import FrameTransform, open_dataset
from ttt_video.formats.labels import read_sem_seg
from ttt_video.modeling.weights import weights_hash
from ttt_video.plugins import run_files
from ttt_video.report.curves import plot_curves
from ttt_video.stream import (
    OverlayVideos,
    Results,
    RunDirectory,
    Settings,
    Sink,
    StreamEvaluation,
    load_source_model,
)
from ttt_video.stream.directory import Row
from ttt_video.visualization.grid import picture_grid
from ttt_video.visualization.overlay import colorize, to_rgb


def make_video(args: argparse.Namespace, folder: Path) -> str:
    """Writes the shifted video where it is missing; returns the name of its data set."""
    flags = [f"--{k}={getattr(args, k)}" for k in ("seed", "frames", "corruption", "severity")]
    flags += ["--schedule=ramp"] if args.ramp else []
    call("world", [*flags, "--output", str(folder)])
    name = "demo_world"
    register_video_sem_seg(name, folder / "images" / "val", folder / "panoptic_maps" / "val")
    return name


class GridRows(Sink):
    """Keeps a few frames of the video for the picture grid."""

    def __init__(self, overlay: OverlayVideos, model: torch.nn.Module, num_frames: int) -> None:
        self.overlay = overlay
        self.model = model
        self.chosen = set(np.linspace(0, num_frames - 1, GRID_ROWS).round().astype(int).tolist())
        self.rows: list[dict[str, np.ndarray]] = []

    def write(self, results: Results) -> None:
        """Keeps the frame if it is one of the chosen."""
        frame = results.adapted.frame
        if frame["frame_index"] not in self.chosen:
            return
        panels = self.overlay.panels(results)
        generator = torch.Generator().manual_seed(frame["frame_index"])
        (pictures,) = self.model.reconstruct([frame], generator)  # type: ignore[operator]
        self.rows.append(
            {
                "input": panels["original"],
                "masked input": to_rgb(pictures["masked_input"], self.overlay.format),
                "reconstruction": to_rgb(pictures["recon"], self.overlay.format),
                "frozen": panels["frozen"],
                "adapted": panels[self.overlay.method],
                "labels": colorize(read_sem_seg(frame), np.array(CITYSCAPES_COLORS, np.uint8)),
            }
        )


def with_learn_on_change(args: argparse.Namespace, cfg: CfgNode, folder: Path) -> str:
    """Runs the same video with this project's own method; returns its line."""
    own = load_config(
        CONFIG, opts=["DATASETS.TEST", str(cfg.DATASETS.TEST), *args.opts], method="learn_on_change"
    )
    own.freeze()
    run = RunDirectory(
        folder / f"learn-{run_hash(own, model := load_source_model(own))}", resume=True
    )
    (dataset,) = own.DATASETS.TEST
    sources = open_dataset(dataset, FrameTransform.from_config(own))
    summary = StreamEvaluation(Settings(own, run, dataset), model).evaluate(sources)
    miou, seconds = summary["metrics"]["adapted"]["mIoU"], summary["seconds"]["frame"]["mean"]
    return f"--method learn_on_change: mIoU {miou:.2f}, {seconds:.3f} seconds per frame"


def run_hash(cfg: CfgNode, model: torch.nn.Module) -> str:
    """Tells runs with other settings or weights apart, be they overrides' or another version's."""
    return hashlib.sha256(
        f"{cfg.dump()}{weights_hash(model)}{file_digests(cfg)}".encode()
    ).hexdigest()[:8]


def report(summary: Row, rows: list[Row]) -> str:
    """Frozen against adapted, as a small table."""
    quarters = np.array_split(np.array([row["loss_recon"] for row in rows], dtype=float), 4)
    losses = " -> ".join(f"{q.mean():.3f}" for q in quarters if q.size)
    seconds = summary["seconds"]
    frozen, adapted = (summary["metrics"][who]["mIoU"] for who in ("frozen", "adapted"))
    return "\n".join(
        [
            "                      frozen   adapted",
            f"mIoU (%)             {frozen:7.2f}   {adapted:7.2f}   ({adapted - frozen:+.2f})",
            f"seconds per frame    {seconds['frozen_predict']['mean']:7.3f}"
            f"   {seconds['frame']['mean']:7.3f}",
            f"reconstruction loss, by quarter of the video: {losses}",
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """Makes the video, streams it, writes the pictures."""
    args = argument_parser().parse_args(argv)
    run_files(args.register)
    shift = f"{args.corruption}-{args.severity:g}{'-ramp' if args.ramp else ''}"
    folder = args.output / f"world-{args.seed}-{shift}-{args.frames}"
    dataset = make_video(args, folder / "video")
    cfg = load_config(CONFIG, opts=["DATASETS.TEST", f"('{dataset}',)", *args.opts])
    cfg.freeze()
    sources = open_dataset(dataset, FrameTransform.from_config(cfg))
    model = load_source_model(cfg)
    run = RunDirectory(folder / f"run-{run_hash(cfg, model)}", resume=True)
    overlay = OverlayVideos(cfg, run.path, fps=10.0, single=True, dataset_name=dataset)
    grid = GridRows(overlay, model, args.frames)
    beside = Settings(cfg, run, dataset, compare=True, sinks=[overlay, grid])
    summary = StreamEvaluation(beside, model).evaluate(sources)
    rows: list[Any] = list(run.rows())
    if grid.rows:
        picture_grid(grid.rows, run.path / "grid.png")
    plot_curves(
        {
            "frozen": [row["frozen"]["metrics"]["mIoU"] for row in rows],
            "adapted": [row["metrics"]["mIoU"] for row in rows],
        },
        run.path / "miou.png",
        f"mIoU of each frame, {shift}",
        "mIoU (%)",
    )
    plot_curves(
        {"reconstruction": [row["loss_recon"] for row in rows]},
        run.path / "loss_recon.png",
        f"Reconstruction loss before each step, {shift}",
        "loss",
    )
    print(report(summary, rows))
    if cfg.TTT.METHOD == "online_ttt_mae" and "TTT.METHOD" not in args.opts:
        print(with_learn_on_change(args, cfg, folder))
    print(f"overlay.mp4, grid.png, miou.png, loss_recon.png and all numbers are in {run.path}")


if __name__ == "__main__":
    run_tool(main)
