"""Online TTT-MAE: one step of masked reconstruction per frame (paper, Section 4.2, Equation 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..modeling.interface import adaptable
from .augmentation import RandomCrop
from .base import ADAPTER_REGISTRY
from .gradient import GradientAdapter
from .window import Sample

Own = TypeVar("Own", bound="ReconstructionAdapter")


class ReconstructionAdapter(GradientAdapter):
    """Minimises l_s(g(f(masked x)), x) over encoder f and decoder g; the head h stays h0."""

    parts = ("f", "g")

    def __init__(
        self,
        model: nn.Module,
        *,
        augment: RandomCrop,
        modules: Sequence[str] = parts,
        **settings: Any,
    ) -> None:
        """``settings`` are :class:`GradientAdapter`'s; ``augment`` prepares each sample."""
        super().__init__(model, modules=modules, **settings)
        self.augment = augment

    @classmethod
    def from_config(cls: type[Own], cfg: CfgNode, model: nn.Module, **more: Any) -> Own:
        """Builds it with the settings of ``TTT.*``; ``more`` are a subclass's own arguments."""
        settings = GradientAdapter.config_arguments(cfg)
        return cls(model, augment=RandomCrop.from_config(cfg), **settings, **more)

    def losses(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        """Returns ``loss_recon`` with an independent mask for each sample."""
        inputs = [{"image": self.augment(x["image"], generator)} for x in batch]
        return adaptable(self.model).reconstruction_losses(inputs, generator)

    def inputs(self, batch: list[Sample], generator: torch.Generator) -> Sequence[Tensor] | None:
        """Returns the model's ``masked_batch``; None for models without."""
        masked_batch = getattr(self.model, "masked_batch", None)
        if masked_batch is None:
            return None
        return masked_batch([self.augment(x["image"], generator) for x in batch], generator)

    def losses_of(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Returns :meth:`losses` of images and masks."""
        return self.model.masked_losses(*inputs)  # type: ignore[operator]


@ADAPTER_REGISTRY.register()
def online_ttt_mae(cfg: CfgNode, model: nn.Module) -> ReconstructionAdapter:
    """Builds ``--method online_ttt_mae``, with both kinds of memory: weights and window."""
    return ReconstructionAdapter.from_config(cfg, model)
