"""Colorization by Zhang et al. (2016), "eccv16", as a frozen baseline.

A convolutional network from lightness to a distribution over 313 colours at a quarter of the size,
whose mean is stretched to the frame. 32.2 million parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from ..color.lab import AB_UNIT, compose, lightness
from ..errors import UserError
from .interface import Samples, output_size
from .weights import read_checkpoint

NUM_BINS = 313


def _block(inputs: int, outputs: int, convs: int, stride: int = 1, dilation: int = 1) -> nn.Module:
    """Convolutions with ReLU each, the last of which has the stride, and batch norm at the end."""
    layers: list[nn.Module] = []
    for i in range(convs):
        by = stride if i == convs - 1 else 1
        layers.append(nn.Conv2d(inputs, outputs, 3, by, padding=dilation, dilation=dilation))
        layers.append(nn.ReLU())
        inputs = outputs
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs))


def _own_name(name: str) -> str:
    """The model's name for a published one; names with their part already stay."""
    block = name.partition(".")[0]
    if block in ("model8", "model_out"):
        return f"head.{name}"
    return f"encoder.{name}" if block.startswith("model") else name


@META_ARCH_REGISTRY.register()
class ZhangColorizer(nn.Module):
    """Colours a frame by its lightness; for evaluation only.

    Parameters are named as published, with their part before: ``encoder.model1`` to ``model7``,
    ``head.model8`` and ``head.model_out``, the centres of the bins. :meth:`read_weights` adds the
    part to the names of the authors' file.
    """

    outputs: ClassVar = frozenset({"color"})
    parts: ClassVar = {"f": "encoder", "h": "head"}

    @configurable
    def __init__(self, *, width: int = 64) -> None:
        """``width``: channels of the first block; all others are multiples of it."""
        super().__init__()
        deep = 8 * width
        blocks = {
            "model1": _block(1, width, 2, stride=2),
            "model2": _block(width, 2 * width, 2, stride=2),
            "model3": _block(2 * width, 4 * width, 3, stride=2),
            "model4": _block(4 * width, deep, 3),
            "model5": _block(deep, deep, 3, dilation=2),
            "model6": _block(deep, deep, 3, dilation=2),
            "model7": _block(deep, deep, 3),
        }
        self.encoder = nn.Sequential(OrderedDict(blocks))
        model8 = nn.Sequential(
            nn.ConvTranspose2d(deep, 4 * width, 4, 2, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(4 * width, NUM_BINS, 1),
        )
        model_out = nn.Conv2d(NUM_BINS, 2, 1, bias=False)
        layers = {"model8": model8, "softmax": nn.Softmax(1), "model_out": model_out}
        self.head = nn.Sequential(OrderedDict(layers))

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads ``INPUT.FORMAT``.

        Raises:
            UserError: images are not RGB.
        """
        if cfg.INPUT.FORMAT != "RGB":
            raise UserError(f'INPUT.FORMAT is "{cfg.INPUT.FORMAT}"; {cls.__name__} takes "RGB"')
        return {}

    @staticmethod
    def read_weights(path: str) -> dict[str, Tensor]:
        """Reads the authors' file (``colorization_release_v2-9b330a0b.pth``), or one of our own.

        Raises:
            UserError: it cannot be read.
        """
        return {_own_name(name): value for name, value in read_checkpoint(path).items()}

    @property
    def device(self) -> torch.device:
        """Where the model lives; inputs are moved there."""
        return next(self.parameters()).device

    def ab(self, levels: Tensor) -> Tensor:
        """Returns a and b, (B, 2, h, w), of lightness (B, 1, H, W), 0 to 100.

        Three halvings round up and the way back doubles, so h and w are H and W rounded up to
        multiples of 8; the colours belong to the whole picture and are to be stretched to it.
        """
        ab = AB_UNIT * self.head(self.encoder((levels - 50) / 100))
        return F.interpolate(ab, scale_factor=4, mode="bilinear", align_corners=False)

    def forward(self, batched_inputs: Samples) -> list[dict[str, Tensor]]:
        """``color``, (3, height, width) uint8 RGB, and ``finite``, a bool, for each input.

        Colours are predicted of the input's ``image``, whose lightness alone is looked at. Those
        of the whole picture are laid over ``grey`` (1, height, width), uint8, where an input has
        it, else over the stretched lightness of ``image``.

        Raises:
            UserError: in training mode, which this project does not support for this model.
        """
        if self.training:
            raise UserError(
                f"{type(self).__name__} is a frozen baseline here: train it with its authors' code"
            )
        return [self._predict(x) for x in batched_inputs]

    def _predict(self, sample: Any) -> dict[str, Tensor]:
        levels = lightness(sample["image"].to(self.device))
        height, width = levels.shape[-2:]
        size = output_size(sample, (height, width))
        if "grey" in sample:
            full = lightness(sample["grey"].to(self.device).expand(3, -1, -1))
        else:
            full = F.interpolate(levels[None], size=size, mode="bilinear", align_corners=False)[0]
        ab = self.ab(levels[None])[0]
        return {"color": compose(full, ab), "finite": ab.isfinite().all()}
