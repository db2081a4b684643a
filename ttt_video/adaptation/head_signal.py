"""Tells how far the head's activations are from those on training images, in passing.

The means of the channels of the head's normalisation layers are taken in a prediction that is made
anyway. They cost one mean per layer: no second forward pass, and the layers' outputs stay the same
bits. Most of what changes them is what a picture shows. Training images differ in that, too, so
that the directions in which they differ most are left out, and the distance is that of the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..modeling.measured import read_measured
from .base import module_mode
from .norm_statistics import hooked, norm_layers

DIRECTIONS = 32
"""At most so many directions of training images are left out."""
FEWEST = 8
"""Training images that it takes at least."""
STILL = 1e-6
"""Channels whose means differ less than that between training images say nothing."""


class Reading:
    """The signal of one forward pass."""

    def __init__(self, layers: Iterable[str]) -> None:
        self.means: dict[str, list[Tensor]] = {name: [] for name in layers}
        """Channel means by layer, one entry for each call of the layer."""

    def vector(self) -> Tensor | None:
        """Returns (C,) float32, the channel means of all layers; None if one did not run."""
        if not self.means or not all(self.means.values()):
            return None
        return torch.cat([torch.stack(calls).mean(0) for calls in self.means.values()])


class HeadSignal:
    """Reads the channel means of normalisation layers that never move."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        """``layers`` are of :func:`norm_layers`."""
        self.layers = layers

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Collects the signal of the forward pass within."""
        reading = Reading(self.layers)

        def read(name: str, layer: nn.Module, _: Tensor, out: Tensor) -> None:
            axis = out.ndim - 1 if isinstance(layer, nn.LayerNorm) else 1
            others = [i for i in range(out.ndim) if i != axis]
            reading.means[name].append(out.mean(others, dtype=torch.float32))

        with hooked(self.layers, read):
            yield reading


class SourceHead:
    """The signal on training images, and the distance of others from it.

    Attributes:
        tensors: of :func:`measure_head`, or of its file.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = {name: tensor.float() for name, tensor in tensors.items()}

    def to(self, device: torch.device) -> SourceHead:
        """Returns the same on a device."""
        return SourceHead({name: tensor.to(device) for name, tensor in self.tensors.items()})

    def rest(self, vector: Tensor) -> Tensor:
        """Returns (..., C), what in (..., C) signals is of no direction of training images.

        The root mean square of a usual picture's is 1.
        """
        mean, deviation, directions, level = (
            self.tensors[name] for name in ("mean", "deviation", "directions", "level")
        )
        plain = torch.where(deviation > STILL, (vector - mean) / deviation.clamp_min(STILL), 0.0)
        return (plain - (plain @ directions.T) @ directions) / level


def length(rest: Tensor) -> float:
    """Returns the root mean square of (C,) numbers: a distance in those of usual pictures."""
    return float(rest.square().mean().sqrt())


@torch.no_grad()
def measure_head(model: Any, images: Iterable[Tensor], read: Sequence[str]) -> dict[str, Tensor]:
    """Measures training images, for ``TTT.LEARN_ON_CHANGE.SOURCE_HEAD``.

    Directions are those of three quarters of the images; a usual distance is the median of the
    other quarter.

    Args:
        model: with its source weights.
        images: (3, H, W) uint8, as a stream's.
        read: submodules whose normalisation layers are the signal.

    Returns:
        ``mean``, ``deviation`` (C,), ``directions`` (K, C) float16 and ``level`` (1,) of the
        signal; ``image_mean`` and ``image_deviation`` (3,) of pixel values.

    Raises:
        UserError: there are too few images, or no such layers.
    """
    signal, vectors, colours = HeadSignal(norm_layers(model, read)), [], []
    with module_mode(model, training=False):
        for image in images:
            with signal.reading() as reading:
                model([{"image": image}])
            vector = reading.vector()
            if vector is None:
                raise UserError(f"{list(read)} have no normalisation layers in every prediction")
            vectors.append(vector.cpu())
            colours.append(torch.stack(torch.std_mean(image.float(), (1, 2), correction=0)).cpu())
    if len(vectors) < FEWEST:
        raise UserError(f"{len(vectors)} images say too little of a head; give at least {FEWEST}")
    seen = torch.stack(vectors)
    fitted = seen[: -(len(seen) // 4)]
    deviation, mean = torch.std_mean(fitted, 0)
    still = torch.where(deviation > STILL, (fitted - mean) / deviation.clamp_min(STILL), 0.0)
    directions = torch.linalg.svd(still, full_matrices=False).Vh[
        : min(DIRECTIONS, len(fitted) // 4)
    ]
    image_deviation, image_mean = torch.stack(colours).mean(0)
    tensors = {
        "mean": mean,
        "deviation": deviation,
        "directions": directions.half(),
        "level": torch.ones(1),
        "image_mean": image_mean,
        "image_deviation": image_deviation,
    }
    rests = SourceHead(tensors).rest(seen[len(fitted) :])
    tensors["level"] = rests.square().mean(1).sqrt().median().view(1)
    return tensors


def read_head(file: str, model: nn.Module, channels: int) -> SourceHead:
    """Reads the file that ``TTT.LEARN_ON_CHANGE.SOURCE_HEAD`` names.

    Raises:
        UserError: there is none, or it is of another model.
    """
    how = "measure it once with tools/measure_norm_statistics.py --head FILE"
    if not file:
        raise UserError(
            "TTT.LEARN_ON_CHANGE.SOURCE_HEAD is empty: learn_on_change compares frames with "
            f"training images; {how}"
        )
    tensors = read_measured(file).checked(model)
    wanted = {"mean", "deviation", "directions", "level", "image_mean", "image_deviation"}
    if tensors.keys() != wanted or tensors["mean"].shape != (channels,):
        raise UserError(
            f"{file} does not fit this model's head, {channels} channels of "
            f"TTT.LEARN_ON_CHANGE.READ: {how}"
        )
    return SourceHead(tensors)
