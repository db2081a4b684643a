"""ColorizerTTT: encoder f, head h that colours grey frames, and reconstruction decoder g."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.postprocessing import sem_seg_postprocess
from detectron2.structures import ImageList
from torch import Tensor

from ..color.bins import ColorBins, is_grey, rebalancing_weights
from ..color.lab import AB_UNIT, compose, lightness, rgb_to_lab, to_grey
from ..color.losses import classification_loss, regression_loss
from ..errors import UserError
from .heads import PIXELS_PER_QUERY_CELL, ColorHead
from .interface import output_size, require_distributions
from .pixel_classes import MainTask, PixelClasses, image_area
from .reconstructing import DenseModel
from .weights import read_checkpoint

PRIOR = "color_prior"
"""Name of the tensor in a file of ``TTT.COLOR.PRIOR``: (313,), pixels of each bin."""


@META_ARCH_REGISTRY.register()
class ColorizerTTT(DenseModel):
    """Colours grey frames (paper, Section 5.4), with the losses of Zhang et al. (2016, 2017).

    Inputs are turned grey before f sees them, so no colour that a source let through can help. The
    auxiliary task reconstructs the masked grey frame. In training ``image`` is the coloured picture
    and thus the label, too.
    """

    outputs: ClassVar = frozenset({"color"})
    sem_seg_head: ColorHead
    _bin_weights: Tensor | None

    @configurable
    def __init__(
        self,
        *,
        image_format: str,
        temperature: float,
        bin_weights: Tensor | None,
        **common: Any,
    ) -> None:
        """
        Args:
            image_format: order of an input's channels, "RGB" or "BGR".
            temperature: of the annealed mean that makes a colour of a distribution.
            bin_weights: (313,), what the gradient of a bin's pixels is multiplied by, or None.
            common: :class:`DenseModel`'s arguments.
        """
        super().__init__(**common)
        self.image_format = image_format
        self.temperature = temperature
        self.register_buffer("_bin_weights", bin_weights, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads ``MODEL.*`` and ``TTT.*``, of which ``TTT.COLOR.*`` is its own."""
        color = cfg.TTT.COLOR
        weights = None
        if color.PRIOR and color.TARGET == "classification":
            weights = rebalancing_weights(read_prior(color.PRIOR), color.REBALANCING).float()
        return {
            **cls.common_arguments(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "temperature": color.TEMPERATURE,
            "bin_weights": weights,
        }

    @property
    def bins(self) -> ColorBins | None:
        """The classes of colours; None for regression."""
        return self.sem_seg_head.bins

    @property
    def has_distributions(self) -> bool:
        """Whether there is a distribution of each pixel's colour, as methods may need."""
        return self.bins is not None

    def _rgb(self, image: Tensor) -> Tensor:
        image = image.to(self.device, non_blocking=True)
        return image.flip(0) if self.image_format == "BGR" else image

    def normalize(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Returns the images, grey, normalised and zero-padded to a common size: (B, 3, H, W)."""
        grey = [to_grey(self._rgb(x["image"])).expand(3, -1, -1) for x in batched_inputs]
        return super().normalize([{"image": image} for image in grey])

    def main_losses(
        self, batched_inputs: list[dict[str, Any]], normalizers: None = None
    ) -> dict[str, Tensor]:
        """Returns l_m(h(f(x)), y): ``loss_color``, the mean over the pixels of coloured images."""
        images = self.normalize(batched_inputs)
        predicted = self.sem_seg_head(self.encode(images.tensor))
        colors = [rgb_to_lab(self._rgb(x["image"]))[1:] for x in batched_inputs]
        ab = ImageList.from_tensors(colors, self.size_divisibility).tensor
        grey = torch.stack([is_grey(color[None])[0] for color in colors])
        counted = image_area(images, *predicted.shape[-2:]) * ~grey[:, None, None]
        if self.bins is None:
            return {"loss_color": regression_loss(predicted, ab, counted)}
        targets = self.bins.encode(F.avg_pool2d(ab, PIXELS_PER_QUERY_CELL))
        return {"loss_color": classification_loss(predicted, targets, self._bin_weights, counted)}

    def main_task(
        self, batched_inputs: list[dict[str, Any]], *, mask_with: torch.Generator | None = None
    ) -> MainTask:
        """Returns the distribution of each pixel's colour over the bins, at stride 4.

        Raises:
            UserError: the model was trained for regression and has no distributions.
        """
        require_distributions(self)
        images = self.normalize(batched_inputs)
        visible = None
        if mask_with is not None:
            visible = self.masks.of_batch(batched_inputs, images, mask_with)
        logits = self.sem_seg_head(self.encode(images.tensor, visible))
        return MainTask(PixelClasses.of_logits(logits), image_area(images, *logits.shape[-2:]))

    def predict(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns ``color`` for each input: (3, height, width) uint8, RGB.

        Colours have the network's resolution. Lightness is that of the input's ``grey``, (1,
        height, width) uint8, where it has it; else that of its image, stretched.
        """
        images = self.normalize(batched_inputs)
        predicted = self.sem_seg_head(self.encode(images.tensor)).float()
        if self.bins is None:
            ab = predicted * AB_UNIT
        else:
            ab = self.bins.decode(predicted, self.temperature)
            ab = F.interpolate(ab, size=images.tensor.shape[-2:], mode="bilinear")
        results = []
        for x, colors, size in zip(batched_inputs, ab, images.image_sizes, strict=True):
            height, width = output_size(x, size)
            if "grey" in x:
                light = lightness(x["grey"].to(self.device).expand(3, -1, -1))
            else:
                light = lightness(to_grey(self._rgb(x["image"])).expand(3, -1, -1))
                light = sem_seg_postprocess(light, size, height, width)
            results.append(
                {"color": compose(light, sem_seg_postprocess(colors, size, height, width))}
            )
        return results


def read_prior(file: str) -> Tensor:
    """Reads how many pixels each colour bin has in the training images: (313,) float64.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    tensors = read_checkpoint(file)
    counts = tensors.get(PRIOR)
    if counts is None or tuple(counts.shape) != (len(ColorBins()),):
        raise UserError(
            f"{file} of TTT.COLOR.PRIOR has no {PRIOR!r} with a number for each colour bin: make "
            "it with `ttt-video weights colors`"
        )
    return counts.double()
