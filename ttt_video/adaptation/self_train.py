"""Self-training: confident predictions of whole frames label masked frames (Appendix A.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.interface import adaptable, require_distributions
from .augmentation import RandomCrop
from .base import ADAPTER_REGISTRY, module_mode
from .gradient import GradientAdapter
from .window import Sample


class SelfTrainAdapter(GradientAdapter):
    """Minimises -log P(label|x) of masked frames at confident pixels; the head h stays h0."""

    parts = ("f", "h")

    def __init__(
        self,
        model: nn.Module,
        *,
        threshold: float,
        augment: RandomCrop,
        modules: Sequence[str] = ("f",),
        **settings: Any,
    ) -> None:
        """``settings`` are :class:`GradientAdapter`'s.

        Args:
            model: of semantic segmentation, or of colours as classes.
            threshold: lambda, in [0, 1]; pixels with P(k|x) above it are labels.
            augment: prepares each sample.
            modules: that move.

        Raises:
            UserError: the model has no confidence for each pixel.
        """
        super().__init__(model, modules=modules, **settings)
        if adaptable(model).outputs not in ({"sem_seg"}, {"color"}):
            raise UserError(
                "self-training needs a confidence for each pixel, which instance and panoptic "
                "segmentation do not give (paper, Table 1): choose another --method, or a model "
                "with MODEL.MASK_FORMER.TEST.SEMANTIC_ON alone"
            )
        require_distributions(model)
        self.threshold = threshold
        self.augment = augment

    def losses(self, batch: list[Sample], generator: torch.Generator) -> dict[str, Tensor]:
        """Returns ``loss_self_train`` in nats, and ``confident``: the share of labelled pixels."""
        inputs = [{"image": self.augment(x["image"], generator)} for x in batch]
        model = adaptable(self.model)
        with module_mode(self.model, training=False), torch.no_grad():
            teacher = model.main_task(inputs)
            confidence, labels = teacher.pixels.classes.max(1)
            confident = (confidence + teacher.pixels.something).exp() > self.threshold
            confident &= teacher.inside > 0
        record = {"confident": teacher.mean(confident.float())}
        if not confident.any():
            return {"loss_self_train": torch.zeros((), device=labels.device), **record}
        student = model.main_task(inputs, mask_with=generator).pixels
        classes = student.classes.gather(1, labels[:, None])[:, 0]
        error = -(classes + student.something)
        return {"loss_self_train": teacher.mean(error, where=confident), **record}


@ADAPTER_REGISTRY.register()
def self_train(cfg: CfgNode, model: nn.Module) -> SelfTrainAdapter:
    """Builds ``--method self_train``, with both kinds of memory."""
    return SelfTrainAdapter(
        model,
        threshold=cfg.TTT.SELF_TRAIN.THRESHOLD,
        augment=RandomCrop.from_config(cfg),
        **GradientAdapter.config_arguments(cfg),
    )
