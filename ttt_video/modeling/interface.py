"""The interface of a model: all that the stream and the methods call.

A model is a PyTorch module that speaks detectron2's dicts:

    model([frame])                                    # eval mode: one prediction per input
    model.parts["f"], model.parts.get("g")            # names of its parts, by role
    model.reconstruction_losses(samples, generator)   # masked reconstruction: online_ttt_mae
    model.main_task(samples)                          # class distributions: tent, self_train
    model.encode(model.normalize(samples).tensor)     # f alone: ln_adapt
    model.masks.draw(height, width, generator)        # a patch mask
    model.prediction_entropy(h_returned, size)        # how unsure it is: learn_on_change

:class:`Model` is enough for predictions; methods that train need an :class:`AdaptableModel`. Both
are protocols, so nothing has to derive from them. ``examples/new_model.py`` is a whole model.

The roles are encoder "f", head "h" of the main task and decoder "g" of the reconstruction.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import torch
import torch.nn.functional as F
from detectron2.structures import ImageList
from torch import Tensor, nn

from ..errors import UserError
from .masking import PatchMasks
from .pixel_classes import MainTask
from .tables import is_exporting

Samples = Sequence[Mapping[str, Any]]
"""Inputs with ``image``: (3, H, W) uint8 in ``INPUT.FORMAT`` order."""

Parts: TypeAlias = Mapping[str, str | tuple[str, ...]]
"""Names of a model's parts by role. A role is one submodule, or several submodules, parameters and
buffers, as where published weights have flat names."""

MASKFORMER_PARTS = {"f": "backbone", "g": "recon_head", "h": "sem_seg_head"}
"""The names in the published joint-trained weights, and so in :class:`MaskFormerTTT`."""


OBJECT_OUTPUTS = frozenset({"instances", "panoptic_seg"})
"""Outputs of models for which a pixel may be of no object."""


class Model(Protocol):
    """A model that predicts frames."""

    @property
    def parts(self) -> Parts:
        """Names of what is "f", "h" and, where the weights have it, "g"."""

    @property
    def outputs(self) -> frozenset[str]:
        """Keys of a prediction: "sem_seg", "instances", "panoptic_seg", "color", "image_class"."""

    @property
    def device(self) -> torch.device:
        """The device of the model, to which it moves its inputs."""

    def __call__(self, batched_inputs: list[dict[str, Any]], /) -> Any:
        """Returns detectron2's outputs in eval mode, a dict for each input.

        A prediction without floating-point scores, such as colours, may say as ``finite``, a bool
        or a tensor of one, whether all scores that it was made of were finite.

        Their size is the input's ``height`` and ``width``, or else that of its image.
        """


class ExportableModel(Model, Protocol):
    """A model whose prediction ``ttt-video weights export`` can write for other programs."""

    def prediction_tensors(self, images: Tensor, /) -> dict[str, Tensor]:
        """Returns a prediction as tensors alone, by operations that ``torch.export`` can trace.

        Names and shapes are for (1, 3, H, W) uint8 images, and H and W may be symbols:

            ``scores`` (1, K, H, W) float32 and ``labels`` (1, H, W) int32, their largest;
            ``class_logits`` (1, Q, K + 1) and ``mask_logits`` (1, Q, H, W) float32 of queries.
        """


class DoubtingModel(Model, Protocol):
    """A model that says how unsure a prediction is, from a forward pass that was made anyway."""

    def prediction_entropy(self, returned: Any, size: Sequence[int], /) -> Tensor:
        """Returns the mean entropy of an image's pixels: a scalar, at least 0.

        ``returned`` is what h's module returned in the forward pass of one image, and ``size`` that
        image's height and width.
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

        ``mask_with`` is a CPU generator that draws masks of patches to hide, as in reconstruction.
        """

    def reconstruction_losses(
        self, batched_inputs: Samples, generator: torch.Generator | None = None, /
    ) -> dict[str, Tensor]:
        """Returns the ``loss_*`` of g(f(masked x)), each the mean over the samples.

        Inputs without ``image_mask`` (1, H, W; 1 = visible) get one that the generator (on the CPU)
        or torch's global one draws.
        """


def parts_of(model: Any) -> dict[str, tuple[str, ...]]:
    """Returns the names of a model's parts by role; detectron2's own models do not name theirs."""
    parts: Parts = getattr(model, "parts", {"f": "backbone", "h": "sem_seg_head"})
    return {role: (part,) if isinstance(part, str) else part for role, part in parts.items()}


def prefixes(model: nn.Module, *roles: str) -> tuple[str, ...]:
    """Returns what names of weights of these roles begin with; none for parts that it lacks."""
    parts = parts_of(model)
    modules = {name for name, _ in model.named_modules()}
    names = [name for role in roles for name in parts.get(role, ())]
    return tuple(f"{name}." if name in modules else name for name in names)


def full_names(model: Any, name: str) -> tuple[str, ...]:
    """Returns the names that a name stands for which may begin with a role.

    "f" stands for all of f. "f.layers.3" is a submodule of f, or one of f's submodules and what is
    in it, if f has several. Other names stand for themselves.
    """
    first, _, rest = name.partition(".")
    part = parts_of(model).get(first, ())
    if part and not rest:
        return part
    if len(part) == 1:
        return (f"{part[0]}.{rest}",)
    return (rest if is_within(rest, part) else name,)


def is_within(name: str, parts: Iterable[str]) -> bool:
    """Says whether a submodule or parameter is one of the named ones, or inside one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def drop_part(model: Any, role: str) -> None:
    """Removes a part that the weights do not have, such as decoder g of a Mask2Former file."""
    for part in parts_of(model)[role]:
        owner, _, name = part.rpartition(".")
        setattr(model.get_submodule(owner), name, None)
    model.parts = {known: part for known, part in model.parts.items() if known != role}


def adaptable(model: nn.Module) -> AdaptableModel:
    """Returns the model as one that gradient methods can train.

    Raises:
        UserError: the model only predicts.
    """
    for name in ("masks", "normalize", "encode", "main_task", "reconstruction_losses"):
        if not hasattr(model, name):
            raise UserError(
                f"this method needs a model with `{name}`, and the model is a "
                f"{type(model).__name__}, which runs frozen: use --method none"
            )
    return cast(AdaptableModel, model)


def require_distributions(model: Any) -> None:
    """Refuses a model whose ``has_distributions`` is False: it has no distributions of pixels.

    Models of classes have them and need not say so.

    Raises:
        UserError: there are none.
    """
    if not getattr(model, "has_distributions", True):
        raise UserError(
            "this method needs a distribution of colours, and a model with TTT.COLOR.TARGET "
            "regression has none: choose another --method, or a model of classification"
        )


def normalized_images(
    batched_inputs: Samples, mean: Tensor, std: Tensor, size_divisibility: int
) -> ImageList:
    """Returns the images, normalised and then zero-padded to a common size: (B, 3, H, W) float32.

    ``mean`` and ``std`` are (3, 1, 1), those of uint8 values, on the model's device. Height and
    width become multiples of ``size_divisibility``.
    """
    images = [x["image"].to(mean.device, non_blocking=True) for x in batched_inputs]
    height, width = images[0].shape[-2:]
    if any(image.shape[-2:] != (height, width) for image in images):
        return ImageList.from_tensors([(x - mean) / std for x in images], size_divisibility)
    # The same numbers in a few operations on the batch, not in a few on each image.
    pixels = (torch.stack(images) - mean) / std
    unit = max(size_divisibility, 1)
    padding = [(side + unit - 1) // unit * unit - side for side in (height, width)]
    if is_exporting() or any(padding):  # of symbols nothing may be asked
        pixels = F.pad(pixels, (0, padding[1], 0, padding[0]))
    return ImageList(pixels, [(height, width)] * len(images))


def output_size(sample: Mapping[str, Any], image_size: tuple[int, int]) -> tuple[int, int]:
    """Returns height and width of a sample's prediction."""
    return sample.get("height", image_size[0]), sample.get("width", image_size[1])
