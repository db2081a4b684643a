"""Activation checkpointing: layers that keep their inputs alone for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError


def run_layer(layer: nn.Module, *arguments: Any, recompute: bool) -> Tensor:
    """Runs a layer, which is to run again in the backward pass if ``recompute`` is set.

    Nothing is different without gradients. Random layers draw the same again.
    """
    if not (recompute and torch.is_grad_enabled()):
        return layer(*arguments)
    # The random state is kept for layers that draw; to read it makes the host wait for a GPU.
    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=layer.training)


def recompute_layers(model: nn.Module) -> None:
    """Makes all layers that can recompute do so when gradients are taken: blocks of f, and of the
    pixel decoders of g and h.

    They are in modules with a flag ``use_checkpoint``.

    Raises:
        UserError: the model has none.
    """
    modules = [module for module in model.modules() if hasattr(module, "use_checkpoint")]
    if not modules:
        raise UserError(
            f"{type(model).__name__} has no layers that can run again: set TTT.CHECKPOINT False "
            "and a smaller TTT.MICRO_BATCH_SIZE"
        )
    for module in modules:
        module.use_checkpoint = True  # type: ignore[assignment]
