"""Replays the forward and backward pass of a gradient step's micro-batches as CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..modeling.graphs import Capture, GraphRunner, autocast_in_graphs, surroundings

if TYPE_CHECKING:
    from .gradient import GradientAdapter
    from .window import Sample


class ReplayedSteps:
    """Adds micro-batches' gradients up in tensors that stay where they are.

    A graph writes to the memory of the gradients that it was recorded with. So each parameter keeps
    the gradient tensor that it first got, and a step starts by filling those with zeros. A
    parameter that the loss does not depend on gets none, and keeps ``grad`` None: no optimizer
    touches it. All decisions about a step, and the update itself, are those of an eager step.

    Attributes:
        runner: records and replays.
    """

    def __init__(self, adapter: GradientAdapter, capture: Capture) -> None:
        self._adapter = adapter
        self._gradients: dict[nn.Parameter, Tensor] = {}
        model = adapter.model
        self.runner: GraphRunner[dict[str, Tensor]] = GraphRunner(
            self._losses_and_gradients,
            capture,
            name="gradient step",
            weights=[*model.parameters(), *model.buffers()],
        )

    def start(self) -> None:
        """Begins a step: gradients are zero, in their own tensors."""
        if self._gradients:
            torch._foreach_zero_([*self._gradients.values()])
        for parameter in self._adapter.parameters:
            parameter.grad = self._gradients.get(parameter)

    def drop_graphs(self) -> bool:
        """Drops the graphs, and returns whether there were any; gradients keep their tensors."""
        return self.runner.clear()

    def __call__(
        self, batch: list[Sample], generator: torch.Generator, share: float
    ) -> dict[str, Tensor] | None:
        """Adds a micro-batch's share of the gradient; returns its shares of the scalars.

        None, and nothing drawn or added, if the method has no inputs of a fixed shape for it.
        """
        adapter = self._adapter
        before = generator.get_state()
        inputs = adapter.inputs(batch, generator)
        if inputs is None:
            generator.set_state(before)
            return None
        device = adapter.device
        # They are inputs, so that a last, smaller micro-batch of any batch is the same graph.
        factors = (
            torch.full((), share, dtype=torch.float64, device=device),
            adapter.scaler.scale(torch.ones((), device=device)),
        )
        key = (adapter.training_step, adapter.dtype, surroundings(device.type))
        values = self.runner(*inputs, *factors, key=key)
        for parameter in adapter.parameters:
            if parameter.grad is not None:
                self._gradients.setdefault(parameter, parameter.grad)
        return {name: value.clone() for name, value in values.items()}

    def _losses_and_gradients(self, *inputs: Tensor) -> dict[str, Tensor]:
        *own, share, scale = inputs
        adapter = self._adapter
        inside = torch.is_autocast_enabled(adapter.device.type)
        with autocast_in_graphs(adapter.device.type), adapter.autocast(cache=not inside):
            losses = adapter.losses_of(*own)
        total = total_of(losses)
        if total.requires_grad:
            (total * share.to(total.dtype) * scale).backward()
        share = share.float()
        return {name: loss.detach().float() * share for name, loss in losses.items()}


def total_of(losses: Mapping[str, Tensor]) -> Tensor:
    """Returns what a step minimises, the sum of the ``loss_*``, as a scalar tensor."""
    return torch.stack([v for k, v in losses.items() if k.startswith("loss_")]).sum()
