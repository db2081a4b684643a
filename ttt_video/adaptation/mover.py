"""Moves parameters along their gradients, and tells how far that goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.optimizer import load_optimizer
from .settings import OptimizerSettings
from .snapshot import Snapshot, forget, knows_nothing


class Mover:
    """Takes the updates of gradient steps: scales and clips gradients, steps, and pulls back.

    Attributes:
        forgotten: whether the optimizer has not stepped since it was made or forgot.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        settings: OptimizerSettings,
        moving: Mapping[str, nn.Parameter],
        source: Sequence[Tensor],
        scales: Mapping[str, float],
    ) -> None:
        """
        Args:
            optimizer: of the parameters.
            settings: that it was built with.
            moving: the parameters by name.
            source: their source weights, in the same order.
            scales: factors of their gradients by name; empty: there are none.
        """
        self.optimizer, self.settings = optimizer, settings
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.forgotten = True
        self._moving: list[Tensor] = [*moving.values()]
        self._source = [*source]
        # A GPU takes numbers in one kernel; a CPU would make tensors of them in every step.
        factor: Any = torch.tensor if self.parameters[0].device.type == "cpu" else float
        self._scales = {moving[name]: factor(scale) for name, scale in scales.items()}

    def scale_gradients(self) -> None:
        """Multiplies the gradients by their factors."""
        own = [(p.grad, scale) for p, scale in self._scales.items() if p.grad is not None]
        scales: list[Any] = [scale for _, scale in own]
        if own:
            torch._foreach_mul_([grad for grad, _ in own], scales)

    def snapshot(self) -> Snapshot | None:
        """Copies what an update changes; None where no update is undone."""
        if not self.settings.max_loss_growth:
            return None
        return Snapshot(self.parameters, self.optimizer, forgotten=self.forgotten)

    def can_go_ahead(self, scaler: torch.amp.GradScaler) -> bool:
        """Returns whether :meth:`move_if_finite` can stand for :meth:`move`.

        It cannot where the scaler looks itself whether all is finite, nor where weights are also
        pulled back, unless a copy of them is kept.
        """
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        restores = bool(self.settings.max_loss_growth) or not self.settings.source_pull
        return fused and restores and not scaler.is_enabled()

    def move_if_finite(self, grads: list[Tensor], scalars: Tensor) -> None:
        """Clips and updates; a fused optimizer does nothing if one of the scalars is not finite.

        The last of the scalars is the gradient's norm.
        """
        if self.settings.clip_norm:
            torch._foreach_mul_(grads, self._clipping(scalars[-1]).clamp(max=1.0))
        # Fused optimizers have this protocol for gradient scalers.
        optimizer: Any = self.optimizer
        optimizer.found_inf = (~scalars.isfinite()).any().float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        self._pull_to_source()

    def move(
        self, grads: list[Tensor], grad_norm: Tensor, norm: float, scaler: torch.amp.GradScaler
    ) -> None:
        """Clips and updates, where everything is finite; ``norm`` is ``grad_norm``, read."""
        if 0 < self.settings.clip_norm < norm + 1e-6:
            torch._foreach_mul_(grads, self._clipping(grad_norm))
        scaler.step(self.optimizer)
        self._pull_to_source()

    def _clipping(self, grad_norm: Tensor) -> Tensor:
        """Returns the factor of ``nn.utils.clip_grad_norm_``, which may be above 1."""
        return self.settings.clip_norm / (grad_norm + 1e-6)

    @torch.no_grad()
    def _pull_to_source(self) -> None:
        if self.settings.source_pull:
            torch._foreach_lerp_(self._moving, self._source, self.settings.source_pull)

    @torch.no_grad()
    def promised(self, norms: list[Tensor], before: Snapshot) -> Tensor:
        """Returns a bound on what the step removes of the loss along the gradient: a scalar.

        For any optimizer the norms of gradient and step bound that, tensor by tensor.

        Args:
            norms: of the gradients of those parameters that have one.
            before: the parameters before the step.
        """
        moving = zip(self.parameters, before.distances(), strict=True)
        lengths = {p: distance for p, distance in moving if p.grad is not None}
        changes = torch._foreach_mul(norms, [*lengths.values()])
        if self._scales:
            scales: list[Any] = [self._scales[p] for p in lengths]
            torch._foreach_div_(changes, scales)
        return torch.stack(changes).sum()

    def forget(self) -> None:
        """Makes the optimizer as if it had never taken a step."""
        forget(self.optimizer)
        self.forgotten = True

    def drop(self) -> None:
        """Does the same and frees the state's memory."""
        self.optimizer.state.clear()
        self.forgotten = True

    def state_dict(self) -> dict[str, Any]:
        """Returns the optimizer's state; a file need not hold zeros of the model's size."""
        state = self.optimizer.state_dict()
        if self.forgotten or knows_nothing(self.optimizer):
            state["state"] = {}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state of :meth:`state_dict`."""
        load_optimizer(self.optimizer, state)
        self.forgotten = knows_nothing(self.optimizer)
