"""Shows that a change moves no number: the same short streams before and after it, compared.

    python tests/same_numbers.py BEFORE
    python tests/same_numbers.py BEFORE AFTER --only online_ttt_mae release

BEFORE and AFTER are git revisions; without AFTER it is the working tree. Each runs every case of
:data:`CASES` with its own code in one process, on the same small videos of the street world. Rows,
summaries and tables are compared to the last digit; times, machine facts and versions are left
out. Keys that only AFTER writes are named and count as no difference. Exit code 1 where a number
differs. About three minutes for each side on two cores.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

METHODS = (
    "none", "joint_training", "main_task_only", "online_ttt_mae", "implicit_only", "explicit_only",
    "ttt_mae_no_memory", "offline_ttt_mae", "offline_ttt_mae_oracle", "online_ttt_mae_line_search",
    "ln_adapt", "tent", "tent_class_balance", "self_train", "self_train_class_balance",
    "majority_vote", "temporal_smoothing", "tent_ln_adapt", "learn_on_change",
)  # fmt: skip
SETTINGS = [
    "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "64",
    "TTT.BATCH_SIZE", "2", "TTT.MICRO_BATCH_SIZE", "1", "TTT.OPTIMIZER.BETAS", "[0.5, 0.9]",
    "TTT.OFFLINE.STEPS", "3", "TTT.OFFLINE.EVAL_EVERY", "1", "TTT.ENSEMBLE.PREDICTIONS", "3",
]  # fmt: skip
SGD = ["TTT.OPTIMIZER.NAME", "SGD", "TTT.OPTIMIZER.BASE_LR", "0.001"]
SEMANTIC = [
    "--config", "quick/joint_world.yaml", "--weights", "ttt_video://quick_joint_world.safetensors",
]  # fmt: skip
PANOPTIC = [
    "--config", "quick/joint_world_panoptic.yaml",
    "--weights", "ttt_video://quick_joint_world_panoptic.safetensors",
]  # fmt: skip
KITTI = [*SEMANTIC, "--dataset", "kitti_step_video_sem_seg_val"]
NORMS = ["TTT.LN_ADAPT.SOURCE_STATISTICS", "ttt_video://quick_joint_world_norms.safetensors"]
NORMS += ["TTT.LEARN_ON_CHANGE.SOURCE_HEAD", "ttt_video://quick_joint_world_head.safetensors"]
CROP = ["TTT.CROP.SIZE", "[32, 64]"]

COLOR = [
    "--config", "quick/stream_world_color.yaml", "--dataset", "kitti_step_video_sem_seg_val",
    "--compare",
]  # fmt: skip

CASES: dict[str, tuple[list[str], list[str]]] = {
    **{name: ([*KITTI, "--method", name], [*SGD, *NORMS]) for name in METHODS},
    "compare": ([*KITTI, "--compare"], [*SGD, "TTT.WINDOW_SIZE", "3"]),
    "adamw": (KITTI, ["TTT.OPTIMIZER.NAME", "ADAMW", "TTT.OPTIMIZER.BASE_LR", "0.0005"]),
    "paper": ([*KITTI, "--preset", "paper"], ["TTT.OPTIMIZER.BASE_LR", "0.0001"]),
    "release": ([*KITTI, "--preset", "release"], ["TTT.PRECISION", "fp32", *CROP]),
    "realtime": ([*KITTI, "--preset", "realtime"], CROP),
    "shuffled": (KITTI, [*SGD, "TTT.FRAME_ORDER", "shuffled"]),
    "never_reset": (KITTI, [*SGD, "TTT.RESET", "never"]),
    "budget": (KITTI, [*SGD, "TTT.FRAME_BUDGET_MS", "10000000"]),
    "workers": ([*KITTI, "--workers", "2"], SGD),
    "killed": ([*KITTI, "--save-every", "2"], SGD),
    "panoptic": ([*PANOPTIC, "--dataset", "coco_videos_panoptic_all", "--compare"], SGD),
    "instances": ([*PANOPTIC, "--dataset", "coco_videos_instance_all"], SGD),
    "color": (COLOR, [*SGD, "TTT.WINDOW_SIZE", "3"]),
    "color_crop": ([*COLOR, "--preset", "realtime"], ["TTT.CROP.RESIZE", "0.7", *CROP]),
}
"""Flags of ``tools/stream_eval.py`` by name, and its KEY VALUE pairs after :data:`SETTINGS`"""

TABLES = {"table": METHODS, "coco_table": ("panoptic",)}
"""``tools/tabulate.py`` of these cases"""

NOT_NUMBERS = {"versions", "device", "peak_memory_mib", "file_name", "frame_budget_used", "seconds"}


def load_tool(checkout: Path, name: str) -> Any:
    """Imports a tool of a checkout."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", checkout / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(name: str, out: Path) -> list[str]:
    """Returns what ``stream_eval.py`` is given for a case."""
    flags, pairs = CASES[name]
    return [*flags, "--no-video", "--output", str(out / name), *SETTINGS, *pairs]


def kill_after_rows(command: list[str], rows: Path, count: int) -> None:
    """Runs a command and kills it once that many rows are on disk."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if rows.exists() and rows.read_bytes().count(b"\n") >= count:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.01)


def run_cases(checkout: Path, out: Path, names: list[str]) -> None:
    """Runs cases with the code of a checkout, which has to be the one that is imported."""
    import torch

    import ttt_video

    assert Path(ttt_video.__file__).is_relative_to(checkout)
    torch.set_num_threads(1)
    sys.path.insert(0, str(checkout / "tools"))  # as Python does for a script
    tool = load_tool(checkout, "stream_eval")
    for name in names:
        given = arguments(name, out)
        if name == "killed":
            given.insert(0, "--resume")
            command = [sys.executable, str(checkout / "tools/stream_eval.py"), *given]
            kill_after_rows(command, out / name / "frames.jsonl", 3)
        print(f"running {name}", file=sys.stderr)
        with redirect_stdout(io.StringIO()):
            tool.main(given)
    for table, rows in TABLES.items():
        if not set(rows) <= set(names):
            continue
        printed = io.StringIO()
        with redirect_stdout(printed):
            folders = [str(out / row) for row in rows]
            load_tool(checkout, "tabulate").main(["--format", "csv", *folders])
        (out / f"{table}.csv").write_text(printed.getvalue(), encoding="utf-8")


def numbers(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value of a JSON value with its place, without times and machine facts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in NOT_NUMBERS and not key.endswith("_seconds"):
                yield from numbers(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{place}[{i}]")
    else:
        yield place, value


def compare(before: Any, after: Any) -> tuple[list[str], list[str]]:
    """Returns the differences of two JSON values, and the places that only the second has."""
    old, new = dict(numbers(before)), dict(numbers(after))
    differences = [
        f"{place}: {value!r} became {new[place]!r}" if place in new else f"{place} is gone"
        for place, value in old.items()
        if place not in new or new[place] != value
    ]
    return differences, [place for place in new if place not in old]


def read_case(folder: Path) -> dict[str, Any]:
    """Returns the rows of a run by video and frame, and its summary."""
    rows = [json.loads(line) for line in (folder / "frames.jsonl").read_text("utf-8").splitlines()]
    found: dict[str, Any] = {f"{row['video_id']}/{row['frame_index']}": row for row in rows}
    found["summary"] = json.loads((folder / "summary.json").read_text("utf-8"))
    return found


def read_table(file: Path) -> list[dict[str, str]]:
    """Returns the rows of a table without the times of methods."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [
            {k: v for k, v in row.items() if "seconds" not in k} for row in csv.DictReader(lines)
        ]


def run_side(revision: str | None, folder: Path, data: Path, names: list[str]) -> None:
    """Runs the cases with a revision's code, the working tree's for None, into ``folder``."""
    checkout = ROOT
    if revision is not None:
        checkout = folder.parent / f"{folder.name}_code"
        command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "-f"]
        subprocess.run([*command, str(checkout), revision], check=True, capture_output=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(checkout), os.getenv("PYTHONPATH")])),
        "DETECTRON2_DATASETS": str(data),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    try:
        if not data.exists():
            for layout, seed in (("kitti_step", "2000"), ("coco_videos", "2010")):
                flags = ["--layout", layout, "--seed", seed, "--videos", "2", "--frames", "5"]
                size = ["--height", "64", "--width", "128", "--output", str(data / layout)]
                tool = str(checkout / "tools/make_world.py")
                subprocess.run([sys.executable, tool, *flags, *size], env=environment, check=True)
        command = [sys.executable, __file__, "--run", str(checkout), str(folder), "--only", *names]
        log = folder / "log.txt"
        with log.open("w") as file:
            ended = subprocess.run(command, env=environment, stdout=file, stderr=file)
        if ended.returncode:
            sys.exit(f"{revision or 'the working tree'}: {log.read_text('utf-8')[-3000:]}")
    finally:
        if revision is not None:
            command = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(checkout)]
            subprocess.run(command, check=True, capture_output=True)


def knows(revision: str, case: str) -> bool:
    """Says whether a revision has the method that a case is named after, if it is."""
    command = ["git", "-C", str(ROOT), "show", f"{revision}:configs/methods.yaml"]
    methods = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return case not in METHODS or f"\n{case}:" in methods


def report(before: Path, after: Path, names: list[str]) -> int:
    """Prints one line per case and returns the number of cases that differ."""
    differing = 0
    for name in names:
        differences, added = compare(read_case(before / name), read_case(after / name))
        differing += bool(differences)
        print(f"{name}: {f'{len(differences)} DIFFER' if differences else 'same'}", end="")
        keys = sorted({place.rpartition(".")[2] for place in added})
        print(f"; new: {', '.join(keys)}" if keys else "")
        print("".join(f"    {line}\n" for line in differences[:3]), end="")
    for table in sorted(path.name for path in before.glob("*.csv")):
        same = read_table(before / table) == read_table(after / table)
        differing += not same
        print(f"{table}: {'same' if same else 'DIFFERS'}")
    return differing


def main() -> None:
    """Runs both sides and compares them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="before, and after")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--run", nargs=2, metavar=("CHECKOUT", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_cases(Path(args.run[0]), Path(args.run[1]), args.only)
        return
    if len(args.revisions) not in (1, 2):
        parser.error("give one revision, or two")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        before, after = folder / "before", folder / "after"
        names = [name for name in args.only if all(knows(r, name) for r in args.revisions)]
        if left_out := sorted({*args.only} - {*names}):
            print(f"not in {' and '.join(args.revisions)}: {', '.join(left_out)}")
        for side, revision in zip((before, after), [*args.revisions, None], strict=False):
            side.mkdir()
            run_side(revision, side, folder / "data", names)
        differing = report(before, after, names)
    print(f"{differing} differ" if differing else "all the same")
    sys.exit(bool(differing))


if __name__ == "__main__":
    main()
