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

OURS = "ttt_video"
HUGGING_FACE = "huggingface"

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
        ``share_of_peak`` if operations are counted) and ``speedup``: by peer, the :func:`spread` of
        its seconds over ours, round by round.
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
    ours = runs[OURS]["seconds"]["all"]
    result["speedup"] = {
        name: spread([b / a for a, b in zip(ours, run["seconds"]["all"], strict=True)])
        for name, run in runs.items()
        if name != OURS
    }
    return result
