"""Measures what this project costs: seconds, memory and floating-point operations.

python tools/benchmark.py train --config joint_cityscapes.yaml --size 512 1024 --batch 1 --steps 3
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ttt_video.cli import add_config_arguments, load_config, run_tool
from ttt_video.engine.joint_training import TrainStep, amp_dtype
from ttt_video.engine.optimizer import build_optimizer
from ttt_video.errors import UserError
from ttt_video.files import write_atomically

PACKAGES = ("torch", "torchvision", "detectron2", "sal-detectron2", "numpy")
MASKS = 12  # per synthetic image, about what Cityscapes has


def argument_parser() -> argparse.ArgumentParser:
    """One subcommand per thing that is measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="steps of joint training on synthetic images")
    train.add_argument("--size", type=int, nargs=2, default=(512, 1024), metavar=("H", "W"))
    train.add_argument("--batch", type=int, default=1, metavar="N", help="images per step")
    train.set_defaults(measure=measure_training)
    for command in commands.choices.values():
        command.add_argument("--steps", type=int, default=3, metavar="N", help="measured")
        command.add_argument("--warmup", type=int, default=1, metavar="N", help="not measured")
        command.add_argument("--no-flops", action="store_true", help="do not count operations")
        command.add_argument("--output", metavar="FILE", help="also write the results as JSON")
        add_config_arguments(command)
    return parser


class GridSampleFlops(FlopCounterMode):
    """torch's counter, and the bilinear sampling that it leaves out.

    It counts 2 per multiply-add of matrix products, convolutions and attention, forward and
    backward. A bilinear sample is 4 multiply-adds; its backward makes two gradients.
    """

    def __init__(self) -> None:
        aten = torch.ops.aten
        super().__init__(
            display=False,
            custom_mapping={
                aten.grid_sampler_2d: _sampled(0),
                aten.grid_sampler_2d_backward: _sampled(1, factor=2),
            },
        )


def _sampled(image: int, factor: int = 1) -> Callable[..., int]:
    """Of a sampling whose arguments hold image (B, C, H, W) and grid (B, h, w, 2) from there on."""

    def count(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        values, grid = shapes[image], shapes[image + 1]
        return factor * 2 * 4 * values[0] * values[1] * grid[1] * grid[2]

    return count


def synthetic_batch(batch: int, height: int, width: int, num_classes: int) -> list[dict[str, Any]]:
    """Noise labelled with vertical stripes: the values change no cost."""
    generator = torch.Generator().manual_seed(0)
    stripes = torch.arange(width).mul(MASKS).div(width, rounding_mode="floor")
    masks = (stripes == torch.arange(MASKS)[:, None])[:, None].expand(-1, height, -1)
    inputs = []
    for _ in range(batch):
        instances = Instances((height, width))
        instances.gt_classes = torch.arange(MASKS) % num_classes
        instances.gt_masks = BitMasks(masks)
        size = (3, height, width)
        image = torch.randint(256, size, generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "instances": instances})
    return inputs


def measure_training(args: argparse.Namespace, cfg: CfgNode) -> dict[str, Any]:
    """Whole optimizer steps of joint training, as tools/train_net.py makes them."""
    torch.manual_seed(0)
    device = torch.device(cfg.MODEL.DEVICE)
    model = build_model(cfg)
    model.train()
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    height, width = args.size
    batch = synthetic_batch(args.batch, height, width, num_classes)
    step = TrainStep(
        model,
        [],  # no loader: data take no part in this
        build_optimizer(cfg, model),
        micro_batch_size=cfg.SOLVER.MICRO_BATCH_SIZE,
        dtype=amp_dtype(device, cfg.SOLVER.AMP.PRECISION) if cfg.SOLVER.AMP.ENABLED else None,
    )
    step.iter = 0

    def run() -> None:
        step.optimizer.zero_grad()
        step.accumulate_gradients(batch)
        step.scaler.unscale_(step.optimizer)
        step.scaler.step(step.optimizer)
        step.scaler.update()

    result: dict[str, Any] = {
        "batch": args.batch,
        "size": list(args.size),
        "precision": str(step.dtype or torch.float32).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        **measure(run, device, steps=args.steps, warmup=args.warmup),
    }
    if not args.no_flops:
        result["flop"] = training_flops(model, batch)
        result["flop_per_second"] = sum(result["flop"].values()) / result["seconds"]["median"]
    return result


def training_flops(model: Any, batch: list[dict[str, Any]]) -> dict[str, int]:
    """Floating-point operations of the two losses and their gradients, for the whole batch.

    Counted on the first image: every image costs the same. Gradients are those of all parameters.
    """

    def count(losses: Callable[[list[dict[str, Any]]], dict[str, Tensor]]) -> int:
        # Matrix products in place of fused attention, which the counter does not know on CPUs.
        with sdpa_kernel(SDPBackend.MATH), GridSampleFlops() as counter:
            torch.stack(list(losses(batch[:1]).values())).sum().backward()
        model.zero_grad()
        return counter.get_total_flops() * len(batch)

    return {
        "main_task": count(model.main_losses),
        "reconstruction": count(model.reconstruction_losses),
    }


def measure(
    run: Callable[[], None], device: torch.device, *, steps: int, warmup: int
) -> dict[str, Any]:
    """Seconds of each of ``steps`` calls after ``warmup`` others, and the peak memory of all."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds, cpu_seconds = [], []
    for _ in range(warmup + steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    measured = seconds[warmup:]
    return {
        "seconds": {
            "median": statistics.median(measured),
            "min": min(measured),
            "max": max(measured),
            "all": measured,
        },
        # Of all cores together; on a machine that does other things too, the number to believe.
        "cpu_seconds_median": statistics.median(cpu_seconds[warmup:]),
        "peak_memory_bytes": peak_memory(device),
    }


def peak_memory(device: torch.device) -> int:
    """Of the GPU's allocator, or the largest resident size of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(result: dict[str, Any]) -> str:
    """The numbers that matter, in a few lines."""
    seconds = result["seconds"]
    lines = [
        f"{result['environment']['device']}, {result['environment']['threads']} thread(s), "
        f"load {result['environment']['load']:.1f}",
        f"seconds  {seconds['median']:.3f} (median of {len(seconds['all'])}; "
        f"{seconds['min']:.3f} to {seconds['max']:.3f})",
        f"cpu      {result['cpu_seconds_median']:.3f} seconds, all cores together",
        f"memory   {result['peak_memory_bytes'] / 2**30:.2f} GiB at the peak",
    ]
    lines += [f"TFLOP    {flop / 1e12:.3f} {name}" for name, flop in result.get("flop", {}).items()]
    if "flop_per_second" in result:
        lines.append(f"TFLOP/s  {result['flop_per_second'] / 1e12:.3f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Parses, measures, writes."""
    args = argument_parser().parse_args(argv)
    for name in ("batch", "steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; give at least 1")
    if args.warmup < 0:
        raise UserError(f"--warmup is {args.warmup}; give at least 0")
    if args.config_file is None:
        raise UserError("no config; give --config FILE, such as --config joint_cityscapes.yaml")
    cfg = load_config(
        args.config_file, args.preset, args.opts, allow_unsafe_yaml=args.allow_unsafe_yaml
    )
    result = {
        "command": args.command,
        "config": args.config_file,
        "preset": args.preset,
        "overrides": args.opts,
        "environment": environment(torch.device(cfg.MODEL.DEVICE)),
        **args.measure(args, cfg),
    }
    print(report(result))
    if args.output is not None:
        text = json.dumps(result, indent=2) + "\n"
        write_atomically(Path(args.output), lambda part: part.write_text(text))
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_tool(main)
