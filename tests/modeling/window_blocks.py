"""Swin blocks whose attention is computed by a kernel or by the reference, with gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from detectron2.modeling.backbone.swin import SwinTransformerBlock
from torch import Tensor

from ttt_video.modeling.backbone import FastSwinBlock
from ttt_video.modeling.windows import shift_mask

CASES = {  # batch, size, heads, side, shift, bias of the projection
    "whole": (1, (6, 9), 2, 3, 0, True),
    "shifted": (1, (6, 9), 2, 3, 1, False),
    "padded": (1, (5, 7), 3, 3, 0, True),
    "padded and shifted": (2, (5, 4), 3, 3, 1, True),
    "padded with zeros": (1, (5, 4), 1, 3, 2, False),
    "smaller than a window": (2, (2, 3), 1, 4, 2, True),
    "as published": (1, (9, 13), 1, 7, 3, True),
}


def noise(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def make_block(heads: int, head_dim: int, side: int, shift: int, bias: bool = True):
    """A block whose weights are large enough that logits, biases and padding matter."""
    torch.manual_seed(0)
    block = SwinTransformerBlock(heads * head_dim, heads, side, shift, qkv_bias=bias)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    block.__class__ = FastSwinBlock
    return block


def attention(
    kernel: Callable[..., Tensor],
    block: FastSwinBlock,
    qkv: Tensor,
    size: tuple[int, int],
    **options: Any,
) -> Tensor:
    """The kernel's, with the block's parameters."""
    attn = block.attn
    return kernel(
        qkv,
        attn.relative_position_bias_table,
        attn.qkv.bias,
        height=size[0],
        width=size[1],
        side=block.window_size,
        shift=block.shift_size,
        heads=attn.num_heads,
        scale=attn.scale,
        **options,
    )


def reference(block: FastSwinBlock, qkv: Tensor, size: tuple[int, int]) -> Tensor:
    block.H, block.W = size
    mask = shift_mask(*size, block.window_size, block.shift_size, qkv.device)
    return block._attention_by_windows(qkv, mask.to(qkv.dtype))


def gradients(block: FastSwinBlock, qkv: Tensor, out: Tensor) -> dict[str, Tensor | None]:
    attn = block.attn
    wanted = {"qkv": qkv, "table": attn.relative_position_bias_table}
    if attn.qkv.bias is not None:
        wanted["fill"] = attn.qkv.bias
    grad = noise(*out.shape, seed=2).to(out)
    grads = torch.autograd.grad(out, list(wanted.values()), grad, allow_unused=True)
    return dict(zip(wanted, grads, strict=True))


def check_against_float64(
    kernel: Callable[..., Tensor],
    case: tuple[int, tuple[int, int], int, int, int, bool],
    head_dim: int,
    device: str = "cpu",
    **options: Any,
) -> None:
    """Compares result and gradients with the reference's in float64."""
    batch, size, heads, side, shift, bias = case
    block = make_block(heads, head_dim, side, shift, bias).to(device)
    qkv = noise(batch, size[0] * size[1], 3 * heads * head_dim).to(device).requires_grad_()
    out = attention(kernel, block, qkv, size, **options)
    grads = gradients(block, qkv, out)

    exact = copy.deepcopy(block).double()
    qkv64 = qkv.detach().double().requires_grad_()
    expected = reference(exact, qkv64, size)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    padded = size[0] % side > 0 or size[1] % side > 0
    for name, grad in gradients(exact, qkv64, expected).items():
        if name == "fill" and not padded:
            assert not grads[name].any()
            assert not grad.any()
            continue
        error = (grads[name].double() - grad).abs().max() / grad.abs().max()
        assert error < 2e-6, name
