"""GPU kernels in Triton, and the one place that decides whether they run.

Every kernel has a reference in plain PyTorch, which runs wherever the kernel does not. Triton comes
with PyTorch's CUDA builds; this package is imported without it.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor, nn

from ...errors import UserError

VARIABLE = "TTT_VIDEO_KERNELS"
"""Environment variable: "auto" (default) runs the kernels on GPUs that have them, "off" runs the
reference, "on" runs the kernels on any device, as Triton's interpreter does on a CPU."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which the kernels are used: Ampere, the first with bfloat16."""


def use_kernels(x: Tensor) -> bool:
    """Returns whether a tensor is worked on by the kernels."""
    choice = kernels_choice()
    if choice == "off":
        return False
    if choice == "on":
        return _has_triton()
    return x.is_cuda and _can_run(x.device)


def kernels_choice() -> str:
    """Returns what the environment says of the kernels: "auto", "on" or "off"."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "on", "off"):
        raise UserError(f"{VARIABLE} is {choice!r}; choose auto, on or off")
    return choice


def fuses_norms(x: Tensor, *norms: nn.Module) -> bool:
    """Returns whether the kernels work on a tensor in place of normalisations.

    A normalisation with a hook is called as a module, because the hook wants its input.
    """
    return use_kernels(x) and not any(norm._forward_hooks for norm in norms)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _can_run(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and _has_triton()
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )
