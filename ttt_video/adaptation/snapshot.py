"""What a gradient step may have to be undone to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Snapshot:
    """A copy of some tensors and of an optimizer's state, as they are now."""

    def __init__(self, tensors: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> None:
        self._tensors = [*tensors]
        self._values = [tensor.detach().clone() for tensor in self._tensors]
        self._optimizer = optimizer
        self._state = {
            parameter: {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in own.items()
            }
            for parameter, own in optimizer.state.items()
        }

    @torch.no_grad()
    def distances(self) -> list[Tensor]:
        """L2 norm of how far each tensor has moved since, () each."""
        return [*torch._foreach_norm(torch._foreach_sub(self._tensors, self._values))]

    @torch.no_grad()
    def restore(self) -> None:
        """Everything is again as it was, bit for bit."""
        torch._foreach_copy_(self._tensors, self._values)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
