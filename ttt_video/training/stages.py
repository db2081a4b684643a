"""The stages of training: which parts of a model learn, and from which losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.interface import parts_of, prefixes

LEARN = {"joint": "fgh", "main_only": "fh", "pretrain": "fg", "probing": "h"}
"""Roles of the parts that learn, for each value of ``TTT.JOINT``."""

METHODS = {"g": "reconstruction_losses", "h": "main_losses"}
"""The model's method whose loss trains a part; encoder f learns from whichever there are."""


@dataclass(frozen=True)
class Stage:
    """A stage of training, for any model that names its parts.

    Attributes:
        name: value of ``TTT.JOINT``.
        weight: factor on the losses of reconstruction.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Stage:
        """Returns the stage of ``TTT.JOINT`` and ``TTT.RECON.WEIGHT``."""
        return cls(cfg.TTT.JOINT, cfg.TTT.RECON.WEIGHT)

    @property
    def learns(self) -> str:
        """Roles of the parts that learn."""
        return LEARN[self.name]

    @property
    def labelled(self) -> bool:
        """Whether the main task is trained, which needs labels."""
        return "h" in self.learns

    @property
    def reconstructs(self) -> bool:
        """Whether the auxiliary task is trained, which needs none."""
        return "g" in self.learns

    def frozen(self, model: nn.Module, among: str = "fgh") -> tuple[str, ...]:
        """Returns what the names of the weights of these roles that do not learn begin with."""
        return prefixes(model, *(role for role in among if role not in self.learns))

    def freeze(self, model: nn.Module) -> None:
        """Makes every other part's weights constants.

        Raises:
            UserError: the model lacks a part, or a loss, that the stage trains.
        """
        fit = [name for name in LEARN if not _lacking(model, LEARN[name])]
        if self.name not in fit:
            kind = type(model).__name__
            fix = f"choose {' or '.join(fit)}" if fit else "train it with its own library"
            raise UserError(
                f"TTT.JOINT is {self.name}, and {kind} has no {_lacking(model, self.learns)}: {fix}"
            )
        frozen = self.frozen(model)
        for name, parameter in model.named_parameters():
            if name.startswith(frozen):
                parameter.requires_grad_(False)


def _lacking(model: nn.Module, roles: str) -> str:
    """Returns the first part, or method, that training these roles needs and the model lacks."""
    for role in roles:
        if role not in parts_of(model):
            return f"part {role}"
        if role in METHODS and not hasattr(model, METHODS[role]):
            return METHODS[role]
    return ""


class StageLosses(nn.Module):
    """The losses of a stage as a module, so that processes can share its gradients.

    Args:
        model: whose weights learn.
        stage: says from which losses.
    """

    def __init__(self, model: Any, stage: Stage) -> None:
        super().__init__()
        self.model = model
        self.stage = stage

    def loss_normalizers(self, batched_inputs: list[dict[str, Any]], parts: int) -> Any:
        """Returns those of the main task's losses, or None if it has or needs none."""
        if not self.stage.labelled or not hasattr(self.model, "loss_normalizers"):
            return None
        return self.model.loss_normalizers(batched_inputs, parts)

    def forward(
        self, batched_inputs: list[dict[str, Any]], normalizers: Any = None
    ) -> dict[str, Tensor]:
        """Returns the scalars whose sum is minimised, each the mean over its inputs.

        ``normalizers`` are :meth:`loss_normalizers` of the batch that the inputs are a part of.
        """
        losses: dict[str, Tensor] = {}
        if self.stage.labelled:
            given = () if normalizers is None else (normalizers,)
            losses.update(self.model.main_losses(batched_inputs, *given))
        if self.stage.reconstructs:
            for name, loss in self.model.reconstruction_losses(batched_inputs).items():
                losses[name] = self.stage.weight * loss
        return losses
