"""The settings that all gradient methods share, in two groups."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..modeling.interface import parts_of
from ..modeling.measured import read_measured
from ..modeling.optimizer import make_optimizer, parameter_groups
from .precision import PRECISIONS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OptimizerSettings:
    """How gradients move the weights: ``TTT.OPTIMIZER.*``.

    Attributes:
        lr: learning rate; that of f is multiplied by ``encoder_multiplier``.
        name: "SGD" or "ADAMW".
        momentum: of SGD.
        betas: of AdamW.
        weight_decay: not applied to norms, embeddings and position tables.
        encoder_multiplier: see ``lr``.
        clip_norm: largest L2 norm of the whole gradient; 0 does not clip.
        restart: forget the optimizer's state after every frame.
        source_pull: share of the way back to the source weights that the weights move after every
            step.
        source_gradients: of :func:`measure_gradients`. The gradient of each tensor is divided by
            its own number before it is clipped, so that tensors move alike.
        max_loss_growth: a step is undone if the loss on its own batch and masks is more than so
            many times as large after it; 0 undoes none.
    """

    lr: float
    name: str = "SGD"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    encoder_multiplier: float = 1.0
    clip_norm: float = 0.0
    restart: bool = False
    source_pull: float = 0.0
    source_gradients: Mapping[str, Tensor] | None = None
    max_loss_growth: float = 0.0

    @classmethod
    def from_config(cls, cfg: CfgNode) -> OptimizerSettings:
        """Returns those of ``TTT.OPTIMIZER.*``, with the file of source gradients read."""
        own, file = cfg.TTT.OPTIMIZER, cfg.TTT.OPTIMIZER.SOURCE_GRADIENTS
        if cfg.TTT.PRESET == "realtime" and not file:
            logger.warning(
                "--preset realtime steps by %g in units of the gradients on training images, and "
                "TTT.OPTIMIZER.SOURCE_GRADIENTS names none: measure them by "
                "tools/measure_gradients.py, or choose TTT.OPTIMIZER.BASE_LR and CLIP_NORM anew",
                own.BASE_LR,
            )
        return cls(
            lr=own.BASE_LR,
            name=own.NAME,
            momentum=own.MOMENTUM,
            betas=(float(own.BETAS[0]), float(own.BETAS[1])),
            weight_decay=own.WEIGHT_DECAY,
            encoder_multiplier=own.BACKBONE_MULTIPLIER,
            clip_norm=own.CLIP_NORM,
            restart=own.RESTART,
            source_pull=own.SOURCE_PULL,
            source_gradients=read_measured(file) if file else None,
            max_loss_growth=own.MAX_LOSS_GROWTH,
        )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Returns a new optimizer of what may move in ``model``, which must be something."""
        groups = parameter_groups(
            model,
            lr=self.lr,
            weight_decay=self.weight_decay,
            encoder=parts_of(model)["f"],
            encoder_multiplier=self.encoder_multiplier,
        )
        return make_optimizer(self.name, groups, momentum=self.momentum, betas=self.betas)


@dataclass(frozen=True)
class StepSettings:
    """What a gradient step is made of.

    Attributes:
        per_frame: gradient steps per frame.
        batch_size: samples per step.
        micro_batch_size: samples per forward and backward; the gradient is that of the batch. 0:
            see :class:`MicroBatches`.
        sampling: see :meth:`SlidingWindow.sample`.
        mode: "train" or "eval" mode of the model in the step.
        precision: of the step, in :data:`PRECISIONS`; "fp16" scales the loss.
        checkpoint: layers keep their inputs only, and are run again in the backward pass.
    """

    per_frame: int = 1
    batch_size: int = 32
    micro_batch_size: int = 0
    sampling: str = "with_replacement"
    mode: str = "eval"
    precision: str = "fp32"
    checkpoint: bool = False

    @property
    def allows_tf32(self) -> bool:
        """Whether a GPU multiplies float32 in TF32."""
        return self.precision == "tf32"

    def __post_init__(self) -> None:
        if self.mode not in ("train", "eval"):
            raise ValueError(f"no step mode {self.mode!r}; train or eval")
        if self.precision not in PRECISIONS:
            raise ValueError(f"no precision {self.precision!r}; {', '.join(PRECISIONS)}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> StepSettings:
        """Returns those of ``TTT.*``."""
        ttt = cfg.TTT
        return cls(
            per_frame=ttt.STEPS_PER_FRAME,
            batch_size=ttt.BATCH_SIZE,
            micro_batch_size=ttt.MICRO_BATCH_SIZE,
            sampling=ttt.SAMPLING,
            mode=ttt.STEP_MODE,
            precision=ttt.PRECISION,
            checkpoint=ttt.CHECKPOINT,
        )
