"""What the stream and the methods need of a model.

A model is a PyTorch module that speaks detectron2's dicts. The loop and the methods call nothing
of it but this:

    model([frame])                                    # eval mode: one prediction per input
    model.parts["f"], model.parts.get("g")            # names of submodules, by role
    model.reconstruction_losses(samples, generator)   # masked reconstruction: online_ttt_mae
    model.main_task(samples)                          # class distributions: tent, self_train
    model.encode(model.normalize(samples).tensor)     # f alone: ln_adapt
    model.masks.draw(height, width, generator)        # a patch mask

:class:`Model` is enough for predictions; methods that train need an :class:`AdaptableModel`. Both
are protocols, so nothing has to derive from them. ``examples/new_model.py`` is a whole model.

The roles are the paper's: encoder "f", head "h" of the main task, and decoder "g" of the
reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import UserError
from .masking import PatchMasks
from .pixel_classes import MainTask

Samples = Sequence[Mapping[str, Any]]
"""Inputs with ``image``, (3, H, W) uint8 in ``INPUT.FORMAT`` order."""

DETECTRON2_PARTS = {"f": "backbone", "h": "sem_seg_head"}
"""The names that detectron2's own architectures have."""

MASKFORMER_PARTS = {**DETECTRON2_PARTS, "g": "recon_head"}
"""The names in the published joint-trained weights, and so in :class:`MaskFormerTTT`."""


class Model(Protocol):
    """A model that predicts frames."""

    @property
    def parts(self) -> Mapping[str, str]:
        """Names of the submodules that are "f", "h" and, where the weights have it, "g"."""

    @property
    def outputs(self) -> frozenset[str]:
        """Keys of a prediction: some of "sem_seg", "instances" and "panoptic_seg"."""

    @property
    def device(self) -> torch.device:
        """Where the model lives; it moves its inputs there."""

    def __call__(self, batched_inputs: list[dict[str, Any]], /) -> Any:
        """Returns detectron2's outputs in eval mode, a dict for each input.

        They have the size of the input's ``height`` and ``width``, or else of its image.
        """


class AdaptableModel(Model, Protocol):
    """A model that gradient methods can train while it predicts a stream."""

    @property
    def masks(self) -> PatchMasks:
        """Draws patch masks; has their kind, patch size and ratio."""

    def normalize(self, batched_inputs: Samples, /) -> ImageList:
        """Returns the images normalised as f expects them, padded to one size: (B, 3, H, W)."""

    def encode(self, pixels: Tensor, visible: Tensor | None = None, /) -> Any:
        """Returns f of normalised pixels; ``visible`` (B, 1, H, W) is 1 where they are shown."""

    def main_task(
        self, batched_inputs: Samples, /, *, mask_with: torch.Generator | None = None
    ) -> MainTask:
        """Returns the class distributions of pixels that h(f(x)) implies, with gradients.

        Args:
            batched_inputs: the samples.
            mask_with: hide patches of each image as the reconstruction does, by draws from this
                CPU generator; None hides nothing.
        """

    def reconstruction_losses(
        self, batched_inputs: Samples, generator: torch.Generator | None = None, /
    ) -> dict[str, Tensor]:
        """Returns the ``loss_*`` of g(f(masked x)), each the mean over the samples.

        An input's ``image_mask`` (1, H, W; 1 = visible) is used where it is given; other masks are
        drawn by the generator (on the CPU), or by torch's global one.
        """


def parts_of(model: Any) -> Mapping[str, str]:
    """Returns a model's parts by role; detectron2's own models name none, and have its names."""
    return getattr(model, "parts", DETECTRON2_PARTS)


def prefixes(model: Any, *roles: str) -> tuple[str, ...]:
    """Returns what names of parameters of these roles begin with; none for parts that it lacks."""
    parts = parts_of(model)
    return tuple(f"{parts[role]}." for role in roles if role in parts)


def submodule_name(model: Any, name: str) -> str:
    """Returns the name of a submodule that may begin with a role: "f.layers.3", "f" or itself."""
    first, dot, rest = name.partition(".")
    return f"{parts_of(model).get(first, first)}{dot}{rest}"


def is_within(name: str, modules: Iterable[str]) -> bool:
    """Says whether a submodule or parameter is, or is inside, one of the named submodules."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def drop_part(model: Any, role: str) -> None:
    """Removes a part that the weights do not have, such as decoder g of a Mask2Former file."""
    owner, _, name = model.parts[role].rpartition(".")
    setattr(model.get_submodule(owner), name, None)
    model.parts = {known: part for known, part in model.parts.items() if known != role}


def adaptable(model: nn.Module) -> AdaptableModel:
    """Returns the model as one that gradient methods can train.

    Raises:
        UserError: the model is one that only predicts.
    """
    for name in ("masks", "normalize", "encode", "main_task", "reconstruction_losses"):
        if not hasattr(model, name):
            raise UserError(
                f"this method needs a model with `{name}`, and the model is a "
                f"{type(model).__name__}, which runs frozen: use --method none"
            )
    return cast(AdaptableModel, model)


def normalized_images(
    batched_inputs: Samples, mean: Tensor, std: Tensor, size_divisibility: int
) -> ImageList:
    """Returns the images, normalised and then zero-padded to a common size: (B, 3, H, W) float32.

    Args:
        batched_inputs: the samples.
        mean: (3, 1, 1), of uint8 values, on the model's device; std: the same.
        size_divisibility: height and width become multiples of this.
    """
    images = [(x["image"].to(mean.device, non_blocking=True) - mean) / std for x in batched_inputs]
    return ImageList.from_tensors(images, size_divisibility)


def output_size(sample: Mapping[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the height and width that a sample's prediction is to have."""
    return sample.get("height", image_size[0]), sample.get("width", image_size[1])
