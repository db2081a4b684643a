"""Draws all patch masks of the project, by kinds with names, and cuts images into patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor

from ..errors import UserError

SMALLEST_BLOCK = 16
"""Least patches of a block, while so many are left to hide (BEiT's number)."""

LONGEST_BLOCK = 1 / 0.3
"""Largest ratio of a block's sides (BEiT's number)."""


def num_visible_patches(num_patches: int, mask_ratio: float) -> int:
    """Returns ``floor(N * (1 - ratio))``, safe from 1 - 0.8 = 0.1999."""
    return math.floor(num_patches * (1.0 - mask_ratio) + 1e-6)


def random_patches(
    rows: int, columns: int, num_visible: int, generator: torch.Generator | None
) -> Tensor:
    """Chooses patches uniformly, without replacement (paper, Section 3; He et al., 2021)."""
    patches = torch.zeros(rows * columns)
    order = torch.randperm(rows * columns, generator=generator)
    patches[order[:num_visible]] = 1.0
    return patches.view(rows, columns)


def block_patches(
    rows: int, columns: int, num_visible: int, generator: torch.Generator | None
) -> Tensor:
    """Hides one rectangle of patches after the other until exactly ``num_visible`` are left.

    Rectangles are BEiT's (Bao et al., 2022): the area is uniform between :data:`SMALLEST_BLOCK` and
    the patches that are still to be hidden, the ratio of sides log-uniform. Each covers a random
    visible patch, so that it hides something.
    """
    patches = torch.ones(rows, columns)
    while (left := int(patches.sum()) - num_visible) > 0:
        area, ratio, anchor, up, back = torch.rand(5, generator=generator).tolist()
        smallest = min(SMALLEST_BLOCK, left)
        size = smallest + int(area * (left - smallest + 1))
        # A rectangle is no larger than what is left to hide, so the final number is exact.
        sides = math.sqrt(size) * LONGEST_BLOCK ** (ratio - 0.5)
        height = min(max(round(sides), 1), rows, size)
        width = min(size // height, columns)
        visible = patches.nonzero()
        row, column = visible[int(anchor * len(visible))].tolist()
        top = min(max(row - int(up * height), 0), rows - height)
        start = min(max(column - int(back * width), 0), columns - width)
        patches[top : top + height, start : start + width] = 0.0
    return patches


MaskKind = Callable[[int, int, int, torch.Generator | None], Tensor]

MASK_KINDS: dict[str, MaskKind] = {"random": random_patches, "block": block_patches}
"""Kinds by their names in ``TTT.MASK_KIND``; a file of ``--register`` may add one.

A kind gets rows, columns, the number of patches to leave visible, and a CPU generator (None for
torch's global one). It returns (rows, columns) float32 on the CPU: 1 = visible, 0 = masked.
"""


@dataclass(frozen=True)
class PatchMasks:
    """Draws masks of one kind.

    Attributes:
        patch_size: side of a patch, px.
        ratio: share of patches hidden, in [0, 1).
        kind: a name in :data:`MASK_KINDS`.
    """

    patch_size: int
    ratio: float
    kind: str = "random"

    def __post_init__(self) -> None:
        """Refuses a kind that does not exist."""
        if self.kind not in MASK_KINDS:
            known = ", ".join(sorted(MASK_KINDS))
            raise UserError(f"TTT.MASK_KIND is {self.kind!r}; choose one of: {known}")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> PatchMasks:
        """Reads ``TTT.MASK_PATCH_SIZE``, ``TTT.MASK_RATIO`` and ``TTT.MASK_KIND``."""
        return cls(cfg.TTT.MASK_PATCH_SIZE, cfg.TTT.MASK_RATIO, cfg.TTT.MASK_KIND)

    def num_visible(self, num_patches: int) -> int:
        """Returns how many of an image's patches are shown."""
        return num_visible_patches(num_patches, self.ratio)

    def draw(
        self,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draws a mask (1, height, width) float32 in px, for the fourth channel of f's input.

        Patches are drawn on the CPU, so that every device sees the same mask, and enlarged to
        pixels on ``device``; those at the right and bottom may be cut. ``generator`` is a CPU
        generator, or None for torch's global one.
        """
        return self.enlarged(self.draw_patches(height, width, generator).to(device), height, width)

    def draw_patches(
        self, height: int, width: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws which patches of an image are shown: (1, rows, columns) float32 on the CPU."""
        rows, columns = math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)
        num_visible = self.num_visible(rows * columns)
        return MASK_KINDS[self.kind](rows, columns, num_visible, generator)[None]

    def enlarged(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Returns a mask of patches (..., rows, columns) in px, (..., height, width)."""
        side = self.patch_size
        *batch, rows, columns = patches.shape
        pixels = patches[..., :, None, :, None].expand(*batch, rows, side, columns, side)
        pixels = pixels.reshape(*batch, rows * side, columns * side)
        return pixels[..., :height, :width].contiguous()

    def of_batch(
        self,
        samples: Sequence[Mapping[str, Any]],
        images: ImageList,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Returns the masks of padded images, (B, 1, H, W) float32, on their device.

        A sample's own ``image_mask`` (1, h, w) hides the padding; masks that are drawn for the
        others run over image and padding.
        """
        height, width = images.tensor.shape[-2:]
        device = images.tensor.device
        masks = []
        for x, size in zip(samples, images.image_sizes, strict=True):
            mask = x.get("image_mask")
            if mask is None:
                mask = self.draw(height, width, generator, device)
            elif mask.shape != (1, *size):
                raise ValueError(f"image_mask is {tuple(mask.shape)}; the image needs {(1, *size)}")
            mask = mask.to(device, images.tensor.dtype, non_blocking=True)
            masks.append(F.pad(mask, (0, width - mask.shape[-1], 0, height - mask.shape[-2])))
        return torch.stack(masks)


class MAEMasks(PatchMasks):
    """Masks of as many patches as MAE's code hides, which rounds where 1 - ratio is not exact."""

    def num_visible(self, num_patches: int) -> int:
        """Returns ``int(N * (1 - ratio))`` in floating point: of 100 at 0.8 it is 19."""
        return int(num_patches * (1 - self.ratio))


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts (B, C, H, W) into (B, N, patch_size**2 * C) patches: rows, then columns, then colours.

    H and W must be multiples of ``patch_size``.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height}x{width} is not a multiple of the patch size {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    patches = images.view(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Inverts :func:`patchify`: (B, N, patch_size**2 * C) to (B, C, H, W)."""
    rows, columns = height // patch_size, width // patch_size
    pixels = patches.view(patches.shape[0], rows, columns, patch_size, patch_size, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, height, width)
