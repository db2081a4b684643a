"""Measures what a frame costs on a GPU, part by part, against targets and the reference path.

The reference path is PyTorch's own operators without replayed graphs, which every device runs. The
same numbers come of both within rounding; :func:`_parity` says within how much.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from costs.clock import measure, peak_memory, reset_peak_memory, spread, synchronize
from costs.comparison import Options
from costs.environment import copy_peak, matmul_peak
from costs.flops import count_flops, kernels
from costs.gpu_summary import NOW, summary
from costs.inputs import frames, model_of, write_video
from costs.loop import tool_loop
from ttt_video.adaptation import SlidingWindow, build_adapter, build_window
from ttt_video.adaptation.base import module_mode
from ttt_video.config import load_config
from ttt_video.stream import Stream

BEFORE = "reference"

KERNELS_SHOWN = 20


@dataclass(frozen=True)
class Target:
    """Seconds that a row should take on one H100 or H200 in bf16, full Swin-S, 618x2048."""

    least: float
    aim: float


TARGETS = {
    "prediction": Target(0.020, 0.010),
    "step": Target(0.20, 0.09),
    "frame, release": Target(0.25, 0.10),
    "frame, realtime": Target(0.050, 0.033),
    "frame, small model": Target(0.05, 0.05),
}


@dataclass(frozen=True)
class Configs:
    """The configs of the rows.

    Attributes:
        full: config file of the full model.
        small: config file of the small model; None leaves its row out.
        opts: KEY VALUE overrides of the full model's.
    """

    full: str
    small: str | None = "quick/stream_world.yaml"
    opts: tuple[str, ...] = ()

    def load(self, preset: str | None, *opts: str) -> CfgNode:
        """Returns the full model's config with bf16 for steps and predictions."""
        return load_config(self.full, preset, [*_BF16, *self.opts, *opts])


_BF16 = ("TTT.PRECISION", "bf16", "TTT.PREDICT_PRECISION", "bf16")
_REFERENCE = ("TTT.CUDA_GRAPHS", "off", "TTT.MICRO_BATCH_SIZE", "8")
_OURS = ("TTT.CUDA_GRAPHS", "auto", "TTT.MICRO_BATCH_SIZE", "0")
_VARIANTS = {NOW: ("auto", _OURS), BEFORE: ("off", _REFERENCE)}


PARTS = (
    "parity",
    "prediction",
    "step",
    "frame, release",
    "frame, realtime",
    "frame, small model",
    "around the model",
    "profile",
    "memory",
)
"""Parts are measured in this order."""


def gpu(
    _: CfgNode, options: Options, *, configs: Configs, only: Collection[str] = PARTS
) -> dict[str, Any]:
    """Measures all rows; see the module.

    Args:
        _: unused: each row has a config of its own.
        options: ``sizes``' first is that of the full model's frames; ``steps`` and ``warmup``;
            ``peers`` asks for the reference path's seconds, too.
        configs: of the models.
        only: parts to measure, of :data:`PARTS`.

    Returns:
        ``peaks`` (FLOP/s of bf16 products and bytes/s of copies), ``rows`` (by name: seconds of
        both paths, targets), ``memory``, ``parity``, ``profile`` (busy share and kernels by time).
    """
    size = options.sizes[0]
    device = torch.device(configs.load(None).MODEL.DEVICE)
    result: dict[str, Any] = {
        "peaks": {
            "matmul_flop_per_second": matmul_peak(device, "bf16"),
            "copy_bytes_per_second": copy_peak(device),
        },
        "rows": {},
    }
    variants = {NOW: _VARIANTS[NOW]}
    if options.peers:
        variants[BEFORE] = _VARIANTS[BEFORE]
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "parity": lambda: _parity(configs, size),
        "prediction": lambda: _prediction(configs, size, variants, options),
        "step": lambda: _step(configs, size, variants, options),
        "frame, release": lambda: _frames(configs, "release", size, variants, options),
        "frame, realtime": lambda: _frames(configs, "realtime", size, variants, options),
        "frame, small model": lambda: _small(configs, variants, options),
        "around the model": lambda: _around(configs, size, options),
        "profile": lambda: _profile(configs, size),
        "memory": lambda: _memory(configs, size),
    }
    for name in PARTS:
        if name not in only or (name == "frame, small model" and configs.small is None):
            continue
        start = time.perf_counter()
        found = measures[name]()
        found["measured_in_seconds"] = time.perf_counter() - start
        if name in TARGETS:
            found["target"] = {"least": TARGETS[name].least, "aim": TARGETS[name].aim}
            result["rows"][name] = found
        else:
            result[name] = found
        print(summary(name, found), flush=True)  # what is measured is told, whatever comes after
    return result


def _prediction(
    configs: Configs, size: tuple[int, int], variants: dict[str, Any], options: Options
) -> dict[str, Any]:
    frame = frames(1, *size)(0)
    works, flops = {}, 0
    for name, (choice, opts) in variants.items():
        cfg = configs.load("release", *opts)
        adapter = build_adapter(cfg, model_of(cfg))
        sample = SlidingWindow(1, cfg.MODEL.DEVICE).push(frame)
        works[name] = _under(choice, partial(adapter.predict, sample))
        if not flops:
            with torch.no_grad(), module_mode(adapter.model, training=False):
                flops = count_flops(partial(adapter.model, [sample]))
    return _runs(works, flops, configs, options)


def _step(
    configs: Configs, size: tuple[int, int], variants: dict[str, Any], options: Options
) -> dict[str, Any]:
    works, adapters = {}, {}
    for name, (choice, opts) in variants.items():
        cfg = configs.load("release", *opts)
        adapter, window = _adapter(cfg, size)
        generator = torch.Generator().manual_seed(0)
        adapters[name] = adapter
        works[name] = _under(choice, partial(adapter.adapt, window, generator))
    cfg = configs.load("release", *_REFERENCE, "TTT.BATCH_SIZE", "1")
    adapter, window = _adapter(cfg, size)
    generator = torch.Generator().manual_seed(0)
    flops = count_flops(lambda: adapter.adapt(window, generator))
    found = _runs(works, flops * configs.load("release").TTT.BATCH_SIZE, configs, options)
    for name, run in found["runs"].items():
        run["facts"] = adapters[name].facts()
    return found


def _adapter(cfg: CfgNode, size: tuple[int, int], model: Any = None) -> tuple[Any, SlidingWindow]:
    """Returns an adapter, of a new model if none is given, and a full window of noise."""
    adapter = build_adapter(cfg, model or model_of(cfg))
    window = build_window(cfg, cfg.MODEL.DEVICE)
    count = window.size or 16
    video = frames(count, *size)
    for index in range(count):
        window.push(video(index))
    return adapter, window


def _under(choice: str, work: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with kernels(choice):
            return work()

    return run


def _runs(
    works: dict[str, Callable[[], object]], flops: int, configs: Configs, options: Options
) -> dict[str, Any]:
    device = torch.device(configs.load(None).MODEL.DEVICE)
    runs = measure(works, device, steps=options.steps, warmup=options.warmup)
    peak = matmul_peak(device, "bf16")
    for run in runs.values():
        run["share_of_peak"] = flops / run["seconds"]["median"] / peak
    return {"runs": runs, "flop": flops}


def _frames(
    configs: Configs,
    preset: str,
    size: tuple[int, int],
    variants: dict[str, Any],
    options: Options,
) -> dict[str, Any]:
    """Measures whole frames in a stream: push, adapt, predict."""
    runs = {}
    for name, (choice, opts) in variants.items():
        own = [x for x in opts if preset == "release"] or list(opts[:2])  # realtime: one sample
        cfg = configs.load(preset, *own)
        with kernels(choice):
            runs[name] = _stream(cfg, size, options)
    return {"runs": runs}


def _small(configs: Configs, variants: dict[str, Any], options: Options) -> dict[str, Any]:
    runs = {}
    for name, (choice, opts) in variants.items():
        device = configs.load(None).MODEL.DEVICE  # the small model's config asks for a CPU
        cfg = load_config(configs.small, None, [*_BF16, *opts[:2], "MODEL.DEVICE", device])
        with kernels(choice):
            runs[name] = _stream(cfg, (128, 256), options)
    return {"runs": runs}


def _stream(cfg: CfgNode, size: tuple[int, int], options: Options) -> dict[str, Any]:
    device = torch.device(cfg.MODEL.DEVICE)
    stream = Stream.from_config(cfg, model_of(cfg))
    video = frames(8, *size)
    seconds, steps, predictions = [], [], []
    reset_peak_memory(device)
    for index in range(options.warmup + options.steps):
        start = time.perf_counter()
        result = stream.step(video(index))
        synchronize(device)
        if index >= options.warmup:
            seconds.append(time.perf_counter() - start)
            steps.append(result.adapt_seconds)
            predictions.append(result.predict_seconds)
    return {
        "seconds": spread(seconds),
        "step": spread(steps)["median"],
        "prediction": spread(predictions)["median"],
        "peak_memory_bytes": peak_memory(device),
    }


def _around(configs: Configs, size: tuple[int, int], options: Options) -> dict[str, Any]:
    """Measures the share of a frame outside step and prediction, with decoding and an overlay."""
    cfg = configs.load("release", *_OURS)
    count = options.warmup + options.steps
    with tempfile.TemporaryDirectory() as folder, kernels("auto"):
        name = write_video(Path(folder), count, *size, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
        rows = tool_loop(cfg, name, Path(folder) / "run", overlay=True)[options.warmup :]
    frame = spread([row["frame"] for row in rows])["median"]
    model = spread([row["step"] + row["prediction"] for row in rows])["median"]
    return {"seconds": frame - model, "share": (frame - model) / frame, "frame_seconds": frame}


def _memory(configs: Configs, size: tuple[int, int]) -> dict[str, Any]:
    """Says what a step of the release needs, with model and optimizer, and how long it takes."""
    model = model_of(configs.load("release"))
    cases = []
    for micro_batch, checkpoint in ((32, False), (16, False), (8, False), (4, False), (2, True)):
        opts = ("TTT.MICRO_BATCH_SIZE", str(micro_batch), "TTT.CHECKPOINT", str(checkpoint))
        adapter, window = _adapter(configs.load("release", *opts), size, model)
        generator = torch.Generator().manual_seed(0)
        device = adapter.device
        reset_peak_memory(device)
        seconds = []
        for _ in range(3):  # the second one is recorded
            start = time.perf_counter()
            adapter.adapt(window, generator)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        case = {"micro_batch": micro_batch, "checkpoint": checkpoint, "seconds": seconds[-1]}
        cases.append({**case, "peak_memory_bytes": peak_memory(device)})
        adapter.drop_graphs()
        del adapter, window
    return {"cases": cases}


def _parity(configs: Configs, size: tuple[int, int]) -> dict[str, Any]:
    """Compares predictions and gradients with those of the reference path in fp32.

    Returns:
        ``difference``: by path, the relative difference (L2) of ``scores``, ``gradient`` and
        ``loss``, and the share of pixels with the ``same_classes``.
    """
    reference = ("fp32", "off", "off")
    cases = {
        "fp32": ("fp32", "auto", "auto"),
        "bf16": ("bf16", "auto", "auto"),
        "bf16, reference path": ("bf16", "off", "off"),
    }
    scores, gradients, loss = _outputs(configs, size, *reference)
    found: dict[str, dict[str, float]] = {}
    for name, case in cases.items():
        own_scores, own_gradients, own_loss = _outputs(configs, size, *case)
        same = (own_scores.argmax(0) == scores.argmax(0)).float().mean()
        found[name] = {
            "scores": _relative(own_scores, scores),
            "same_classes": float(same),
            "loss": abs(own_loss - loss) / loss,
            "gradient": _relative(own_gradients, gradients),
        }
    return {"difference": found}


def _outputs(
    configs: Configs, size: tuple[int, int], precision: str, graphs: str, choice: str
) -> tuple[Tensor, Tensor, float]:
    """Returns scores (K, H, W) of a frame, the gradient of a step on two samples and its loss."""
    cfg = configs.load(
        "release",
        *("TTT.PRECISION", precision, "TTT.PREDICT_PRECISION", precision),
        *("TTT.CUDA_GRAPHS", graphs, "TTT.BATCH_SIZE", "2", "TTT.STEP_MODE", "eval"),
        *("TTT.OPTIMIZER.NAME", "SGD", "TTT.OPTIMIZER.BASE_LR", "1.0"),
        *("TTT.OPTIMIZER.WEIGHT_DECAY", "0.0", "TTT.OPTIMIZER.CLIP_NORM", "0.0"),
        *("TTT.OPTIMIZER.MOMENTUM", "0.0", "TTT.OPTIMIZER.MAX_LOSS_GROWTH", "0.0"),
        *("TTT.OPTIMIZER.BACKBONE_MULTIPLIER", "1.0"),
    )
    with kernels(choice):
        adapter, window = _adapter(cfg, size)
        scores = adapter.predict(window.current)["sem_seg"].float().cpu()
        before = torch.cat([p.detach().flatten() for p in adapter.parameters]).clone()
        record = adapter.adapt(window, torch.Generator().manual_seed(0))
        after = torch.cat([p.detach().flatten() for p in adapter.parameters])
    return scores, (before - after).cpu(), record["loss_recon"]


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm())


def _profile(configs: Configs, size: tuple[int, int]) -> dict[str, Any]:
    """Says for how much of a step and a prediction the device is busy, and with which kernels."""
    cfg = configs.load("release", *_OURS)
    adapter, window = _adapter(cfg, size)
    generator = torch.Generator().manual_seed(0)
    works: dict[str, Callable[[], object]] = {
        "step": lambda: adapter.adapt(window, generator),
        "prediction": lambda: adapter.predict(window.current),
    }
    device = torch.device(cfg.MODEL.DEVICE)
    profiles = {}
    if device.type == "cuda":
        with kernels("auto"):
            for name, work in works.items():
                work()
                work()
                profiles[name] = _profiled(work, device)
    return {"profiles": profiles}


def _profiled(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    events = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in events) / 1e6
    return {
        "wall": wall,
        "busy": total / wall,
        "launches": sum(e.count for e in events),
        "kernels": [
            {"name": e.key[:90], "count": e.count, "seconds": e.self_device_time_total / 1e6}
            for e in events[:KERNELS_SHOWN]
        ],
    }
