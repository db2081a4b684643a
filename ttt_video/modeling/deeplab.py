"""DeepLabV3+ (Chen et al., 2018) as MMSegmentation publishes it, a frozen baseline.

It has 62.6 million parameters for Cityscapes' 19 classes, 62.7 for ADE20K's 150.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn
from torchvision.models import resnet

from ..errors import UserError
from .frozen import FrozenSegmenter

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Bottlenecks in the four stages of a ResNet, by its depth."""


def _conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Sequential:
    """Returns a convolution that keeps the size, with batch norm and ReLU."""
    padding = options.get("dilation", 1) * (kernel // 2)
    parts = nn.Sequential()
    parts.add_module(
        "conv", nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **options)
    )
    parts.add_module("bn", nn.BatchNorm2d(outputs))
    parts.add_module("relu", nn.ReLU())
    return parts


def _separable_conv(inputs: int, outputs: int, dilation: int = 1) -> nn.Sequential:
    """Returns a 3x3 convolution within channels and a 1x1 convolution across them."""
    parts = nn.Sequential()
    parts.add_module("depthwise_conv", _conv(inputs, inputs, 3, dilation=dilation, groups=inputs))
    parts.add_module("pointwise_conv", _conv(inputs, outputs))
    return parts


class _Backbone(nn.Module):
    """A ResNet of stride 8 with three 3x3 convolutions as its stem; it returns stages 1 and 4."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        # The dilation of a stage begins with its second block.
        network = resnet.ResNet(
            resnet.Bottleneck,
            list(BLOCKS[depth]),
            width_per_group=width,
            replace_stride_with_dilation=[False, True, True],
        )
        convs: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 2), (32, 32, 1), (32, 64, 1)):
            convs.extend(_conv(inputs, outputs, 3, stride=stride))
        self.stem = nn.Sequential(*convs)
        self.maxpool = network.maxpool
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        low = self.layer1(self.maxpool(self.stem(images)))
        return low, self.layer4(self.layer3(self.layer2(low)))


class _Head(nn.Module):
    """Separable atrous pyramid pooling, and the decoder that adds stage 1."""

    def __init__(
        self, channels: int, low_channels: int, dilations: Sequence[int], num_classes: int
    ) -> None:
        super().__init__()
        deep = 2048
        self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), _conv(deep, channels))
        self.aspp_modules = nn.ModuleList(
            [_conv(deep, channels), *(_separable_conv(deep, channels, d) for d in dilations)]
        )
        self.bottleneck = _conv((2 + len(dilations)) * channels, channels, 3)
        self.c1_bottleneck = _conv(256, low_channels)
        self.sep_bottleneck = nn.Sequential(
            _separable_conv(channels + low_channels, channels), _separable_conv(channels, channels)
        )
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, low: Tensor, deep: Tensor) -> Tensor:
        pyramid = [_resized(self.image_pool(deep), deep), *(m(deep) for m in self.aspp_modules)]
        context = _resized(self.bottleneck(torch.cat(pyramid, dim=1)), low)
        features = torch.cat([context, self.c1_bottleneck(low)], dim=1)
        return self.conv_seg(self.sep_bottleneck(features))


def _resized(values: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(values, size=like.shape[-2:], mode="bilinear", align_corners=False)


@META_ARCH_REGISTRY.register()
class DeepLabV3Plus(FrozenSegmenter):
    """MMSegmentation's ``deeplabv3plus_r101-d8``; for evaluation only.

    Parameters are named as there, so that its checkpoints fit: ``backbone.*``, ``decode_head.*``
    and ``auxiliary_head.*``, which only its training uses.
    """

    parts: ClassVar = {"f": "backbone", "h": "decode_head"}

    def __init__(self, cfg: CfgNode) -> None:
        """Reads ``MODEL.RESNETS.*``, ``MODEL.SEM_SEG_HEAD.*`` and ``MODEL.PIXEL_*``.

        Raises:
            UserError: the depth, or the number of ``PROJECT_CHANNELS``, is not supported.
        """
        super().__init__(cfg)
        resnets, head = cfg.MODEL.RESNETS, cfg.MODEL.SEM_SEG_HEAD
        if resnets.DEPTH not in BLOCKS:
            raise UserError(f"MODEL.RESNETS.DEPTH is {resnets.DEPTH}; choose 50 or 101")
        if len(head.PROJECT_CHANNELS) != 1:
            raise UserError(
                f"MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS is {head.PROJECT_CHANNELS}; DeepLabV3+ takes "
                "one number, for stage 1"
            )
        self.backbone = _Backbone(resnets.DEPTH, resnets.WIDTH_PER_GROUP)
        self.decode_head = _Head(
            head.ASPP_CHANNELS, head.PROJECT_CHANNELS[0], head.ASPP_DILATIONS, head.NUM_CLASSES
        )
        self.auxiliary_head = nn.Module()
        self.auxiliary_head.convs = nn.ModuleList([_conv(1024, 256, 3)])
        self.auxiliary_head.conv_seg = nn.Conv2d(256, head.NUM_CLASSES, 1)

    def logits(self, images: Tensor) -> Tensor:
        """Returns scores at the resolution of stage 1, a quarter of the images'."""
        return self.decode_head(*self.backbone(images))
