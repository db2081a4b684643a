"""Casts the weights of a model's products at once, instead of one by one where they are used."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .interface import is_within

PRODUCTS = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
"""Modules of which autocast uses weights and biases in its own type alone."""


class CastWeights(nn.Module):
    """Calls a model's ``replayed`` with weights that few kernels have cast to autocast's type.

    Autocast issues a kernel for each weight, some hundred in a prediction. The results are the
    same bit for bit, and without autocast the model's own weights are used. It is for calls without
    gradients, which weights that are cast here do not get.
    """

    def __init__(self, model: nn.Module, parts: Collection[str]) -> None:
        """Takes the model and the names of its parts that ``replayed`` uses."""
        super().__init__()
        self.model = model
        self._weights = {
            f"model.{prefix}{name}": parameter
            for prefix, module in _modules(model, parts)
            for name, parameter in module.named_parameters(recurse=False)
        }
        self._cast: dict[torch.dtype, dict[str, Tensor]] = {}

    def forward(self, *inputs: Tensor) -> Any:
        """Returns ``model.replayed`` of the inputs."""
        return self.model.replayed(*inputs)  # type: ignore[operator]

    def replayed(self, *inputs: Tensor) -> Any:
        """Casts the weights as they are now and returns what the model's method does of them."""
        kind = next(iter(self._weights.values())).device.type if self._weights else "cpu"
        if not self._weights or not torch.is_autocast_enabled(kind):
            return self(*inputs)
        dtype = torch.get_autocast_dtype(kind)
        if dtype not in self._cast:
            with torch.inference_mode(mode=False):  # else they could not be written outside of it
                self._cast[dtype] = {
                    name: torch.empty_like(weight, dtype=dtype, requires_grad=False)
                    for name, weight in self._weights.items()
                }
        cast = self._cast[dtype]
        torch._foreach_copy_([*cast.values()], [*self._weights.values()])
        return functional_call(self, cast, inputs)


def _modules(model: nn.Module, parts: Collection[str]) -> list[tuple[str, nn.Module]]:
    """Returns the modules of :data:`PRODUCTS` in some parts, with what their weights' names begin
    with."""
    return [
        (f"{name}.", module)
        for name, module in model.named_modules()
        if isinstance(module, PRODUCTS) and is_within(name, parts)
    ]
