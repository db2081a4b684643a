"""GPU kernels in Triton, and the one place that decides whether they run.

Every kernel has a reference in plain PyTorch, which runs wherever the kernel does not. Triton comes
with PyTorch's CUDA builds; this package is imported without it.
"""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from subprocess import SubprocessError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UserError
from .. import large_layers
from ..tables import is_exporting

logger = logging.getLogger(__name__)

VARIABLE = "TTT_VIDEO_KERNELS"
"""Environment variable: "auto" (default) runs the kernels on GPUs that have them, "off" runs the
reference and leaves large layers on a CPU to PyTorch, "on" runs the kernels on any device, as
Triton's interpreter does on a CPU."""

LEAST_CAPABILITY = (8, 0)
"""Compute capability from which the kernels are used: Ampere, the first with bfloat16."""

LEAST_TRITON = (3, 3)
"""Triton's release, that of PyTorch 2.7, from which the kernels are used. The compilers of 3.0 and
3.1 refuse deformable attention and end the process at window attention, where 3.2 prints errors."""


def use_kernels(x: Tensor) -> bool:
    """Returns whether a tensor is worked on by the kernels."""
    choice = kernels_choice()
    if choice == "off" or is_exporting():
        return False
    if choice == "on":
        if not (x.is_cuda or os.environ.get("TRITON_INTERPRET")):
            raise UserError(
                f"{VARIABLE} is 'on', and on a {x.device.type} Triton's interpreter alone runs "
                f"kernels: set TRITON_INTERPRET to 1, or {VARIABLE} to auto"
            )
        return _has_triton()
    return x.is_cuda and _can_run(x.device)


def kernels_choice() -> str:
    """Returns what the environment says of the kernels: "auto", "on" or "off"."""
    choice = os.environ.get(VARIABLE, "auto")
    if choice not in ("auto", "on", "off"):
        raise UserError(f"{VARIABLE} is {choice!r}; choose auto, on or off")
    return choice


def fuses_norms(x: Tensor, *modules: nn.Module) -> bool:
    """Returns whether the kernels work on a tensor in place of modules, normalisations mostly.

    A module with a hook is called, because nothing else runs the hook.
    """
    return use_kernels(x) and not has_hooks(*modules)


def has_hooks(*modules: nn.Module) -> bool:
    """Returns whether one of the modules has a hook, which only its call as a module runs."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def run_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``F.linear(x, weight, bias)``; where the kernels run, backward is theirs.

    On a CPU large ones are those of ``large_layers.py``, unless :data:`VARIABLE` says "off".
    """
    if not (torch.is_grad_enabled() and use_kernels(x)):
        if is_large_on_cpu(x, weight):
            return large_layers.linear(x, weight, bias)
        return F.linear(x, weight, bias)
    from .linear import linear

    return linear(x, weight, bias)


def is_large_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Returns whether a layer with weights (D, C) is so large that faster ways pay on a CPU.

    They differ by rounding. :data:`VARIABLE` "off" takes none of them.
    """
    return large_layers.is_large(x, weight) and kernels_choice() != "off"


def run_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Returns layer(x) by :func:`run_product`: (..., D) from (..., C)."""
    return run_product(x, layer.weight, layer.bias) if _is_plain(layer) else layer(x)


def run_mlp(first: nn.Linear, second: nn.Linear, x: Tensor, *, relu: bool) -> Tensor:
    """Returns second(activation(first(x))); where the kernels run, they apply the activation.

    It is ReLU, or else GELU, the exact one.
    """
    plain = _is_plain(first) and _is_plain(second)
    if plain and use_kernels(x):
        from .linear import mlp
    elif plain and is_large_on_cpu(x, first.weight):
        mlp = large_layers.mlp
    else:
        hidden = run_linear(first, x)
        return run_linear(second, F.relu(hidden) if relu else F.gelu(hidden))
    return mlp(x, first.weight, first.bias, second.weight, second.bias, relu=relu)


def run_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Returns the layer's convolution of (B, C, H, W), without what a subclass adds to it.

    A large one of 3x3 pixels on a CPU is Winograd's.
    """
    one = [layer.kernel_size, layer.stride, layer.padding, layer.dilation, (layer.groups,)]
    known = one == [(3, 3), (1, 1), (1, 1), (1, 1), (1,)] and layer.padding_mode == "zeros"
    if known and is_large_on_cpu(x, layer.weight[:, :, 0, 0]):
        from .. import winograd  # a GPU needs no Numba

        return winograd.convolve(x, layer.weight, layer.bias)
    return layer._conv_forward(x, layer.weight, layer.bias)


def _is_plain(layer: nn.Linear) -> bool:
    """Returns whether a layer does no more than ``nn.Linear``, as one of low rank does."""
    forward = getattr(layer.forward, "__func__", None)
    return forward is nn.Linear.forward and not has_hooks(layer)


@cache
def _has_triton() -> bool:
    """Returns whether there is a Triton that compiles the kernels; the log says once why not."""
    try:
        import triton
    except ImportError as error:
        _say_slow(f"Triton cannot be imported ({error})")
        return False
    release = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:2])
    if release < LEAST_TRITON:
        _say_slow(f"Triton is {triton.__version__}; the kernels need 3.3, which PyTorch 2.7 brings")
    return release >= LEAST_TRITON


@cache
def _can_run(device: torch.device) -> bool:
    return (
        torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
        and _has_triton()
        and _starts(device)
    )


def _starts(device: torch.device) -> bool:
    """Returns whether Triton starts a kernel; the log says why not.

    That takes a C compiler and Python's headers, which many containers do without.
    """
    from triton.errors import TritonError

    from .masks import attention_bias

    try:
        attention_bias(torch.zeros(1, 1, 1, device=device), torch.float32)
    except (TritonError, RuntimeError, OSError, ImportError, SubprocessError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        _say_slow(f"Triton, which needs a C compiler and Python's headers, fails: {lines[0]}")
        return False
    return True


def _say_slow(reason: str) -> None:
    logger.warning("runs PyTorch's operations instead of own kernels, which are faster: %s", reason)
