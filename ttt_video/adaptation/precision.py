"""The precisions in which a step and a prediction can run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

PRECISIONS: dict[str, torch.dtype | None] = {
    "fp32": None,
    "tf32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Each with autocast's type; None: what is float32 stays so. "fp32" and "tf32" differ in how a GPU
multiplies float32: exactly, or with 10 bits of mantissa; on a CPU they are the same. Autocast
leaves some layers in float32 (norms, softmax, positions), and these are exact."""


@contextmanager
def in_precision(
    device: torch.device, precision: str, *, keep_casts: bool = True
) -> Iterator[None]:
    """Runs the forward pass that is inside in one of :data:`PRECISIONS`.

    Args:
        device: that computes.
        precision: one of :data:`PRECISIONS`.
        keep_casts: weights that are cast are kept until the end, which serves a backward pass and
            weights that are used several times. Without, nothing outlives its use, as a captured
            graph needs.
    """
    dtype = PRECISIONS[precision]
    cast = torch.autocast(device.type, dtype, cache_enabled=keep_casts) if dtype else nullcontext()
    with tf32(device, precision == "tf32"), cast:
        yield


@contextmanager
def tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Says whether a GPU multiplies float32 in TF32, in products and convolutions alike.

    The process's own settings are back afterwards. PyTorch's default lets convolutions use TF32 and
    matrix products not. A backward pass belongs inside, and outside of autocast.
    """
    if device.type != "cuda":
        yield
        return
    before = _allowed()
    _allow(allowed, allowed)
    try:
        yield
    finally:
        _allow(*before)


def _allow(products: bool, convolutions: bool) -> None:
    # These names exist in every version; since 2.9 they set the newer fp32_precision, too.
    torch.backends.cuda.matmul.allow_tf32 = products
    torch.backends.cudnn.allow_tf32 = convolutions


def _allowed() -> tuple[bool, bool]:
    """Returns whether matrix products and convolutions may use TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    try:
        return matmul.allow_tf32, cudnn.allow_tf32
    except RuntimeError:  # somebody set the newer names, after which the old ones cannot be read
        convolutions = cudnn.conv  # type: ignore[attr-defined]
        return matmul.fp32_precision == "tf32", convolutions.fp32_precision == "tf32"
