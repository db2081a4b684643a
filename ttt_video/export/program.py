"""Traces a model's prediction to a program of PyTorch's operations, for one size or any."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from ..modeling.interface import ExportableModel

SHORTEST, LONGEST = 33, 8192
"""Limits of height and width of a program for any size, px. It needs two columns of res5."""

FIRST_TORCH = (2, 9)
"""The release from which ``torch.onnx`` writes what ``torch.export`` traced by default."""


class Prediction(nn.Module):
    """Maps (1, 3, H, W) uint8 images to what ``prediction_tensors`` of a model returns."""

    def __init__(self, model: nn.Module) -> None:
        """``model`` has its weights, and is in eval mode.

        Raises:
            UserError: it does not define ``prediction_tensors``.
        """
        super().__init__()
        if not hasattr(model, "prediction_tensors"):
            raise UserError(
                f"{type(model).__name__} cannot be exported: it has no prediction_tensors, as "
                "models of semantic, panoptic and instance segmentation have"
            )
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return cast(ExportableModel, self.model).prediction_tensors(image)


def check_torch() -> None:
    """Refuses a PyTorch that is too old.

    Raises:
        UserError: it is.
    """
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release < FIRST_TORCH:
        raise UserError(f"PyTorch is {torch.__version__}; weights export needs 2.9 or newer")


@torch.no_grad()
def trace(prediction: Prediction, image: Tensor, *, dynamic: bool) -> ExportedProgram:
    """Returns the program of a prediction.

    Args:
        prediction: of a model on the CPU.
        image: (1, 3, H, W) uint8, an example.
        dynamic: for any height and width in the limits, not only those of the example.

    Raises:
        UserError: the model does what a program cannot.
    """
    shapes: Any = None
    if dynamic:
        limits = {"min": SHORTEST, "max": LONGEST}
        shapes = {"image": {2: Dim("height", **limits), 3: Dim("width", **limits)}}
    # Sizes of 1 get no program of their own, as torch.onnx does it. Fused attention would fix the
    # strides of its result, which the operations that stand for it elsewhere do not have.
    sizes = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    try:
        with sizes, sdpa_kernel(SDPBackend.MATH):
            program = torch.export.export(prediction, (image,), dynamic_shapes=shapes, strict=False)
    except (RuntimeError, TypeError, ValueError) as error:
        name = type(prediction.model).__name__
        raise UserError(f"{name} cannot be traced: {first_line(error)}") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, for every operation
    return program


def first_line(error: Exception) -> str:
    """Returns what an error of PyTorch says first; many go on for pages."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
