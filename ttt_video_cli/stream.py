"""Streams videos through a model that learns from them, and records what every frame gave.

%(prog)s --video street.mp4 --compare --output output/street
%(prog)s --video-dir frames/ --method none
%(prog)s --camera 0 --latest
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import ToolParser, add_config_arguments, method_names

if TYPE_CHECKING:
    from ttt_video.formats.images import FrameTransform
    from ttt_video.stream.directory import Row
    from ttt_video.structures import FrameSource

NETWORKS = {"INCEPTION": "FID and IS", "LPIPS": "LPIPS"}
"""Keys of ``TTT.COLOR`` with files of weights that cannot be downloaded everywhere."""

VIDEOS = ("video_dir", "video", "dataset", "camera", "source")  # flags, one of which is given


class StreamParser(ToolParser):
    """Asks for a video, and says so where one stands without its flag."""

    def _check_live(self, args: argparse.Namespace) -> None:
        live = args.camera is not None or args.source is not None
        for flag, given in (("--latest", args.latest), ("--duration", args.duration is not None)):
            if given and not live:
                self.error(f"{flag} is for --camera and --source")
        if args.duration is not None and not args.duration > 0:
            self.error(f"--duration is {args.duration:g}; give a number of seconds")

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses the arguments; exactly one flag must name videos."""
        args = super().parse(argv)
        self._check_live(args)
        if args.view == "split" and (not args.compare or args.no_video):
            self.error("--view split shows the frozen model, too, in a video: give --compare")
        if all(getattr(args, name) is None for name in VIDEOS):
            lone = args.opts[0] if args.opts else ""
            said = f"; {lone!r} stands where KEY VALUE overrides do" if lone else ""
            self.error(
                f"no video: give --video FILE, --video-dir DIR, --dataset NAME, "
                f"--camera N or --source URL{said}"
            )
        return args


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = StreamParser(prog, __doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--video-dir", metavar="DIR", help="a folder of frames, or of such folders")
    source.add_argument("--video", metavar="FILE", help="a video file")
    source.add_argument("--dataset", metavar="NAME", help="a registered video data set")
    source.add_argument("--camera", metavar="N", help="a camera of this machine, such as 0")
    source.add_argument(
        "--source", metavar="URL", help="a network stream, or a text file with one on each line"
    )
    parser.add_argument(
        "--latest", action="store_true", help="drop what a live source sends while the model works"
    )
    parser.add_argument("--duration", type=float, metavar="S", help="seconds of a live source")
    parser.add_argument("--weights", metavar="FILE", help="source weights; overrides MODEL.WEIGHTS")
    for network, metrics in NETWORKS.items():
        parser.add_argument(
            f"--{network.lower()}",
            metavar="FILE",
            help=f"weights for {metrics} of colorization; overrides TTT.COLOR.{network}",
        )
    parser.add_argument(
        "--method", metavar="NAME", help="adaptation method: " + ", ".join(method_names())
    )
    parser.add_argument("--compare", action="store_true", help="run the frozen model beside it")
    parser.add_argument("--max-frames", type=int, metavar="N", help="of each video")
    parser.add_argument("--output", metavar="DIR", help="default: output/stream_eval/<date-time>")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument(
        "--save-every",
        type=int,
        default=50,
        metavar="N",
        help="frames from one saved state to the next, from which --resume goes on; 0: none",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="videos to run at once, on all GPUs"
    )
    parser.add_argument("--on-bad-frame", choices=("stop", "skip"), default="stop")
    parser.add_argument(
        "--view",
        choices=("panels", "split"),
        default="panels",
        help="the overlay's pictures side by side, or a moving bar between frozen and adapted",
    )
    parser.add_argument("--no-video", action="store_true", help="do not write overlay.mp4")
    parser.add_argument("--fps", type=float, help="of video files; default: the video's, else 10")
    parser.add_argument(
        "--stream-fps",
        type=float,
        metavar="N",
        help="frames come at this rate and do not wait: score what is predicted in time",
    )
    parser.add_argument(
        "--clock",
        metavar="PROFILE",
        help="simulate the time from a profile of stage times, such as two_cores, or a file of "
        "tools/measure_costs.py stages; default: the wall clock",
    )
    parser.add_argument(
        "--save",
        action="append",
        default=[],
        metavar="FORMATS",
        help="predictions as files: masks,coco,cityscapes,kitti_step,confidence,color",
    )
    parser.add_argument(
        "--save-weights",
        action="append",
        default=[],
        metavar="WHEN",
        help="the adapted model as files: last,best-loss,every:N",
    )
    add_config_arguments(parser)
    return parser


def open_sources(args: argparse.Namespace, transform: FrameTransform) -> list[FrameSource]:
    """The videos that the flags name."""
    from ttt_video.data.sources import open_dataset, open_folder, open_live, open_video

    live = args.source if args.camera is None else args.camera
    if live is not None:
        return open_live(live, transform, latest=args.latest, seconds=args.duration)
    if args.video_dir is not None:
        return open_folder(args.video_dir, transform, on_bad_frame=args.on_bad_frame)
    if args.video is not None:
        return open_video(args.video, transform, on_bad_frame=args.on_bad_frame)
    return open_dataset(args.dataset, transform, on_bad_frame=args.on_bad_frame)


def differences_of(summary: Row) -> list[str]:
    """How far the frozen model and the adapted one are apart, for videos without labels."""
    from ttt_video.tasks import tasks

    numbers = summary.get("differences", {})
    known = [task.difference for task in tasks() if task.difference is not None]
    words = {each.name: each.words for each in known if each.name in numbers}
    return [
        f"frozen and adapted differ: {text.format(numbers[name])}, mean over frames"
        for name, text in words.items()
    ]


def report(summary: Row) -> str:
    """The summary in a few lines."""
    from ttt_video.tasks import headlines, streaming_headlines

    lines = [f"{summary['frames']} frames"]
    if summary["frames"]:  # a live source may have sent none in time
        lines[0] += f", {summary['seconds']['frame']['mean']:.3f} s per frame"
    if summary["loss_recon"] is not None:
        lines.append(f"reconstruction loss {summary['loss_recon']:.4f}")
    if summary["skipped_steps"]:
        lines.append(
            f"{summary['skipped_steps']} steps skipped: the loss was not finite, or exploded"
        )
    if "frame_budget_used" in summary:
        lines.append(
            f"frame budget {summary['settings']['FRAME_BUDGET_MS']} ms: "
            f"{100 * summary['frame_budget_used']:.0f} % used; "
            f"skipped updates {summary['skipped_updates']}, "
            f"shorter steps {summary['shrunk_updates']}, late frames {summary['late_frames']}"
        )
    for who, times in summary.get("streaming", {}).items():
        delay, latency = times["delay_frames"], times["latency_seconds"]
        lines.append(
            f"{who} at {summary['settings']['CLOCK']['FPS']:g} fps: "
            + (f"{delay:.2f} frames late, " if delay is not None else "")
            + f"{1000 * latency:.0f} ms from a frame to its prediction, "
            f"{times['dropped_frames']} frames dropped, {times['misses']} without any prediction"
        )
    if summary["skipped_frames"]:
        lines.append(f"{len(summary['skipped_frames'])} unreadable frames skipped")
    for who, metrics in sorted(summary["metrics"].items()):
        if metrics.get("nonfinite_frames"):
            lines.append(f"{who}: {metrics['nonfinite_frames']} frames with scores not finite")
        shown = (*headlines(), *streaming_headlines(), "flicker")
        numbers = {name: metrics[name] for name in shown if name in metrics}
        scores = [f"{k} {v:.2f}" if v is not None else f"{k} undefined" for k, v in numbers.items()]
        if scores:
            lines.append(f"{who}: {', '.join(scores)}")
    if not any(name in numbers for numbers in summary["metrics"].values() for name in headlines()):
        lines += differences_of(summary)
    return "\n".join(lines)


def choose_config(args: argparse.Namespace) -> None:
    """Takes the config in the weights, or else the default one, where none is named; says which."""
    from ttt_video.config import DEFAULT_STREAM_CONFIG
    from ttt_video.stream.source_model import config_of_weights

    if args.config_file is not None:
        return
    args.config_file = config_of_weights(args.weights)
    if args.config_file is not None:
        print(f"config: that of {args.weights} (no --config given)")
        return
    args.config_file = DEFAULT_STREAM_CONFIG
    print(f"config: {DEFAULT_STREAM_CONFIG} (no --config given)")


def run(args: argparse.Namespace) -> None:
    """Checks, builds, streams."""
    from ttt_video.adaptation import find_method
    from ttt_video.cli import config_of
    from ttt_video.data.grey import open_videos
    from ttt_video.errors import UserError
    from ttt_video.files import path_text
    from ttt_video.stream import (
        OverlayVideos,
        RunDirectory,
        Settings,
        Sink,
        StreamEvaluation,
        evaluate_in_parallel,
        load_source_model,
    )
    from ttt_video.stream.evaluation import check_sinks
    from ttt_video.stream.parallel import check_independent
    from ttt_video.stream.saved_weights import SavedWeights, weight_moments
    from ttt_video.stream.saving import SavedPredictions, format_names
    from ttt_video.stream.stage_times import stage_times
    from ttt_video.tasks.classes import check_predicted_classes
    from ttt_video.visualization.video import check_fps

    if args.max_frames is not None and args.max_frames < 1:
        raise UserError(f"--max-frames is {args.max_frames}; give at least 1")
    if args.workers < 1:
        raise UserError(f"--workers is {args.workers}; give at least 1")
    if args.save_every < 0:
        raise UserError(f"--save-every is {args.save_every}; give a number of frames, or 0")
    if args.fps is not None:
        check_fps(args.fps)
    choose_config(args)
    for key, value in (("PROFILE", args.clock), ("FPS", args.stream_fps)):
        if value is not None:
            args.opts = [*args.opts, f"TTT.CLOCK.{key}", str(value)]
    cfg = config_of(args, args.method)
    if cfg.TTT.CLOCK.PROFILE:
        stage_times(cfg)  # before the time to load the weights
    for network in NETWORKS:
        if getattr(args, network.lower()) is not None:
            cfg.TTT.COLOR[network] = getattr(args, network.lower())
    find_method(cfg.TTT.METHOD)  # a misspelt name should not cost the time to load the weights
    cfg.freeze()
    formats, moments = format_names(args.save), weight_moments(args.save_weights)
    sources = open_videos(cfg, partial(open_sources, args))
    check_predicted_classes(cfg, args.dataset or "")
    if len(sources) > 1 and any(source.live for source in sources):  # none ends: all at once
        check_independent(cfg, "give one --source, not a list")
        args.workers = len(sources)
    if args.workers > 1:
        check_independent(cfg)
    model = load_source_model(cfg) if args.workers == 1 else None  # mistakes leave no folder
    output = args.output or Path("output/stream_eval") / datetime.now().strftime("%Y%m%d-%H%M%S")
    dataset, folder, sinks = args.dataset or "", Path(output), list[Sink]()
    if not args.no_video:
        single = len(sources) == 1
        sinks.append(
            OverlayVideos(
                cfg,
                folder,
                fps=args.fps,
                single=single,
                dataset_name=dataset,
                split=args.view == "split",
            )
        )
    if formats:
        sinks.append(
            SavedPredictions(
                cfg, folder, formats, fps=args.fps, compare=args.compare, dataset_name=dataset
            )
        )
    if moments:
        sinks.append(SavedWeights(cfg, folder, moments, dataset_name=dataset))
    if model is not None:
        check_sinks(sinks, model)
    run = RunDirectory(output, resume=args.resume)
    settings = Settings(
        cfg,
        run,
        dataset_name=dataset,
        compare=args.compare,
        sinks=sinks,
        save_every=args.save_every,
        max_frames=args.max_frames,
        register=tuple(args.register),
    )
    if model is None:
        summary = evaluate_in_parallel(settings, sources, args.workers)
    else:
        summary = StreamEvaluation(settings, model).evaluate(sources)
    print(report(summary))
    print(f"written to {path_text(run.path)}")
