"""Runs a grid of methods, settings, videos and seeds, and shows it as a table and figures.

%(prog)s window_size --output output/window_size

Cells that are finished are not run again, those that were cut off go on. docs/sweep.md describes
the sweep file.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import PRESETS, PROTOCOLS, ToolParser, add_override_arguments, add_register_argument

if TYPE_CHECKING:
    from ttt_video.sweeps.cells import Cell, Sweep


class SweepParser(ToolParser):
    """A parser that takes flags before, between and after SWEEP and KEY VALUE."""

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses as ``parse_intermixed_args``."""
        return self.parse_intermixed_args(argv)


def argument_parser(prog: str | None = None) -> ToolParser:
    """Returns the parser of the command's flags."""
    parser = SweepParser(prog, __doc__)
    parser.add_argument(
        "sweep", metavar="SWEEP", help="a sweep file, or the name of one under configs/sweeps/"
    )
    parser.add_argument("--output", type=Path, help="default: output/sweeps/<name of the file>")
    source = parser.add_mutually_exclusive_group()
    for flag in ("dataset", "video", "video-dir"):
        source.add_argument(f"--{flag}", help="instead of the file's sources")
    parser.add_argument("--config", help="instead of the file's")
    parser.add_argument("--preset", choices=PRESETS, help="instead of the file's")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="[SOURCE=]FILE",
        help="instead of the file's: for all sources that name none, or for one, several times",
    )
    parser.add_argument("--frames", type=int, help="of each video, instead of the file's")
    add_register_argument(parser)
    parser.add_argument("--workers", type=int, help="cells at a time; default: GPUs, else cores")
    parser.add_argument("--threads", type=int, help="of each; default: cores shared out evenly")
    parser.add_argument(
        "--slurm",
        action="append",
        metavar="KEY=VALUE",
        help="run as Slurm jobs; a parameter of submitit, such as timeout_min=240, "
        "slurm_partition=gpu, gpus_per_node=1, cpus_per_task=8; may be given several times",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="what table and figures show: all frames pooled (the default unless the file says "
        "otherwise), the mean over videos, or over frames as in the authors' release",
    )
    parser.add_argument("--quick", action="store_true", help="the file's shorter form")
    parser.add_argument("--report", action="store_true", help="run nothing; table and figures only")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and run nothing")
    add_override_arguments(parser, "of all cells", last=False)
    return parser


def open_sweep(args: argparse.Namespace) -> Sweep:
    """The sweep that the flags name; ``args.output`` is filled in."""
    from ttt_video.errors import UserError, suggestion
    from ttt_video.shipped import config_dir
    from ttt_video.sweeps.cells import read_sweep

    path = Path(args.sweep)
    if not path.is_file():
        shipped = config_dir() / "sweeps" / f"{args.sweep.removesuffix('.yaml')}.yaml"
        if not shipped.is_file():
            known = sorted(p.stem for p in shipped.parent.glob("*.yaml"))
            hint = suggestion(shipped.stem, known, "give a file or one of: ")
            raise UserError(f"no sweep {args.sweep!r}; {hint}")
        path = shipped
    name = f"{path.stem}_quick" if args.quick else path.stem
    args.output = args.output or Path("output/sweeps") / name
    flags = {k: getattr(args, k) for k in ("config", "preset", "frames")}
    replace = {key: value for key, value in flags.items() if value is not None}
    weights = {}
    for value in args.weights:
        source, sep, file = value.partition("=")
        if sep and not Path(value).exists():
            weights[source] = file
        else:
            replace["weights"] = value
    for kind in ("dataset", "video", "video-dir"):
        value = getattr(args, kind.replace("-", "_"))
        if value is not None:
            replace["sources"] = {Path(value).stem or value: {kind: value}}
    register = [part for file in args.register for part in ("--register", file)]
    return read_sweep(
        path,
        args.output,
        flags=register,
        overrides=args.opts,
        replace=replace,
        weights=weights,
        quick=args.quick,
    )


def slurm_parameters(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as numbers and strings."""
    import yaml

    from ttt_video.errors import UserError

    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--slurm {pair}: give KEY=VALUE")
    try:
        return {key: yaml.safe_load(value) for key, value in (p.split("=", 1) for p in pairs)}
    except yaml.YAMLError as error:
        raise UserError(f"--slurm {' '.join(pairs)}: {' '.join(str(error).split())}") from error


def key_of_time(cell: Cell) -> str:
    """The key because of which a cell depends on how fast the machine is; "" for none."""
    if cell.overrides.get("TTT.CLOCK.PROFILE"):
        return ""
    keys = ("TTT.FRAME_BUDGET_MS", "TTT.CLOCK.FPS")
    return next((key for key in keys if float(cell.overrides.get(key, 0)) > 0), "")


def run_missing(args: argparse.Namespace, sweep: Sweep) -> dict[Cell, str]:
    """Runs what is not finished; the cells that failed, and why."""
    from tqdm import tqdm

    from ttt_video.errors import UserError
    from ttt_video.files import make_folder
    from ttt_video.sweeps.checks import without_files
    from ttt_video.sweeps.workers import (
        default_workers,
        finished,
        render_worlds,
        run_local,
        run_on_cluster,
        threads_per_worker,
    )

    missing = [cell for cell in sweep.cells if not finished(cell)]
    for name in ("workers", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; give at least 1")
    workers = min(args.workers or default_workers(), max(len(missing), 1))
    timed = next(filter(None, map(key_of_time, missing)), "")
    if workers > 1 and args.slurm is None and timed:
        raise UserError(
            f"with {timed} cells that run at once would take each other's time: add --workers 1, "
            "or simulate the time (TTT.CLOCK.PROFILE)"
        )
    parameters = slurm_parameters(args.slurm or ())
    make_folder(args.output)
    for cell in missing:
        cell.note_failure(None)
    lacking = without_files(missing)
    ready = [cell for cell in missing if cell not in lacking]
    if ready:
        render_worlds(sweep.worlds, workers)
    ended: Generator[tuple[Cell, str | None], None, None]
    if args.slurm is not None and ready:
        workers = args.workers or len(ready)
        ended = run_on_cluster(ready, args.output / "slurm", workers=workers, parameters=parameters)
    else:
        threads = args.threads or threads_per_worker(workers)
        ended = run_local(ready, workers=workers, threads=threads)
    failures = {}
    done = len(sweep.cells) - len(missing)
    with closing(ended), tqdm(total=len(sweep.cells), initial=done, unit="cell") as bar:
        for cell, reason in itertools.chain(lacking.items(), ended):
            if reason is not None:
                failures[cell] = reason
                cell.note_failure(reason)
                bar.write(f"failed: {cell}: {reason}")
            bar.update()
    return failures


def check_worlds(sweep: Sweep) -> None:
    """Raises UserError with the source if flags of its world make no sense."""
    from ttt_video.errors import UserError

    from .world import argument_parser, check_arguments

    for world in sweep.worlds:
        where = f"sources.{world.folder.parent.name}.world"
        parser = argument_parser(f"{where}: ttt-video world")
        flags = parser.parse([*world.arguments, "--output", str(world.folder)])
        try:
            check_arguments(flags)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error


def run(args: argparse.Namespace) -> None:
    """Runs what is missing, reports all."""
    from ttt_video.errors import UserError
    from ttt_video.plugins import run_files
    from ttt_video.report.sweep_report import write_report
    from ttt_video.sweeps.checks import check_cells, check_folders, without_files
    from ttt_video.sweeps.workers import finished

    run_files(args.register)
    sweep = open_sweep(args)
    if not args.report:
        check_cells(sweep.cells)
        check_worlds(sweep)
    check_folders(sweep.cells)
    if args.dry_run:
        missing = [cell for cell in sweep.cells if not finished(cell)]
        lacking = without_files(missing)
        for cell in sweep.cells:
            state = "missing" if cell in missing else "done"
            print(f"{state}: {cell}: {' '.join(cell.arguments)}")
        for cell, reason in lacking.items():
            print(f"cannot run: {cell}: {reason}")
        return
    failures = {} if args.report else run_missing(args, sweep)
    print(write_report(sweep, args.output, args.protocol or sweep.protocol))
    if failures:
        raise UserError(
            f"{len(failures)} of {len(sweep.cells)} cells failed (above); the same command runs "
            "them again and nothing else"
        )
