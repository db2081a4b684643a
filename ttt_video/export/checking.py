"""Compares an exported file with the model that it was made of."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .program import Prediction

TOLERANCE = 1e-3
"""Largest difference of an output's values, as a share of the largest value, that passes."""

MOST_PIXELS = 1e-3
"""Largest share of pixels with another class or query that passes: near ties may fall over."""

Tensors = Mapping[str, Tensor]


class Difference(NamedTuple):
    """Says how far a file's outputs are from the model's for one image.

    Attributes:
        size: height and width of the image.
        values: largest difference of each output's values, but for ``labels``.
        scale: the largest of each output's values, at least 1.
        pixels: how many have another label or, without labels, another query that wins.
    """

    size: tuple[int, int]
    values: dict[str, float]
    scale: dict[str, float]
    pixels: int

    @property
    def passes(self) -> bool:
        """Whether it is within ``TOLERANCE`` and ``MOST_PIXELS``; NaN never is."""
        close = all(value <= TOLERANCE * self.scale[name] for name, value in self.values.items())
        return close and self.pixels <= MOST_PIXELS * self.size[0] * self.size[1]

    def __str__(self) -> str:
        (height, width), most = self.size, max(self.values, key=lambda name: self.values[name])
        return (
            f"{height}x{width}: {most} differ by up to {self.values[most]:.1e} (largest value "
            f"{self.scale[most]:.3g}); {self.pixels} of {height * width} pixels differ"
        )


def winners(outputs: Tensors) -> Tensor:
    """Returns each pixel's label (1, H, W), or else the query whose mask counts most."""
    if "labels" in outputs:
        return outputs["labels"]
    scores = outputs["class_logits"].softmax(-1)[..., :-1].amax(-1)
    return (scores[..., None, None] * outputs["mask_logits"].sigmoid()).argmax(1)


def difference(expected: Tensors, found: Tensors) -> Difference:
    """Returns how far two predictions of an image are apart."""
    names = [name for name in expected if name != "labels"]
    values = {name: (expected[name] - found[name]).abs().max().item() for name in names}
    scale = {name: max(1.0, expected[name].abs().max().item()) for name in names}
    won = winners(expected)
    pixels = int((won != winners(found)).sum())
    return Difference((won.shape[-2], won.shape[-1]), values, scale, pixels)


def runner(content: bytes, suffix: str) -> Callable[[Tensor], Tensors] | None:
    """Returns what runs a file on an image; None for ONNX where onnxruntime is not installed."""
    if suffix == ".pt2":
        loaded = torch.export.load(io.BytesIO(content)).module()
        return torch.no_grad()(lambda image: loaded(image))
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(image: Tensor) -> Tensors:
        arrays = session.run(None, {"image": image.numpy()})
        return dict(zip(names, map(torch.from_numpy, arrays), strict=True))

    return run


@torch.no_grad()
def differences(
    prediction: Prediction, run: Callable[[Tensor], Tensors], images: list[Tensor], name: str
) -> Iterator[Difference]:
    """Yields how far a file is from the model for each (1, 3, H, W) image.

    Raises:
        UserError: it is too far.
    """
    for image in images:
        found = difference(prediction(image), run(image))
        if not found.passes:
            raise UserError(
                f"{name} is not written, because it differs from the model by more than "
                f"{TOLERANCE:g} of the largest value or {MOST_PIXELS:.1%} of the pixels: {found}"
            )
        yield found
