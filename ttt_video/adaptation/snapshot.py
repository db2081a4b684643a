"""Keeps what a gradient step may have to be undone to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Snapshot:
    """Copies some tensors and, if there is one, an optimizer's state."""

    def __init__(
        self, tensors: Iterable[Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._tensors = [*tensors]
        self._values = _copies(self._tensors)
        self._optimizer = optimizer
        states = {} if optimizer is None else optimizer.state
        found = [v for own in states.values() for v in own.values() if isinstance(v, Tensor)]
        copies = iter(_copies(found))
        self._state = {
            parameter: {k: next(copies) if isinstance(v, Tensor) else v for k, v in own.items()}
            for parameter, own in states.items()
        }

    @torch.no_grad()
    def distances(self) -> list[Tensor]:
        """Returns how far each tensor has moved since, as L2 norms of shape ()."""
        return [*torch._foreach_norm(torch._foreach_sub(self._tensors, self._values))]

    @torch.no_grad()
    def restore(self) -> None:
        """Restores everything, bit for bit."""
        if self._tensors:
            torch._foreach_copy_(self._tensors, self._values)
        if self._optimizer is not None:
            self._optimizer.state.clear()
            self._optimizer.state.update(self._state)


@torch.no_grad()
def _copies(tensors: list[Tensor]) -> list[Tensor]:
    """Returns copies, made by a few kernels on a GPU and not by one for each tensor."""
    copies = [torch.empty_like(tensor) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies
