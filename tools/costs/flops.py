"""Counts floating-point operations with torch's counter, and bytes of saved activations."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ttt_video.modeling import deformable_cpu  # noqa: F401 - defines operators that are counted here
from ttt_video.modeling.kernels import VARIABLE


class GridSampleFlops(FlopCounterMode):
    """Adds bilinear sampling to torch's counter.

    The counter counts 2 per multiply-add of matrix products, convolutions and attention, forward
    and backward. A bilinear sample is 4 multiply-adds; its backward makes two gradients.
    """

    def __init__(self) -> None:
        aten = torch.ops.aten
        super().__init__(
            display=False,
            custom_mapping={
                aten.grid_sampler_2d: _sampled(0),
                aten.grid_sampler_2d_backward: _sampled(1, factor=2),
                # The gradient of the places yields that of the weights on the way.
                torch.ops.ttt_video.deformable_attention: _attended(),
                torch.ops.ttt_video.deformable_attention_backward: _attended(factor=2),
            },
        )


def _sampled(image: int, factor: int = 1) -> Callable[..., int]:
    """Counts a sampling; argument ``image`` is (B, C, H, W), the next is the grid (B, h, w, 2)."""

    def count(*shapes: Any, out_shape: Any = None, **kwargs: Any) -> int:
        values, grid = shapes[image], shapes[image + 1]
        return factor * 2 * 4 * values[0] * values[1] * grid[1] * grid[2]

    return count


def _attended(factor: int = 1) -> Callable[..., int]:
    """Counts deformable attention: as many samples as weights, of D numbers each."""

    def count(
        value: Any, sizes: Any, locations: Any, weights: Any, *shapes: Any, **kwargs: Any
    ) -> int:
        return factor * 2 * 4 * value[3] * math.prod(weights)

    return count


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Sets whether Triton's kernels run in the block: "auto", "on" or "off"."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def count_flops(work: Callable[[], object]) -> int:
    """Runs a piece of work once and returns its floating-point operations.

    It runs PyTorch's operations, because the counter does not see into Triton's kernels.
    """
    # The counter does not know fused attention on CPUs, but it knows matrix products.
    with kernels("off"), sdpa_kernel(SDPBackend.MATH), GridSampleFlops() as counter:
        work()
    return counter.get_total_flops()


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Returns the bytes that a forward pass keeps for backward, without the model's tensors."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = forward()
    del alive  # it lived until here, so that no address was used twice
    return sum(kept.values())


def parameter_bytes(model: nn.Module) -> dict[str, int]:
    """Returns the bytes of the parameters of each of the model's parts that has any."""
    return {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in model.named_children()
        if any(True for _ in part.parameters())
    }
