"""Compares ours with its peers on the same work: first the numbers, then the seconds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from costs.clock import Work, measure, spread
from costs.environment import matmul_peak
from costs.flops import count_flops
from ttt_video.report.statistics import estimate

OURS = "ttt_video"
HUGGING_FACE = "huggingface"
FROZEN = "frozen"

TOLERANCE = 1e-3
"""Largest mean difference between outputs that must be equal, as a share of their spread."""


@dataclass(frozen=True)
class Options:
    """Says what to measure, and how often.

    Attributes:
        sizes: (height, width) of the images, px.
        batches: images at once; none: the measurement's own.
        precisions: names in :data:`~ttt_video.adaptation.precision.PRECISIONS`.
        steps: calls that count.
        warmup: calls before them.
        flops: also count operations.
        peers: also run the implementations to compare with.
    """

    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ("fp32",)
    steps: int = 3
    warmup: int = 1
    flops: bool = True
    peers: bool = True

    def cases(self, batch: int = 1) -> Iterator[dict[str, Any]]:
        """Yields every size, batch (``batch`` if none is asked for) and precision."""
        batches = self.batches or (batch,)
        for size, batch, precision in itertools.product(self.sizes, batches, self.precisions):
            yield {"size": list(size), "batch": batch, "precision": precision}


def difference(ours: Tensor, theirs: Tensor, what: str) -> float:
    """Returns the mean absolute difference over the spread of ``ours``.

    Raises:
        RuntimeError: it is more than rounding, so that comparing speeds would mean nothing.
    """
    ours, theirs = ours.detach().float(), theirs.detach().float()
    scale = ours.std() if ours.numel() > 1 else ours.abs().max()
    relative = float((ours - theirs).abs().mean() / scale)
    if not relative < TOLERANCE:
        raise RuntimeError(f"{what} differs between the models by {relative:.1e} of its spread")
    return relative


def compare(
    works: Mapping[str, Work], device: torch.device, options: Options, precision: str = "fp32"
) -> dict[str, Any]:
    """Measures seconds, memory and operations of each piece of work.

    Returns:
        ``runs`` by name (see :func:`costs.clock.measure`; with ``flop``, ``flop_per_second`` and
        ``share_of_peak`` if operations are counted), ``speedup``: by peer, the :func:`spread` of
        its seconds over ours, round by round; and ``cpu_speedup``: the mean of the same ratios of
        CPU seconds and its 95 % ``interval``, None for one round.
    """
    runs = measure(works, device, steps=options.steps, warmup=options.warmup)
    result: dict[str, Any] = {"runs": runs}
    if options.flops:
        peak = matmul_peak(device, precision)
        result["matmul_flop_per_second"] = peak
        for name, work in works.items():
            runs[name]["flop"] = count_flops(work)
            speed = runs[name]["flop"] / runs[name]["seconds"]["median"]
            runs[name].update(flop_per_second=speed, share_of_peak=speed / peak)
    ours, peers = runs[OURS], {name: run for name, run in runs.items() if name != OURS}
    result["speedup"] = {
        name: spread(_ratios(run["seconds"]["all"], ours["seconds"]["all"]))
        for name, run in peers.items()
    }
    result["cpu_speedup"] = {}
    for name, run in peers.items():
        found = estimate(_ratios(run["cpu_seconds"], ours["cpu_seconds"]))
        result["cpu_speedup"][name] = {"mean": found.mean, "interval": found.interval}
    return result


def _ratios(theirs: list[float], ours: list[float]) -> list[float]:
    return [b / a for a, b in zip(ours, theirs, strict=True)]
