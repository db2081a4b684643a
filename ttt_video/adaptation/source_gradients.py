"""Measures gradients on training images, to scale a stream's gradients by them.

``TTT.OPTIMIZER.SOURCE_GRADIENTS`` names the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from ..modeling.interface import is_within
from .base import module_mode
from .precision import tf32
from .window import Sample

if TYPE_CHECKING:
    from .gradient import GradientAdapter


def gradient_scales(
    moving: Collection[str], source: Mapping[str, Tensor], parts: Collection[str]
) -> dict[str, float]:
    """Returns the factor on each moving parameter's gradient, by name.

    A tensor with hardly a gradient on training images counts as having a fifth of the median. One
    is the bias of attention's keys, on which the output does not depend.

    Args:
        moving: names of the parameters that move.
        source: of :func:`measure_gradients`.
        parts: names of the parts that the method's loss depends on; empty: any.

    Raises:
        UserError: the file was measured with another model or method.
    """
    missing = {*moving} - source.keys()
    if missing:
        raise UserError(
            f"TTT.OPTIMIZER.SOURCE_GRADIENTS has nothing for {min(missing)}: measure it with "
            "this model and method by tools/measure_gradients.py"
        )
    foreign = {name.split(".")[0] for name in source if not is_within(name, parts)}
    if parts and foreign:
        raise UserError(
            f"TTT.OPTIMIZER.SOURCE_GRADIENTS has gradients of {min(foreign)}, of which the "
            "loss of this method does not depend: they are another method's. Measure its own "
            "by tools/measure_gradients.py, or set it to '' and choose TTT.OPTIMIZER.NAME, "
            "BASE_LR and CLIP_NORM for this loss"
        )
    sizes = {name: float(source[name]) for name in moving}
    least = median(sizes.values()) / 5
    return {name: 1.0 / max(size, least) for name, size in sizes.items()}


def measure_gradients(
    adapter: GradientAdapter, batches: Iterable[list[Sample]], generator: torch.Generator
) -> dict[str, Tensor]:
    """Measures how large the gradient of the adapter's loss is on a training set, by tensor.

    AdamW estimates the same on the stream itself, and so with what the stream does to gradients.

    Args:
        adapter: with its source weights, which stay as they are.
        batches: at least one batch of samples, as large as a stream's.
        generator: for the masks.

    Returns:
        By parameter, the root mean square of its gradient over elements and batches, () float32 on
        the CPU.
    """
    names = {name: p for name, p in adapter.model.named_parameters() if p.requires_grad}
    squares = {name: torch.zeros((), device=p.device) for name, p in names.items()}
    count = 0
    for batch in batches:
        with module_mode(adapter.model, adapter.training_step), tf32(adapter.device, False):
            losses = adapter.losses(batch, generator)
            torch.stack([v for k, v in losses.items() if k.startswith("loss_")]).sum().backward()
        count += 1
        for name, parameter in names.items():
            if parameter.grad is not None:
                squares[name] += parameter.grad.float().square().mean()
                parameter.grad = None
    return {name: (total / count).sqrt().cpu() for name, total in squares.items()}
