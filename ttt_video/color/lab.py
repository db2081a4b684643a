"""sRGB and CIE Lab (white point D65, 2 degrees), in torch: batched, differentiable, on any device.

The constants are those of CIE 1976 and IEC 61966-2-1 as scikit-image rounds them, so the two agree
to rounding. L is in 0 to 100; of colours that sRGB has, a is in -86.2 to 98.3 and b in -107.9 to
94.5. OpenCV's 8-bit Lab differs by up to 0.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AB_UNIT = 110.0
"""What a and b are divided by where a network predicts them (Zhang et al., 2016 and 2017)."""

_XYZ_OF_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)
_LINEAR_UP_TO = 0.008856  # of the cube root
_SLOPE, _OFFSET = 7.787, 16 / 116


def at_least_single(values: Tensor) -> Tensor:
    """Returns the values in float32, or in float64 if they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """Returns Lab of sRGB.

    Args:
        rgb: (..., 3, H, W), uint8 in 0 to 255, or floats in 0 to 1.

    Returns:
        (..., 3, H, W), L, a and b; float32 of uint8, else of the input's dtype.
    """
    linear = _decoded(rgb)
    matrix = linear.new_tensor(_XYZ_OF_RGB) / linear.new_tensor(_WHITE)[:, None]
    x, y, z = _compressed(_mixed(matrix, linear)).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def lightness(rgb: Tensor) -> Tensor:
    """Returns L of sRGB, 0 to 100: (..., 1, H, W) of (..., 3, H, W); see :func:`rgb_to_lab`."""
    return 116 * _compressed(_luminance(rgb)) - 16


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Returns sRGB of Lab, (..., 3, H, W) floats: beyond 0 to 1 for colours that sRGB has not."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], -3)
    edge = _LINEAR_UP_TO ** (1 / 3)
    xyz = torch.where(f > edge, f.clamp(min=edge) ** 3, (f - _OFFSET) / _SLOPE)
    # Inverted in double precision, so that white is white.
    inverse = torch.linalg.inv(torch.tensor(_XYZ_OF_RGB, dtype=torch.float64))
    matrix = (inverse * torch.tensor(_WHITE, dtype=torch.float64)).to(lab)
    return _encoded(_mixed(matrix, xyz))


def to_grey(rgb: Tensor) -> Tensor:
    """Returns the neutral grey that has a picture's L.

    So a grey picture stays what it is, to the bit, and L of the result is L of the picture within
    the rounding to 8 bits (0.25). Luma, the usual mean of the encoded values, has another L.

    Args:
        rgb: (..., 3, H, W) uint8.

    Returns:
        (..., 1, H, W) uint8, the value of all three channels.
    """
    return (255 * _encoded(_luminance(rgb))).round().clamp(0, 255).to(torch.uint8)


def in_three_channels(grey: Tensor) -> Tensor:
    """Returns a (1, H, W) picture as (3, H, W): one plane of memory, seen three times."""
    return grey.expand(3, -1, -1)


def is_one_plane(image: Tensor) -> bool:
    """Says whether the channels of an image are one plane of memory, so that it has no colour.

    :func:`in_three_channels` makes such images, and copies of all of their pixels lose it.
    """
    return image.stride(0) == 0


def compose(lightness: Tensor, ab: Tensor) -> Tensor:
    """Returns the picture of a lightness and of colours, which may be coarser.

    Args:
        lightness: (..., 1, H, W) floats, 0 to 100.
        ab: (..., 2, h, w) floats, in units of Lab; stretched bilinearly to (H, W).

    Returns:
        (..., 3, H, W) uint8 sRGB; each channel is clipped where sRGB has no such colour.
    """
    size = lightness.shape[-2:]
    if ab.shape[-2:] != size:
        flat = ab.reshape(-1, *ab.shape[-3:])
        flat = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
        ab = flat.reshape(*ab.shape[:-2], *size)
    rgb = lab_to_rgb(torch.cat([lightness.to(ab.dtype), ab], -3))
    return (255 * rgb.clamp(0, 1)).round().to(torch.uint8)


def _mixed(matrix: Tensor, channels: Tensor) -> Tensor:
    return torch.einsum("ij,...jhw->...ihw", matrix, channels)


def _luminance(rgb: Tensor) -> Tensor:
    """(..., 1, H, W), 0 to 1."""
    linear = _decoded(rgb)
    return _mixed(linear.new_tensor(_XYZ_OF_RGB[1:2]), linear)


# Both branches of a `where` have a gradient, so each gets values at which its own is finite.


def _decoded(rgb: Tensor) -> Tensor:
    """Linear light of encoded values."""
    if rgb.dtype == torch.uint8:
        rgb = rgb.float() / 255
    power = ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4
    return torch.where(rgb > 0.04045, power, rgb / 12.92)


def _encoded(linear: Tensor) -> Tensor:
    """Encoded values of linear light; the inverse of :func:`_decoded`."""
    power = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear > 0.0031308, power, linear * 12.92)


def _compressed(xyz: Tensor) -> Tensor:
    """The cube root, made linear near black."""
    root = xyz.clamp(min=_LINEAR_UP_TO) ** (1 / 3)
    return torch.where(xyz > _LINEAR_UP_TO, root, _SLOPE * xyz + _OFFSET)
