"""Activation checkpointing: layers that keep their inputs alone for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError

Result = TypeVar("Result")


def run_layer(run: Callable[..., Result], *arguments: Any, recompute: bool, draws: bool) -> Result:
    """Runs a layer, which is to run again in the backward pass if ``recompute`` is set.

    Nothing is different without gradients. A layer that ``draws`` at random draws the same again.
    """
    if not (recompute and torch.is_grad_enabled()):
        return run(*arguments)
    # To read the random state makes the host wait for a GPU, so it is kept only if it is needed.
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=draws)


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
