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
from ..color.lab import (
    AB_UNIT,
    compose,
    in_three_channels,
    is_one_plane,
    lightness,
    rgb_to_lab,
    to_grey,
)
from ..color.losses import classification_loss, regression_loss
from ..errors import UserError
from .heads import PIXELS_PER_QUERY_CELL, ColorHead
from .interface import output_size, require_distributions
from .pixel_classes import MainTask, PixelClasses, PixelLabels, image_area
from .reconstructing import DenseModel
from .weights import check_finite, read_checkpoint

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

    def _grey(self, image: Tensor) -> Tensor:
        """Returns an image without colour; one that cannot have any (:func:`is_one_plane`) as is.

        A source of grey frames gives such images, so a frame is turned grey once and not in every
        step; whatever else comes is turned grey here.
        """
        return image if is_one_plane(image) else in_three_channels(to_grey(self._rgb(image)))

    def normalize(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Returns the images, grey, normalised and zero-padded to a common size: (B, 3, H, W)."""
        return super().normalize([{"image": self._grey(x["image"])} for x in batched_inputs])

    def main_losses(
        self, batched_inputs: list[dict[str, Any]], normalizers: None = None
    ) -> dict[str, Tensor]:
        """Returns l_m(h(f(x)), y): ``loss_color``, the mean over the pixels of coloured images.

        Padding does not count. That of a mapper is what the masks of an input's ``instances`` leave
        (:meth:`ttt_video.tasks.ColorizationTask.training_target`).
        """
        images = self.normalize(batched_inputs)
        predicted = self.sem_seg_head(self.encode(images.tensor))
        colors = [rgb_to_lab(self._rgb(x["image"]))[1:] for x in batched_inputs]
        ab = ImageList.from_tensors(colors, self.size_divisibility).tensor
        grey = torch.stack([is_grey(color[None])[0] for color in colors])
        shown = self._shown(batched_inputs, images)
        if self.bins is None:
            counted = shown[:, 0] * ~grey[:, None, None]
            return {"loss_color": regression_loss(predicted, ab, counted)}
        # The mean colour of a cell's pixels that are shown; 1/16 is the share of one of them.
        share = F.avg_pool2d(shown, PIXELS_PER_QUERY_CELL)
        ab = F.avg_pool2d(ab * shown, PIXELS_PER_QUERY_CELL) / share.clamp(min=1 / 16)
        targets = self.bins.encode(ab)
        counted = (share[:, 0] > 0) & ~grey[:, None, None]
        return {"loss_color": classification_loss(predicted, targets, self._bin_weights, counted)}

    @staticmethod
    def _shown(batched_inputs: list[dict[str, Any]], images: ImageList) -> Tensor:
        """Returns 1 at pixels of the pictures, 0 at padding: (B, 1, H, W)."""
        shown = image_area(images, *images.tensor.shape[-2:])[:, None]
        for area, x in zip(shown[:, 0], batched_inputs, strict=True):
            if "instances" in x:
                masks = x["instances"].gt_masks.tensor.to(area.device)
                area[: masks.shape[1], : masks.shape[2]] *= masks.any(0)
        return shown

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
        inside = image_area(images, *logits.shape[-2:])
        return MainTask(PixelClasses.of_logits(logits), inside, self._color_labels)

    @torch.no_grad()
    def _color_labels(self, pixels: PixelClasses) -> PixelLabels:
        """Returns the predicted colours as labels of training are: soft, over their nearest bins.

        The confidence of a colour is the probability of these bins. A distribution that was learned
        from soft labels gives no single bin more than 0.62, so that of the likeliest bin says
        little; and a mean between two separate colours has little probability around it.
        """
        assert self.bins is not None
        labels = self.bins.encode(self.bins.decode(pixels.classes, self.temperature))
        confidence = pixels.classes.exp().gather(1, labels.indices).sum(1).clamp(max=1)
        return PixelLabels(labels.indices, labels.weights, confidence)

    def predict(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns ``color`` for each input, (3, height, width) uint8, RGB, and ``finite``, a bool.

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
                light = lightness(in_three_channels(x["grey"].to(self.device)))
            else:
                light = lightness(self._grey(x["image"]).to(self.device))
                light = sem_seg_postprocess(light, size, height, width)
            colored = compose(light, sem_seg_postprocess(colors, size, height, width))
            results.append({"color": colored, "finite": colors.isfinite().all()})
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
    check_finite(tensors, file)
    return counts.double()
