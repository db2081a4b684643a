"""The base of this project's models: encoder f, decoder g and masked reconstruction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..config import validate_config
from ..errors import UserError
from .graphs import defines_together, stacked, unstacked
from .heads import PIXELS_PER_QUERY_CELL, ReconstructionHead, registered
from .interface import (
    MASKFORMER_PARTS,
    Parts,
    normalized_images,
    output_size,
)
from .masking import PatchMasks
from .pixel_classes import image_area
from .reconstruction import ReconstructionTask, reconstruction_loss, to_pixel_units

INPUT_CHANNELS = 4
"""Channels of f's input: RGB and visibility."""

MASK2FORMER_NAMES = {
    "D2SwinTransformer": "SwinTransformerTTT",
    "MaskFormerHead": "MaskFormerTTTHead",
}
"""Names in Mask2Former's configs, with the parts that stand for them here."""


def _build(registry: Any, key: str, name: str, cfg: CfgNode, input_shape: Any) -> nn.Module:
    return registered(registry, key, MASK2FORMER_NAMES.get(name, name))(cfg, input_shape)


class ReconstructingModel(nn.Module):
    """An encoder f with a head h of the main task and a decoder g that reconstructs masked images.

    ``model(batched_inputs)`` speaks detectron2's dicts. Each input has ``image``, a (3, H, W) uint8
    tensor in ``INPUT.FORMAT`` order, and optionally ``height`` and ``width`` of the output,
    ``image_mask`` and labels. It returns losses in training mode and predictions in eval mode.

    A subclass has the parts, and defines :meth:`encode`, :meth:`decode`, :meth:`main_losses`,
    ``main_task`` and :meth:`predict`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        parts: Parts,
        pixel_mean: list[float],
        pixel_std: list[float],
        size_divisibility: int,
        masks: PatchMasks,
        reconstruction: ReconstructionTask,
    ) -> None:
        """
        Args:
            parts: names of f, g and h.
            pixel_mean, pixel_std: of uint8 values, in ``INPUT.FORMAT`` order.
            size_divisibility: images are zero-padded to a multiple of this, after normalisation.
            masks: draws the masks of inputs without ``image_mask``.
            reconstruction: settings of the reconstruction loss.
        """
        super().__init__()
        self.parts = dict(parts)
        self.size_divisibility = size_divisibility
        self.masks = masks
        self.reconstruction = reconstruction
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def common_arguments(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads the arguments of this class that every model takes from the same keys."""
        validate_config(cfg)
        return {
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]], normalizers: Any = None) -> Any:
        """Returns the losses of joint training in training mode, and predictions in eval mode.

        ``normalizers`` are ``loss_normalizers`` of the batch that the inputs are a part of, if the
        main task has such; by default the inputs are the batch.
        """
        if not self.training:
            return self.predict(batched_inputs)
        losses = self.main_losses(batched_inputs, normalizers)
        for name, loss in self.reconstruction_losses(batched_inputs).items():
            losses[name] = self.reconstruction.weight * loss
        return losses

    @abstractmethod
    def main_losses(
        self, batched_inputs: list[dict[str, Any]], normalizers: Any = None
    ) -> dict[str, Tensor]:
        """Returns l_m(h(f(x)), y), the weighted losses of labelled inputs."""

    @abstractmethod
    def predict(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns h(f(x)), a dict of outputs for each input."""

    def reconstruction_losses(
        self, batched_inputs: list[dict[str, Any]], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Returns ``{"loss_recon": l_s(g(f(masked x)), x)}``, a scalar without its weight.

        Inputs without ``image_mask`` (1, H, W; 1 = visible, 0 = masked) get one that ``generator``
        (on the CPU) or torch's global one draws over the padded image.
        """
        images = self.normalize(batched_inputs)
        return self._losses_of(images, self.masks.of_batch(batched_inputs, images, generator))

    def _losses_of(self, images: ImageList, visible: Tensor) -> dict[str, Tensor]:
        prediction = self.decode(self.encode(images.tensor, visible), visible)
        loss = reconstruction_loss(
            prediction,
            images.tensor,
            visible,
            region=self.reconstruction.region,
            inside=image_area(images, *images.tensor.shape[-2:])[:, None],
            normalize_patch=self.reconstruction.normalize_patch,
        )
        return {"loss_recon": loss}

    @torch.no_grad()
    def reconstruct(
        self, batched_inputs: list[dict[str, Any]], generator: torch.Generator | None = None
    ) -> list[dict[str, Tensor]]:
        """Makes pictures of the reconstruction.

        Returns:
            For each input ``recon`` and ``masked_input``, whose masked patches are black: float
            (3, height, width) in 0..255 and ``INPUT.FORMAT`` order, at the size of predictions.
        """
        images = self.normalize(batched_inputs)
        visible = self.masks.of_batch(batched_inputs, images, generator)
        prediction = self.decode(self.encode(images.tensor, visible), visible).float()
        pixels = to_pixel_units(prediction, images.tensor, self.reconstruction.normalize_patch)
        pictures = {
            "recon": self._denormalize(pixels),
            "masked_input": self._denormalize(images.tensor) * visible,
        }
        results = []
        for i, (x, size) in enumerate(zip(batched_inputs, images.image_sizes, strict=True)):
            height, width = output_size(x, size)
            results.append(
                {
                    name: sem_seg_postprocess(picture[i], size, height, width).clamp(0, 255)
                    for name, picture in pictures.items()
                }
            )
        return results

    def normalize(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Returns the images, normalised and zero-padded to a common size: (B, 3, H, W) float32."""
        return normalized_images(
            batched_inputs, self.pixel_mean, self.pixel_std, self.size_divisibility
        )

    @abstractmethod
    def encode(self, pixels: Tensor, visible: Tensor | None = None) -> Any:
        """Returns f of (B, 3, H, W) normalised pixels, of which ``visible`` (B, 1, H, W) are shown.

        None shows all, padding included.
        """

    @abstractmethod
    def decode(self, features: Any, visible: Tensor) -> Tensor:
        """Returns g of f: (B, 3, H, W) pixels, in the units of the target."""

    def _denormalize(self, pixels: Tensor) -> Tensor:
        return pixels * self.pixel_std + self.pixel_mean


class DenseModel(ReconstructingModel):
    """A model of pixels: f is a backbone that sees which pixels are masked; h and g are its heads.

    Parameters have the names of Mask2Former and of the published joint checkpoints.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        recon_head: ReconstructionHead,
        **common: Any,
    ) -> None:
        """
        Args:
            backbone: f; sem_seg_head: h; recon_head: g.
            common: :class:`ReconstructingModel`'s arguments, without the parts.
        """
        super().__init__(parts=MASKFORMER_PARTS, **common)
        if self.size_divisibility < 1 or self.size_divisibility % PIXELS_PER_QUERY_CELL:
            raise UserError(
                f"images are padded to multiples of {self.size_divisibility} px; the "
                f"reconstruction needs multiples of {PIXELS_PER_QUERY_CELL}, so set "
                "MODEL.MASK_FORMER.SIZE_DIVISIBILITY to 32"
            )
        patch = self.reconstruction.normalize_patch
        if patch is not None and self.size_divisibility % patch:
            raise UserError(
                f"TTT.RECON.NORMALIZE_TARGET needs whole patches: TTT.MASK_PATCH_SIZE "
                f"{patch} must divide the padding to multiples of {self.size_divisibility}"
            )
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.recon_head = recon_head

    @classmethod
    def common_arguments(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads the arguments of this class: keys of ``MODEL.*`` and ``TTT.*``."""
        common = super().common_arguments(cfg)
        backbone = _build(
            BACKBONE_REGISTRY,
            "MODEL.BACKBONE.NAME",
            cfg.MODEL.BACKBONE.NAME,
            cfg,
            ShapeSpec(channels=INPUT_CHANNELS),
        )
        features = backbone.output_shape()  # type: ignore[operator]
        head = _build(
            SEM_SEG_HEADS_REGISTRY,
            "MODEL.SEM_SEG_HEAD.NAME",
            cfg.MODEL.SEM_SEG_HEAD.NAME,
            cfg,
            features,
        )
        divisibility = cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        return {
            **common,
            "backbone": backbone,
            "sem_seg_head": head,
            "recon_head": ReconstructionHead(cfg, features),
            "size_divisibility": divisibility if divisibility >= 0 else backbone.size_divisibility,
            "masks": PatchMasks.from_config(cfg),
            "reconstruction": ReconstructionTask.from_config(cfg),
        }

    def masked_batch(
        self, images: Sequence[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """Draws the masks of images (3, H, W), and nothing else, so that the rest can be replayed.

        :meth:`masked_losses` of the result is :meth:`reconstruction_losses` of the images.

        Returns:
            The images of :func:`~ttt_video.modeling.graphs.stacked` on their device, and which
            patches of the padded images are shown: (B, rows, columns) float32 on the CPU, pinned
            where a GPU fetches it. None, and nothing drawn, if the images differ in size or a
            subclass has other losses.
        """
        batch = stacked(images)
        if batch is None or not defines_together(self, "masked_losses", "reconstruction_losses"):
            return None
        height, width = (self._padded(side) for side in images[0].shape[-2:])
        patches = [self.masks.draw_patches(height, width, generator) for _ in images]
        shown = torch.cat(patches)
        return batch, shown.pin_memory() if self.device.type == "cuda" else shown

    def _padded(self, side: int) -> int:
        return side + -side % self.size_divisibility

    def masked_losses(self, images: Tensor, patches: Tensor) -> dict[str, Tensor]:
        """Returns :meth:`reconstruction_losses` of a :meth:`masked_batch`; draws nothing."""
        padded = self.normalize(unstacked(images))
        patches = patches.to(self.device)[:, None]
        return self._losses_of(padded, self.masks.enlarged(patches, *padded.tensor.shape[-2:]))

    def encode(self, pixels: Tensor, visible: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the features f of (B, 3, H, W) pixels; masked pixels are 0, the mean colour.

        Args:
            pixels: normalised.
            visible: (B, 1, H, W), the fourth channel; None means all visible, padding included.
        """
        if visible is None:
            visible = torch.ones_like(pixels[:, :1])
        else:
            pixels = pixels * visible
        return self.backbone(torch.cat([pixels, visible], dim=1))

    def decode(self, features: dict[str, Tensor], visible: Tensor) -> Tensor:
        """Returns g of f: (B, 3, H, W) pixels, in the units of the target."""
        return self.recon_head(features)
