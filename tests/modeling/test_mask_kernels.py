"""Attention masks in Triton, against PyTorch's."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
kernel_masks = pytest.importorskip("ttt_video.modeling.kernels.masks")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def logits(queries: int, classes: int, height: int, width: int):
    generator = torch.Generator().manual_seed(0)
    class_logits = 2 * torch.randn(queries, classes + 1, generator=generator)
    mask_logits = 5 * torch.randn(queries, height, width, generator=generator)
    return class_logits.to(DEVICE), mask_logits.to(DEVICE)


@pytest.mark.parametrize("columns", [1, 16, 37])
def test_bias_masks_what_is_outside(monkeypatch, columns):
    """Rows of several blocks, of no mask at all, of zeros and of a mask in the last place alone."""
    monkeypatch.setattr(kernel_masks, "BLOCK", 16)
    _, rows = logits(6, 1, 1, columns)
    rows = rows.view(2, 3, columns)
    rows[0, 0] = -1.0
    rows[0, 1] = 0.0
    rows[0, 2, :] = -1.0
    rows[0, 2, -1] = 1.0
    inside = rows >= 0
    allowed = inside | ~inside.any(-1, keepdim=True)
    bias = kernel_masks.attention_bias(rows, torch.bfloat16)
    assert (bias.dtype, bias.shape) == (torch.bfloat16, rows.shape)
    assert [stride % 16 for stride in bias.stride()] == [0, 0, 1]
    assert torch.equal(bias == 0, allowed)
    assert torch.equal(bias == -torch.inf, ~allowed)
