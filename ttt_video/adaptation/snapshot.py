"""Keeps what a gradient step may have to be undone to, and forgets what an optimizer has learnt."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Snapshot:
    """Copies some tensors and, if there is one, an optimizer's state.

    No copy is made of a state that is ``forgotten``: it is twice the model in zeros.
    """

    def __init__(
        self,
        tensors: Iterable[Tensor],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        forgotten: bool = False,
    ) -> None:
        self._tensors = [*tensors]
        self._values = _copies(self._tensors)
        self._optimizer = optimizer
        self._state = [] if optimizer is None or forgotten else state_tensors(optimizer)
        self._state_values = _copies(self._state)

    @torch.no_grad()
    def distances(self) -> list[Tensor]:
        """Returns how far each tensor has moved since, as L2 norms of shape ()."""
        return [*torch._foreach_norm(torch._foreach_sub(self._tensors, self._values))]

    @torch.no_grad()
    def restore(self) -> None:
        """Restores everything in place, bit for bit.

        State that the optimizer has made since becomes that of a fresh one.
        """
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._values)
        if self._optimizer is not None:
            forget(self._optimizer)
            if self._state:
                torch._foreach_copy_(self._state, self._state_values)


@torch.no_grad()
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Returns copies, on a GPU by few kernels."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Returns the tensors of the state of SGD or AdamW: averages, and the numbers of steps."""
    states = optimizer.state.values()
    return [value for own in states for value in own.values() if isinstance(value, Tensor)]


@torch.no_grad()
def forget(optimizer: torch.optim.Optimizer) -> None:
    """Makes SGD or AdamW as if it had never taken a step, in place.

    A state of zeros and none at all lead to the same steps bit for bit, also with Nesterov's
    momentum. (SGD with dampening would differ; nothing here has it.) To free a thousand tensors and
    make them anew costs 29 ms on a GPU, and a captured graph needs them where they are.
    """
    if tensors := state_tensors(optimizer):
        torch._foreach_zero_(tensors)


def knows_nothing(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether SGD or AdamW is as if it had never taken a step."""
    return not any(bool(tensor.any()) for tensor in state_tensors(optimizer))
